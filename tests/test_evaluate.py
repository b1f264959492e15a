"""Evaluation: every metric with its interval, named after its features, and only like compared with like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slimdit.context import Refused
from slimdit.metrics import METRICS
from slimdit.metrics.adm import write_samples, write_statistics
from slimdit.metrics.evaluate import compare, conditions, distributions, metric_name, open_reference
from slimdit.metrics.features import Features, Reference, bundled_images, extractor
from slimdit.metrics.quality import Statistics
from slimdit.protocol import CONDITIONS, unlike

rng = np.random.default_rng(0)
REAL = rng.normal(size=(300, 6))


def reference(**changes: object) -> Reference:
    values = {"pool": REAL, "labels": np.arange(300) % 3, "statistics": Statistics.of(REAL), "name": "made up",
              "features": "lite0", "spatial": None}
    return Reference(**{**values, **changes})


def pictures(n: int = 40, size: int = 16) -> np.ndarray:
    return rng.integers(0, 256, (n, size, size, 1), dtype=np.uint8)


def test_names_say_which_features() -> None:
    assert metric_name("fd", "inception") == "fid" and metric_name("fd", "lite0") == "fd_lite0"
    assert all(metric_name(kind, network) in METRICS for kind in ("fd", "kid", "precision", "recall")
               for network in ("inception", "lite0"))


def test_every_metric_has_its_interval_and_n() -> None:
    features = Features(rng.normal(size=(80, 6)))
    found = distributions(features, np.arange(80) % 3, reference(), "lite0", resamples=50)
    assert set(found) == {"fd_lite0", "kid_lite0", "precision_lite0", "recall_lite0", "class_accuracy"}
    for interval in found.values():
        assert interval.low <= interval.value <= interval.high
    assert found["fd_lite0"].n == 80


def test_inception_features_give_fid_sfid_and_score() -> None:
    features = Features(rng.normal(size=(60, 6)), rng.normal(size=(60, 5)), rng.normal(size=(60, 4)))
    target = reference(spatial=Statistics.of(rng.normal(size=(300, 5))), features="inception")
    found = distributions(features, None, target, "inception", resamples=20)
    assert {"fid", "sfid", "inception_score", "kid", "precision", "recall"} == set(found)


def test_statistics_alone_still_give_the_distance() -> None:
    target = reference(pool=None, labels=None)
    found = distributions(Features(rng.normal(size=(40, 6))), np.zeros(40, int), target, "lite0", resamples=20)
    assert set(found) == {"fd_lite0"}


def test_a_shifted_variant_is_a_loss_and_the_same_is_none() -> None:
    base = rng.normal(size=(200, 6))
    images = pictures(200)
    margin = {"fd_lite0": 0.5}
    same = compare(images, Features(base), images, Features(base), reference(), "lite0", margin=margin, resamples=50)
    assert same.verdict == "no loss within 0.5" and same.intervals["fd_lite0_difference"].value == 0
    assert same.intervals["psnr"].value == 100 and same.intervals["ssim"].value == pytest.approx(1)
    moved = Features(base + 2)
    worse = compare(images, moved, images, Features(base), reference(), "lite0", margin=margin, resamples=50)
    assert worse.verdict == "loss" and worse.intervals["fd_lite0_difference"].low > 0.5


def test_other_seeds_are_not_called_pairs() -> None:
    found = compare(pictures(), Features(REAL[:40]), pictures(), Features(REAL[40:80]), reference(), "lite0",
                    paired_images=False, resamples=20)
    assert "psnr" not in found.intervals and "feature_distance" not in found.intervals and found.verdict == ""


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(Refused, match="compare equal numbers only"):
        compare(pictures(4), Features(REAL[:4]), pictures(5), Features(REAL[:5]), reference(), "lite0")


def test_pairs_of_unequal_labels_are_refused() -> None:
    sides = (pictures(8), Features(REAL[:8]), pictures(8), Features(REAL[8:16]), reference(), "lite0")
    labels = np.arange(8) % 3
    with pytest.raises(Refused, match="different labels"):
        compare(*sides, labels=labels, base_labels=labels[::-1], resamples=20)
    assert "class_accuracy_difference" in compare(*sides, labels=labels, base_labels=labels, resamples=20).intervals
    compare(*sides, labels=labels, base_labels=labels[::-1], paired_images=False, resamples=20)


def test_every_metric_of_inception_has_its_difference() -> None:
    one, other = (Features(rng.normal(size=(30, 6)), rng.normal(size=(30, 5)), rng.normal(size=(30, 4)))
                  for _ in range(2))
    target = reference(spatial=Statistics.of(rng.normal(size=(300, 5))), features="inception")
    found = compare(pictures(30), one, pictures(30), other, target, "inception", resamples=20).intervals
    measured = ("fid", "sfid", "inception_score", "kid", "precision", "recall")
    assert {f"{name}_difference" for name in measured} <= set(found)


def test_conditions_name_labels_reference_and_network() -> None:
    network, labels = extractor("lite0"), np.arange(8)
    one = conditions(8, 0, labels, reference(), network)
    assert set(one) == set(CONDITIONS) and one["dither"] == 8 and "bilinear" in one["resize"]
    assert unlike(one, conditions(8, 0, labels, reference(), network)) == []
    assert unlike(one, conditions(8, 0, None, reference(), network)) == []  # what is not known is not refused
    assert [said.partition(" ")[0] for said in unlike(one, conditions(9, 1, labels[::-1], reference(
        statistics=Statistics.of(REAL + 1)), network))] == ["images", "seed", "labels", "reference"]


def test_references_of_the_user(tmp_path: Path) -> None:
    network = extractor("lite0")
    images, labels = bundled_images()
    write_samples(tmp_path / "images.npz", images[:50], labels[:50])
    from_images = open_reference(str(tmp_path / "images.npz"), network)
    write_statistics(tmp_path / "statistics.npz", from_images.statistics)
    from_statistics = open_reference(str(tmp_path / "statistics.npz"), network)
    assert np.allclose(from_statistics.statistics.sigma, from_images.statistics.sigma)
    assert from_statistics.pool is None and from_images.classes == 10
    assert open_reference("bundled", network).statistics.n == 10_000
    with np.load(tmp_path / "images.npz") as one, np.load(tmp_path / "statistics.npz") as two:
        np.savez(tmp_path / "both.npz", **one, **two)
    both = open_reference(str(tmp_path / "both.npz"), network)
    assert both.pool is not None and np.allclose(both.statistics.mu, from_images.statistics.mu)
    with pytest.raises(ValueError, match="give a reference of the same network"):
        distributions(Features(rng.normal(size=(20, 5))), None, from_statistics, "lite0")
    with pytest.raises(ValueError, match="neither 'bundled' nor an"):
        open_reference("nowhere", network)
