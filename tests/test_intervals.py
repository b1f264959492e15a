"""Intervals cover what they should, are repeatable, and say no more than they can."""

import time

import numpy as np
import pytest

from slimdit.metrics import quality
from slimdit.metrics.intervals import (
    Interval,
    bootstrap,
    bootstrap_difference,
    bootstrap_mean,
    draws,
    mean_of,
    verdict,
)
from slimdit.metrics.quality import Statistics, frechet, frechet_of, kid_of, mean_kernel, recall, recall_of

random = np.random.default_rng(11)


def test_the_interval_of_a_mean_is_the_textbooks():
    values = random.normal(5, 2, 400)
    found = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.n == 400
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


TRIALS = 500


def coverage(trial, truth):
    """The share of trials, each of images of its own, whose 95 % interval holds the truth; and the intervals."""
    found = [trial(np.random.default_rng(seed), seed) for seed in range(TRIALS)]
    return np.mean([interval.low <= truth <= interval.high for interval in found]), found


def test_intervals_of_psnr_cover_the_truth():
    def trial(fresh, seed):  # decibels of images that lost a little, most of them, or much: mean 31.5, skewed
        return bootstrap_mean(fresh.gamma(9, 3.5, 100), resamples=300, seed=seed)

    assert 0.92 <= coverage(trial, 31.5)[0] <= 0.98


def expected_kernel(mean, variance, y):
    """KID's kernel of x ~ N(mean, variance I) with an independent copy, and with each row of y, in expectation."""
    d, second = len(mean), variance * np.eye(len(mean)) + np.outer(mean, mean)
    third = np.einsum("i,j,k", mean, mean, mean) + variance * sum(
        np.einsum(axes, np.eye(d), mean) for axes in ("ij,k->ijk", "ik,j->ijk", "jk,i->ijk"))
    a, v = y @ mean, variance * (y ** 2).sum(1)
    return (1 + 3 * mean @ mean / d + 3 * (second ** 2).sum() / d ** 2 + (third ** 2).sum() / d ** 3,
            1 + 3 * a / d + 3 * (v + a * a) / d ** 2 + (a ** 3 + 3 * a * v) / d ** 3)


def test_intervals_of_kid_cover_the_truth():
    real = np.random.default_rng(1).normal(0, 1, (150, 3))
    among, own = mean_kernel(real), expected_kernel(np.full(3, 0.5), 1, real)

    def trial(fresh, seed):
        return bootstrap(kid_of(fresh.normal(0.5, 1, (200, 3)), real, among), 200, seed=seed)

    assert 0.92 <= coverage(trial, own[0] + among - 2 * own[1].mean())[0] <= 0.98


def pairs(fresh, n):
    """Features of a variant and of its baseline, image by image: N(0.2, 1.09) and N(0, 1)."""
    base = fresh.normal(0, 1, (n, 3))
    return base + 0.3 * fresh.normal(0, 1, (n, 3)) + 0.2, base


def test_intervals_of_paired_kid_differences_cover_the_truth():
    real = np.random.default_rng(1).normal(0, 1, (150, 3))
    among = mean_kernel(real)
    variant, base = expected_kernel(np.full(3, 0.2), 1.09, real), expected_kernel(np.zeros(3), 1, real)

    def trial(fresh, seed):
        one, other = pairs(fresh, 200)
        return bootstrap_difference(kid_of(one, real, among), kid_of(other, real, among), 200, seed=seed)

    truth = variant[0] - base[0] - 2 * (variant[1].mean() - base[1].mean())
    assert 0.92 <= coverage(trial, truth)[0] <= 0.98


VARIANCES = np.array([0.5, 1.0, 2.0])
REFERENCE = Statistics(np.full(3, 0.5), np.diag(VARIANCES))
MOVED = sum(3 * (mean - 0.5) ** 2 * sign + ((np.sqrt(variance) - np.sqrt(VARIANCES)) ** 2).sum() * sign
            for mean, variance, sign in ((0.2, 1.09, 1), (0, 1, -1)))  # how much farther the variant of `pairs` is


def moved(fresh, seed, resamples=100):
    one, other = pairs(fresh, 100)
    return bootstrap_difference(frechet_of(one, REFERENCE), frechet_of(other, REFERENCE), 100, resamples=resamples,
                                seed=seed)


@pytest.mark.slow
def test_intervals_of_paired_frechet_differences_cover_the_truth():
    assert 0.92 <= coverage(moved, MOVED)[0] <= 0.98


def test_the_bias_of_a_frechet_distance_cancels_in_a_paired_difference():
    alone = [bootstrap(frechet_of(pairs(np.random.default_rng(seed), 100)[1], REFERENCE), 100, resamples=40, seed=seed)
             for seed in range(60)]
    paired = [moved(np.random.default_rng(seed), seed, resamples=40) for seed in range(60)]
    stated = np.mean([interval.bias for interval in alone])
    assert stated > 0.04
    assert abs(np.mean([interval.bias for interval in paired])) < stated / 5
    errors = np.array([interval.value for interval in paired]) - MOVED
    assert abs(errors.mean()) < 2 * errors.std() / np.sqrt(len(errors))


def test_the_bias_of_a_frechet_distance_is_stated_and_shrinks_with_more_images():
    reference = Statistics(np.zeros(8), np.eye(8))  # which the images equal: all that is measured is bias
    stated, true = {}, {}
    for n in (100, 400):
        found = [bootstrap(frechet_of(np.random.default_rng(seed).normal(0, 1, (n, 8)), reference), n, resamples=50,
                           seed=seed) for seed in range(40)]
        stated[n], true[n] = (np.mean([getattr(one, name) for one in found]) for name in ("bias", "value"))
        assert stated[n] == pytest.approx(true[n], rel=0.2)
    assert true[100] / true[400] == pytest.approx(4, rel=0.1)


def test_the_same_seed_gives_the_same_interval():
    values = random.random(30)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_draws_are_n_of_n():
    assert (draws(17, 50, 0).sum(1) == 17).all()
    with pytest.raises(ValueError, match="at least 2"):
        draws(1, 5, 0)


def test_frechet_over_resamples_is_frechet_of_the_drawn_images():
    features, reference = random.normal(3, 1, (30, 6)), Statistics.of(random.normal(0, 1, (50, 6)))
    drawn = random.integers(0, 30, 30)
    weights = np.stack([np.ones(30), np.bincount(drawn, minlength=30)]).astype(float)
    found = frechet_of(features, reference)(weights)
    assert found[0] == pytest.approx(frechet(Statistics.of(features), reference), rel=1e-9)
    assert found[1] == pytest.approx(frechet(Statistics.of(features[drawn]), reference), rel=1e-9)


def test_frechet_over_resamples_of_fewer_images_than_features():
    features, reference = random.normal(3, 1, (20, 200)), Statistics.of(random.normal(0, 1, (50, 200)))
    drawn = random.integers(0, 20, 20)
    weights = np.stack([np.ones(20), np.bincount(drawn, minlength=20), 20 * np.eye(20)[0]])
    found = frechet_of(features, reference)(weights)
    assert found[0] == pytest.approx(frechet(Statistics.of(features), reference), rel=1e-7)
    assert found[1] == pytest.approx(frechet(Statistics.of(features[drawn]), reference), rel=1e-7)
    assert found[2] == pytest.approx(frechet(Statistics.of(features[[0] * 20]), reference), rel=1e-7)


def test_the_interval_of_a_biased_distance_holds_its_estimate():
    features, reference = random.normal(0, 1, (60, 20)), Statistics.of(random.normal(0, 1, (2000, 20)))
    metric = frechet_of(features, reference)
    raw = metric(draws(60, 100, 0))
    found = bootstrap(metric, 60)
    assert found.value < np.quantile(raw, 0.025)  # why it is recentred
    assert found.low < found.value < found.high


def test_pairing_narrows_a_difference():
    base = random.normal(0, 1, (300, 8))
    variant = base + 0.1 * random.normal(0, 1, base.shape) + 0.05
    reference = Statistics.of(random.normal(0, 1, (2000, 8)))
    alone = bootstrap(frechet_of(variant, reference), 300)
    paired = bootstrap_difference(frechet_of(variant, reference), frechet_of(base, reference), 300)
    assert paired.high - paired.low < (alone.high - alone.low) / 2
    assert paired.value == pytest.approx(
        frechet(Statistics.of(variant), reference) - frechet(Statistics.of(base), reference), rel=1e-9)


def test_a_variant_that_is_the_baseline_differs_by_nothing():
    metric = mean_of(random.random(20))
    assert bootstrap_difference(metric, metric, 20) == Interval(0, 0, 0, 20)


def test_wide_features_are_resampled_in_float32_and_estimated_in_float64(monkeypatch):
    features, reference = random.normal(0.1, 1, (120, 40)), Statistics.of(random.normal(0, 1, (300, 40)))
    weights = np.concatenate([np.ones((1, 120)), draws(120, 5, 0)])
    plain = frechet_of(features, reference)(weights)
    monkeypatch.setattr(quality, "WIDE", 40)
    quick = frechet_of(features, reference)(weights)
    assert quick[0] == plain[0]
    assert (quick[1:] != plain[1:]).any() and np.allclose(quick, plain, rtol=1e-5)


@pytest.mark.parametrize(("width", "shift"), [(2, 0), (8, 1.5), (30, 0)])
def test_recall_over_resamples_is_recall_of_the_images_drawn(width, shift):
    images, real = random.normal(shift, 1, (150, width)), random.normal(0, 1.3, (200, width))
    images[7] = images[3]  # two that are equal are two images, not copies of one
    weights = np.concatenate([np.ones((1, 150)), draws(150, 20, 0)])
    found = recall_of(images, real)(weights)
    assert list(found) == [pytest.approx(recall(images[row > 0], real).mean()) for row in weights]
    assert len(set(found)) > 5
    with pytest.raises(ValueError, match="no 3-th neighbour"):
        recall_of(images[:3], real)


def test_kid_has_an_interval():
    reference = random.normal(0, 1, (80, 4))
    near, far = (bootstrap(kid_of(random.normal(shift, 1, (80, 4)), reference), 80) for shift in (0, 1))
    assert near.low < 0.2 and far.low > near.high


def test_the_bootstrap_of_2000_images_takes_seconds():
    features, reference = random.normal(0, 1, (2000, 112)), Statistics.of(random.normal(0, 1, (3000, 112)))
    began = time.perf_counter()
    bootstrap(frechet_of(features, reference), 2000, resamples=200)
    assert time.perf_counter() - began < 10


def test_verdicts_of_lower_is_better():
    assert verdict(Interval(0.1, -0.2, 0.4, 100), 0.5, "lower") == "no loss within 0.5"
    assert verdict(Interval(-3, -4, -2, 100), 0, "lower") == "no loss within 0"
    assert verdict(Interval(2, 1, 3, 100), 0.5, "lower") == "loss"


def test_verdicts_of_higher_is_better():
    assert verdict(Interval(-0.1, -0.4, 0.2, 100), 0.5, "higher", "dB") == "no loss within 0.5 dB"
    assert verdict(Interval(-2, -3, -1, 100), 0.5, "higher") == "loss"


def test_undecided_says_how_many_more():
    # The interval reaches 1.0 beyond the estimate and may reach 0.5: twice as narrow needs four times as many.
    assert verdict(Interval(0, -1, 1, 100), 0.5, "lower") == "too few images: 300 more"
    assert verdict(Interval(1, 0, 2, 100), 0.5, "lower") == "too few images: 300 more"
    assert verdict(Interval(0, -1, 1, 100), 0.5, "higher") == "too few images: 300 more"
    assert verdict(Interval(0.5, 0, 1, 100), 0.5, "lower") == "too few images: over 1,000,000 more"


def test_the_number_asked_for_would_decide():
    def interval(n):
        return Interval(0.2, 0.2 - 3 / np.sqrt(n), 0.2 + 3 / np.sqrt(n), n)

    more = int(verdict(interval(30), 0.5, "lower").removeprefix("too few images: ").removesuffix(" more"))
    assert verdict(interval(30 + more), 0.5, "lower") == "no loss within 0.5"
    assert verdict(interval(30 + more // 2), 0.5, "lower").startswith("too few")


def test_verdicts_refuse_nonsense():
    with pytest.raises(ValueError, match="0 or more"):
        verdict(Interval(0, 0, 0, 2), -1, "lower")
    with pytest.raises(ValueError, match="lower or higher"):
        verdict(Interval(0, 0, 0, 2), 1, "bigger")
