"""Balls in feature space: what float32 leaves open is settled exactly, ties and copies too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimdit.metrics import balls

K = 3


def exact(x, y):
    return ((x[:, None].astype(np.float64) - y[None]) ** 2).sum(-1)


def exact_radii(members):
    return np.partition(exact(members, members), K, axis=1)[:, K]


def features(random, kind, n, d):
    plain = random.normal(size=(n, d))
    return {"normal": plain, "on a grid": random.integers(0, 3, (n, d)).astype(np.float64),
            "of all sizes": plain * 10.0 ** random.integers(-4, 5, (n, 1)),
            "with copies": np.where(random.random((n, 1)) < 0.3, plain, 1.0),
            "far away": plain.astype(np.float32) + 1000}[kind]


@given(st.integers(0, 2**32), st.sampled_from(["normal", "on a grid", "of all sizes", "with copies", "far away"]),
       st.integers(1, 6), st.booleans())
def test_are_those_of_exact_distances(seed, kind, d, shared):
    random = np.random.default_rng(seed)
    x, y = (features(random, kind, int(random.integers(5, 40)), d) for _ in range(2))
    if shared:
        y[:3] = x[:3]
    of_x, of_y = balls.radii(x, K), balls.radii(y, K)
    scale = float(np.abs(np.concatenate([x, y])).max()) ** 2
    for found, members in ((of_x, x), (of_y, y)):
        assert found == pytest.approx(exact_radii(members), rel=1e-9, abs=1e-13 * scale)
    # The radii found are used on both sides: what is asked is whether a ball of that size holds a point.
    expected = (exact(x, y) <= of_y).any(1), (exact(y, x) <= of_x).any(1)
    found = balls.inside_each_other(x, y, of_x, of_y)
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    assert np.array_equal(balls.inside(x, y, of_y), expected[0])


def test_a_set_of_copies_lies_in_its_own_balls():
    x = np.ones((50, 8), np.float32) * 0.1
    assert (balls.radii(x, K) == 0).all() and balls.inside(x, x, balls.radii(x, K)).all()


def test_wide_features_are_settled_too(monkeypatch):
    monkeypatch.setattr(balls, "ROWS", 64)
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(300, 512)).astype(np.float32) for _ in range(2))
    of_y = balls.radii(y, K)
    assert of_y == pytest.approx(exact_radii(y), rel=1e-12)
    assert balls.inside(y, y, of_y).all()
    assert np.array_equal(balls.inside(x, y, of_y), (exact(x, y) <= of_y).any(1))
