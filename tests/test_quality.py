"""Quality metrics have the properties and the values of their definitions."""

import numpy as np
import pytest

from slimdit.metrics import quality
from slimdit.metrics.quality import RunningStatistics, Statistics

random = np.random.default_rng(7)


def gaussian(n: int, d: int = 5, shift: float = 0.0) -> np.ndarray:
    return random.standard_normal((n, d)) * np.arange(1, d + 1) + shift


def test_statistics_are_numpys():
    features = gaussian(40)
    found = Statistics.of(features)
    assert np.allclose(found.mu, features.mean(0), rtol=1e-12)
    assert np.allclose(found.sigma, np.cov(features, rowvar=False), rtol=1e-12)
    assert found.n == 40


def test_merged_statistics_are_those_of_all_images():
    features = gaussian(50, shift=3)
    merged = Statistics.of(features[:7]).merge(Statistics.of(features[7:20])).merge(Statistics.of(features[20:]))
    whole = Statistics.of(features)
    assert merged.n == 50
    assert np.allclose(merged.mu, whole.mu, rtol=1e-12)
    assert np.allclose(merged.sigma, whole.sigma, rtol=1e-12, atol=1e-12)


def test_running_statistics_are_those_of_all_images():
    features = gaussian(50, shift=1e4)  # far from 0, where sums of squares would cancel
    running = RunningStatistics()
    for part in (features[:1], features[1:20], features[20:]):
        running.add(part)
    found, whole = running.statistics(), Statistics.of(features)
    assert found.n == 50
    assert np.allclose(found.mu, whole.mu, rtol=1e-12)
    assert np.allclose(found.sigma, whole.sigma, rtol=1e-9, atol=1e-9)


def test_running_statistics_refuse_what_has_none():
    running = RunningStatistics()
    running.add(gaussian(1))
    with pytest.raises(ValueError, match="features of 1 images have no covariance"):
        running.statistics()
    with pytest.raises(ValueError, match="not finite"):
        running.add(np.full((2, 5), np.inf))


def test_statistics_refuse_what_has_none():
    with pytest.raises(ValueError, match="no covariance"):
        Statistics.of(gaussian(1))
    with pytest.raises(ValueError, match="not finite"):
        Statistics.of(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="without a number of images"):
        Statistics(np.zeros(2), np.eye(2)).merge(Statistics(np.zeros(2), np.eye(2), 5))


def test_kid_is_the_double_sum_of_its_definition():
    x, y = gaussian(9), gaussian(12, shift=1)

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    among_x = np.mean([k(x[i], x[j]) for i in range(9) for j in range(9) if i != j])
    among_y = np.mean([k(y[i], y[j]) for i in range(12) for j in range(12) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert quality.kid(x, y) == pytest.approx(among_x + among_y - 2 * between, rel=1e-9)


def test_kid_of_the_same_distribution_is_near_zero_on_both_sides():
    values = [quality.kid(gaussian(60), gaussian(60)) for _ in range(40)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_kid_over_resamples_leaves_out_copies():
    x, y = gaussian(8), gaussian(10)
    drawn = np.array([0, 0, 1, 3, 3, 3, 5, 7])

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    pairs = [(i, j) for i in drawn for j in drawn if i != j]
    expected = (np.mean([k(x[i], x[j]) for i, j in pairs])
                + np.mean([k(y[i], y[j]) for i in range(10) for j in range(10) if i != j])
                - 2 * np.mean([k(x[i], b) for i in drawn for b in y]))
    weights = np.bincount(drawn, minlength=8)[None].astype(float)
    assert quality.kid_of(x, y)(weights)[0] == pytest.approx(expected, rel=1e-9)


def test_blocks_change_nothing(monkeypatch):
    x, y = gaussian(30), gaussian(25, shift=1)
    labels, classes = random.integers(0, 3, 30), random.integers(0, 3, 25)
    before = (quality.kid(x, y), quality.precision_recall(x, y), list(quality.class_accuracy(x, labels, y, classes)))
    monkeypatch.setattr("slimdit.metrics.balls.ROWS", 7)
    after = (quality.kid(x, y), quality.precision_recall(x, y), list(quality.class_accuracy(x, labels, y, classes)))
    assert after[0] == pytest.approx(before[0], rel=1e-9)
    assert after[1:] == before[1:]


def test_precision_and_recall_by_hand():
    # k = 1 on a line: the reference's balls are 1 wide around 0 and 1, and 9 wide around 10.
    reference = np.array([[0.0], [1.0], [10.0]])
    images = np.array([[-0.9], [-1.5], [5.0], [18.5], [19.5]])
    assert list(quality.precision(images, reference, k=1)) == [True, False, True, True, False]
    # Balls of the images: 0.6 around -0.9 and -1.5, 5.9 around 5, 1 around 18.5 and 19.5.
    assert list(quality.recall(images, reference, k=1)) == [True, True, True]
    assert list(quality.recall(images[[0, 1, 3, 4]], reference, k=1)) == [False, False, False]


def test_precision_falls_with_bad_images_and_recall_with_few_modes():
    reference = np.concatenate([gaussian(100), gaussian(100, shift=100)])
    bad = gaussian(200, shift=-500)
    one_mode = gaussian(200)
    assert quality.precision_recall(bad, reference) == (0, 0)
    precision, recall = quality.precision_recall(one_mode, reference)
    assert precision > 0.7
    assert recall <= 0.5


def test_precision_refuses_too_few_images():
    with pytest.raises(ValueError, match="no 3-th neighbour"):
        quality.precision(gaussian(5), gaussian(3))


def test_inception_score_is_the_number_of_equally_likely_certain_classes():
    logits = np.kron(np.eye(4), np.ones((25, 1))) * 100.0
    assert quality.inception_score(logits) == (pytest.approx(4, rel=1e-9), 0)
    assert quality.inception_score(np.zeros((10, 4)))[0] == pytest.approx(1, rel=1e-12)


def test_inception_score_shuffles_sorted_images():
    logits = np.kron(np.eye(4), np.ones((100, 1))) * 100.0
    score, spread = quality.inception_score(logits, splits=4)
    assert score > 3.8  # in file order, every split of one class would score 1
    assert 0 < spread < 0.1
    assert quality.inception_score(logits, splits=4) == (score, spread)


def test_inception_score_is_of_parts_of_5000_images():
    # Two classes, certain: a part of one class scores 1, a part of both scores 2.
    logits = np.kron(np.eye(2), np.ones((5000, 1))) * 100.0
    assert quality.inception_score(logits, shuffle=False) == (pytest.approx(1, rel=1e-9), 0)
    assert quality.inception_score(logits)[0] == pytest.approx(2, rel=1e-3)
    assert quality.inception_score(logits[:9999], shuffle=False)[0] == pytest.approx(2, rel=1e-6)


def test_inception_score_over_resamples_is_the_inception_score():
    logits = random.standard_normal((10_000, 3)) * 3
    score = quality.inception_score_of(logits)
    assert score(np.ones((1, 10_000)))[0] == pytest.approx(quality.inception_score(logits)[0], rel=1e-12)
    weights = random.multinomial(10_000, np.full(10_000, 1e-4), size=2).astype(float)
    one, other = score(weights)
    assert one != other and abs(one - other) < 0.2
    assert score(weights[1:])[0] == pytest.approx(other, rel=1e-12)


def test_class_accuracy_is_the_neighbours_vote():
    reference = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    classes = np.array([0, 0, 0, 1, 1, 1])
    images = np.array([[0.05], [5.05], [5.05]])
    hits = quality.class_accuracy(images, np.array([0, 1, 0]), reference, classes)
    assert list(hits) == [True, True, False]


def test_class_accuracy_breaks_ties_by_nearness():
    reference = np.array([[0.0], [0.2], [1.0], [1.2]])
    classes = np.array([1, 1, 0, 0])
    assert quality.class_accuracy(np.array([[0.4]]), np.array([1]), reference, classes, k=4)[0]
    assert quality.class_accuracy(np.array([[0.8]]), np.array([0]), reference, classes, k=4)[0]


def test_class_accuracy_refuses_missing_labels():
    with pytest.raises(ValueError, match="one label per image"):
        quality.class_accuracy(gaussian(3), np.zeros(2), gaussian(9), np.zeros(9, int))
    with pytest.raises(ValueError, match="too few for 5 neighbours"):
        quality.class_accuracy(gaussian(3), np.zeros(3), gaussian(4), np.zeros(4, int))
