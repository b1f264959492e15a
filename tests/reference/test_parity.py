"""The metrics are those of torch-fidelity and torchmetrics on the same stored features or images, to 1e-4 of each.

scikit-image's opinion on PSNR and SSIM is in `tests/test_paired.py`.
"""

import numpy as np
import pytest
import torch

from slimdit.metrics import paired, quality
from slimdit.metrics.features import bundled_images, bundled_reference
from slimdit.metrics.quality import RunningStatistics, Statistics

from .fidelity import torch_fidelity

RELATIVE = 1e-4
N = 1500


class Stored(torch.nn.Module):
    """Features in the place of images, for metrics that want to compute them."""

    num_features = 112

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    """What the bundled network sees in real images, (1500, 112)."""
    return bundled_reference().pool[:N].astype(np.float64)


@pytest.fixture(scope="module")
def made(real) -> np.ndarray:
    """What it sees in 1500 others, nearer to their mean and a little off: like a model's."""
    other = bundled_reference().pool[N:2 * N].astype(np.float64)
    return 0.9 * other + 0.1 * other.mean(0) + 0.05 * other.std(0)


@pytest.fixture(scope="module")
def logits(real) -> np.ndarray:
    """Of 100 classes, sure of some and unsure of others."""
    return real @ np.random.default_rng(0).standard_normal((112, 100)) / 4


def test_fid_is_torch_fidelitys(real, made):
    theirs = torch_fidelity("metric_fid")
    statistics = [theirs.fid_features_to_statistics(torch.from_numpy(features)) for features in (real, made)]
    expected = theirs.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert expected > 1
    assert quality.frechet(Statistics.of(made), Statistics.of(real)) == pytest.approx(expected, rel=RELATIVE)


def test_fid_is_torchmetrics_part_by_part(real, made):
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Stored()).set_dtype(torch.float64)
    ours = {True: RunningStatistics(), False: RunningStatistics()}
    for features, is_real in ((real, True), (made, False)):
        for part in np.array_split(features, 7):
            metric.update(torch.from_numpy(part), real=is_real)
            ours[is_real].add(part)
    found = quality.frechet(ours[False].statistics(), ours[True].statistics())
    assert found == pytest.approx(metric.compute().item(), rel=RELATIVE)


def test_kid_is_torch_fidelitys(real, made):
    expected = torch_fidelity("metric_kid").kid_features_to_metric(
        torch.from_numpy(made), torch.from_numpy(real), kid_subsets=1, kid_subset_size=N, verbose=False)
    assert quality.kid(made, real) == pytest.approx(expected["kernel_inception_distance_mean"], rel=RELATIVE)


def test_kid_is_torchmetrics(real, made):
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(feature=Stored(), subsets=1, subset_size=N).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(made), real=False)
    assert quality.kid(made, real) == pytest.approx(metric.compute()[0].item(), rel=RELATIVE)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_are_torch_fidelitys(real, made, k):
    expected = torch_fidelity("metric_prc").prc_features_to_metric(
        torch.from_numpy(made), torch.from_numpy(real[:1000]), prc_neighborhood=k, verbose=False)
    found = quality.precision_recall(made, real[:1000], k)
    assert 0.3 < expected["recall"] < expected["precision"] < 0.99  # neither is trivial, nor are they the same
    assert found == pytest.approx((expected["precision"], expected["recall"]), rel=RELATIVE)


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score_is_torch_fidelitys(logits, splits):
    expected = torch_fidelity("metric_isc").isc_features_to_metric(torch.from_numpy(logits), splits, shuffle=False)
    found = quality.inception_score(logits, splits=splits, shuffle=False)
    assert expected["inception_score_mean"] > 2
    assert found == pytest.approx((expected["inception_score_mean"], expected["inception_score_std"]), rel=RELATIVE)


def test_inception_score_is_torchmetrics(logits):
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(feature=Stored(), splits=1).set_dtype(torch.float64)
    metric.update(torch.from_numpy(logits))
    assert quality.inception_score(logits)[0] == pytest.approx(metric.compute()[0].item(), rel=RELATIVE)


def test_psnr_and_ssim_are_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    images = bundled_images()[0][:20]
    noise = np.random.default_rng(1).normal(0, 9, images.shape)
    changed = np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)
    a, b = (torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2) for x in (changed, images))
    ratio = peak_signal_noise_ratio(a, b, data_range=255.0, reduction="none", dim=(1, 2, 3))
    assert paired.psnr(changed, images) == pytest.approx(ratio.numpy(), rel=RELATIVE)
    # Its own mean takes in a border of mirrored pixels; the original's is of whole windows, as is scikit-image's.
    _, similarity = structural_similarity_index_measure(a, b, data_range=255.0, return_full_image=True)
    whole = similarity[:, :, 5:-5, 5:-5].mean((1, 2, 3))
    assert paired.ssim(changed, images) == pytest.approx(whole.numpy(), rel=RELATIVE)
