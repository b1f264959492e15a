"""Conformance measures ADM's sample as ADM does, and says by how much a number misses what was published."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.special import log_softmax

from slimdit.metrics import conformance, inception
from slimdit.metrics.conformance import REFERENCE, SAMPLE, Check
from slimdit.metrics.features import FEATURES, Extractor

from .test_cli import answer, call, sentence

random = np.random.default_rng(4)
POOL, SPATIAL, CLASSES = 6, 4, 5


def small_network(weights=None, device: str = "cpu") -> Extractor:
    """Of three outputs like Inception's, each linear in the pixels."""
    by = [torch.randn(12, width, generator=torch.Generator().manual_seed(width)) / 40
          for width in (POOL, SPATIAL, CLASSES)]
    return Extractor("inception", "small", lambda images: tuple(images.flatten(1) @ part for part in by),
                     weights="none", dither=0, resize="none", device=device)


@pytest.fixture
def folder(tmp_path):
    """A reference batch of 30 images with statistics of 500, and a sample of 41, as ADM lays them out."""
    real = random.integers(0, 256, (500, 2, 2, 3), dtype=np.uint8)
    seen = small_network()(real, range(500))
    np.savez(tmp_path / REFERENCE, real[:30], mu=seen.pool.mean(0), sigma=np.cov(seen.pool, rowvar=False),
             mu_s=seen.spatial.mean(0), sigma_s=np.cov(seen.spatial, rowvar=False))
    np.savez(tmp_path / SAMPLE, random.integers(20, 256, (41, 2, 2, 3), dtype=np.uint8), np.zeros(41, int))
    return tmp_path


@pytest.fixture
def by_hand(folder) -> dict[str, float]:
    """The five metrics straight from their definitions."""
    batch, images = np.load(folder / REFERENCE), np.load(folder / SAMPLE)["arr_0"]
    network = small_network()
    real, made = network(batch["arr_0"], range(30)), network(images, range(41))

    def frechet(x, mu, sigma):
        own = np.cov(x, rowvar=False)
        return ((x.mean(0) - mu) ** 2).sum() + np.trace(own + sigma - 2 * sqrtm(own @ sigma).real)

    def covered(points, members):
        reach = np.sort(cdist(members, members), axis=1)[:, 3]
        return (cdist(points, members) <= reach).any(1).mean()

    log_p = log_softmax(made.logits, 1)
    p = np.exp(log_p)
    return {"inception_score": np.exp((p * (log_p - np.log(p.mean(0)))).sum(1).mean()),
            "fid": frechet(made.pool, batch["mu"], batch["sigma"]),
            "sfid": frechet(made.spatial, batch["mu_s"], batch["sigma_s"]),
            "precision": covered(made.pool, real.pool), "recall": covered(real.pool, made.pool)}


def test_the_metrics_are_those_of_their_definitions(folder, by_hand):
    seen = []
    checks = conformance.conformance(folder, small_network(), published=by_hand, batch=7, progress=seen.append)
    assert [check.metric for check in checks] == ["inception_score", "fid", "sfid", "precision", "recall"]
    for check in checks:
        assert check.found == pytest.approx(check.published, rel=1e-6)
        assert check.holds
    assert 0 < by_hand["precision"] < 1 and 0 < by_hand["recall"] < 1 and by_hand["fid"] > 0.1  # neither is trivial
    assert seen == sorted(seen) and seen[-1] == 71


def test_a_number_too_far_off_says_by_how_much():
    near, far = Check("fid", 3.95, 3.9426, 0.01), Check("fid", 3.9, 3.9426, 0.01)
    assert near.holds and str(near) == "fid is 3.9500, published 3.9426: +0.0074, within 0.01"
    assert not far.holds
    assert str(far) == "fid is 3.9000, published 3.9426: -0.0426, 0.0326 more than the 0.01 allowed"
    assert not Check("fid", float("nan"), 3.9426, 0.01).holds


def test_what_adm_published_is_what_we_compare_with():
    assert {name: round(value, 4) for name, value in conformance.PUBLISHED.items()} == {
        "inception_score": 215.837, "fid": 3.9426, "sfid": 6.1404, "precision": 0.8265, "recall": 0.5309}
    assert conformance.TOLERANCE == {"inception_score": 0.05, "fid": 0.01, "sfid": 0.05, "precision": 0.05,
                                     "recall": 0.05}


def test_the_command_answers_or_ends_with_4(folder, by_hand, monkeypatch):
    (folder / conformance.WEIGHTS[1]).touch()
    monkeypatch.setitem(FEATURES, "inception", small_network)
    said = sentence_beside_numbers(folder)
    assert said.startswith("slimdit: conformance: inception_score is ") and "more than the 0.05 allowed" in said
    for name, value in by_hand.items():
        monkeypatch.setitem(conformance.PUBLISHED, name, value)
    told = answer("evaluate", "--conformance", folder)
    assert told["holds"] and told["misses"] == [] and len(told["checks"]) == 5
    assert told["metrics"] == pytest.approx(by_hand, rel=1e-6)
    assert told["weights"] == str(folder / conformance.WEIGHTS[1])


def sentence_beside_numbers(folder) -> str:
    result = call("evaluate", "--conformance", folder, "--json", code=4)
    assert '"holds": false' in result.stdout
    return result.stderr.splitlines()[-1]


def test_what_is_missing_or_wrong_is_named(folder):
    assert "does not hold Inception's weights: put pt_inception-2015-12-05-6726825d.pth there" in sentence(
        "evaluate", "--conformance", folder)
    (folder / conformance.WEIGHTS[0]).write_bytes(b"something else")
    assert "not 6726825d... of the published weights" in sentence("evaluate", "--conformance", folder)
    assert answer("evaluate", "--conformance", folder, "--dry-run")["sample"] == str(folder / SAMPLE)
    (folder / SAMPLE).unlink()
    assert "download ADM's sample batch" in sentence("evaluate", "--conformance", folder)
    assert "and not both" in sentence("evaluate", "bundled", "--conformance", folder)
    assert "and not both" in sentence("evaluate")


def test_a_reference_batch_without_spatial_statistics_is_refused(folder):
    np.savez(folder / REFERENCE, np.load(folder / REFERENCE)["arr_0"], mu=np.zeros(POOL), sigma=np.eye(POOL))
    with pytest.raises(ValueError, match="no spatial statistics"):
        conformance.conformance(folder, small_network())


def test_only_inception_can_conform(folder):
    narrow = Extractor("lite0", "small", lambda images: (images.flatten(1),), weights="none", dither=0,
                       resize="none", device="cpu")
    with pytest.raises(ValueError, match="conformance is Inception's"):
        conformance.conformance(folder, narrow)


def test_the_weights_have_two_names(tmp_path):
    for name in reversed(conformance.WEIGHTS):
        (tmp_path / name).touch()
        assert conformance.weights_in(tmp_path) == tmp_path / name
        assert name.endswith(f"{inception.SHA256[:8]}.pth")
