"""The Fréchet distance is the one of its definition with scipy's matrix square root."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from slimdit.metrics.quality import Statistics, frechet


def by_definition(a: Statistics, b: Statistics) -> float:
    root = sqrtm(a.sigma @ b.sigma)
    return float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root.real))


def features(seed: int, n: int, d: int, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((n, d)) @ random.standard_normal((d, d)) / np.sqrt(d)
    return np.maximum(mixed + shift, 0)  # like pooled activations: not negative, correlated


@pytest.mark.parametrize(("n", "d"), [(500, 8), (1000, 64), (2000, 112)])
def test_full_rank(n, d):
    a, b = Statistics.of(features(1, n, d)), Statistics.of(features(2, n + 100, d, shift=0.2))
    assert frechet(a, b) == pytest.approx(by_definition(a, b), rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(40, 64), (60, 112)])
def test_fewer_images_than_features(n, d):
    # With the exact factor X'X / (n - 1), tr (A B)^1/2 is the sum of singular values of X B^1/2 / (n - 1)^1/2.
    x, y = features(3, n, d), features(4, 400, d, shift=0.1)
    a, b = Statistics.of(x), Statistics.of(y)
    values, vectors = np.linalg.eigh(b.sigma)
    half = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.svd((x - a.mu) @ half / np.sqrt(n - 1), compute_uv=False).sum()
    exact = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma) - 2 * cross
    assert frechet(a, b) == pytest.approx(exact, rel=1e-6)
    assert frechet(b, a) == pytest.approx(exact, rel=1e-6)
    assert frechet(a, b) == pytest.approx(by_definition(a, b), rel=1e-6)


def test_of_a_set_to_itself_is_zero():
    a = Statistics.of(features(5, 300, 50))
    assert abs(frechet(a, a)) < 1e-9 * np.trace(a.sigma)


def test_in_one_dimension_it_is_the_formula():
    a = Statistics(np.array([1.0]), np.array([[4.0]]))
    b = Statistics(np.array([4.0]), np.array([[25.0]]))
    assert frechet(a, b) == pytest.approx(9 + (2 - 5) ** 2, rel=1e-12)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="one feature network"):
        frechet(Statistics(np.zeros(2), np.eye(2)), Statistics(np.zeros(3), np.eye(3)))
