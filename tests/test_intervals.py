"""Intervals cover what they should, are repeatable, and say no more than they can."""

import time

import numpy as np
import pytest

from slimdit.metrics.intervals import (
    Interval,
    bootstrap,
    bootstrap_difference,
    bootstrap_mean,
    draws,
    mean_of,
    verdict,
)
from slimdit.metrics.quality import Statistics, frechet, frechet_of, kid_of

random = np.random.default_rng(11)


def test_the_interval_of_a_mean_is_the_textbooks():
    values = random.normal(5, 2, 400)
    found = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.n == 400
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_intervals_of_means_cover_the_truth():
    held = [found.low <= 5 <= found.high for found in
            (bootstrap_mean(random.normal(5, 2, 50), resamples=300, seed=i) for i in range(200))]
    assert 0.88 <= np.mean(held) <= 0.99


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
