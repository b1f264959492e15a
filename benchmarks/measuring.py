"""How fast quality is measured, against torch-fidelity, torchmetrics, scikit-image and scipy on the same work.

    python -m benchmarks.measuring

`ratio` is how many times faster slimdit (b) is than the other (a), on the same images or stored features, whose numbers
agree to 1e-4 (`tests/reference/`). Features and weights are random; the widths are Inception's. `streaming` is not a
timing: it is the memory that the Fréchet statistics of a sample file take at their most, for a file and for one of four
times as many images. The size of the matrices for `frechet` is fixed: it is what everyone computes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import nn

from slimdit.metrics import inception, paired, quality
from slimdit.metrics.adm import sample_blocks
from slimdit.metrics.features import Extractor
from slimdit.metrics.quality import RunningStatistics, Statistics
from slimdit.metrics.speed import peak_memory, resident_bytes
from tests.reference.fidelity import load

from .result import compare, settle, show

Way = tuple[str, Callable[[], Any], Callable[[], Any]]
"""Whom slimdit is compared with, their call and ours."""

random = np.random.default_rng(0)


class Stored(nn.Module):
    """Features in the place of images, for metrics that want to compute them."""

    num_features = inception.POOL

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """What is given."""
        return features


def features(images: int, width: int = inception.POOL) -> np.ndarray:
    """Like pooled activations: not negative, correlated, of falling size; float32 as a network gives them."""
    mixing = random.standard_normal((width, width)) * np.geomspace(1, 0.01, width)[:, None] / width ** 0.5
    return np.maximum(random.standard_normal((images, width)) @ mixing, 0).astype(np.float32)


def of_inception(count: int) -> Iterator[Way]:
    network = inception.InceptionV3().eval().requires_grad_(False)
    ours = Extractor("inception", "random weights", network, weights="random", dither=0, resize="as TensorFlow 1",
                     device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder, "inception.pth"))
        theirs = load("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=f"{folder}/inception.pth")
    images = random.integers(0, 256, (16, 256, 256, 3), dtype=np.uint8)
    as_theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
    yield "torch-fidelity", lambda: theirs(as_theirs), lambda: ours(images, range(len(images)))


def of_statistics(count: int) -> Iterator[Way]:
    from torchmetrics.image.fid import FrechetInceptionDistance

    parts = np.array_split(features(count), count // 64)

    def theirs() -> None:
        metric = FrechetInceptionDistance(feature=Stored()).set_dtype(torch.float64)
        for part in parts:
            metric.update(torch.from_numpy(part), real=True)

    def ours() -> None:
        running = RunningStatistics()
        for part in parts:
            running.add(part)

    yield "torchmetrics", theirs, ours


def of_frechet(count: int) -> Iterator[Way]:
    theirs = load("metric_fid")
    a, b = (Statistics.of(features(2 * inception.POOL)) for _ in range(2))
    plain = [{"mu": side.mu, "sigma": side.sigma} for side in (a, b)]
    yield "scipy.linalg.sqrtm", lambda: np.trace(sqrtm(a.sigma @ b.sigma)).real, lambda: quality.frechet(a, b)
    yield "torch-fidelity", lambda: theirs.fid_statistics_to_metric(*plain, False), lambda: quality.frechet(a, b)


def of_kid(count: int) -> Iterator[Way]:
    kid, x, y = load("metric_kid").kid_features_to_metric, features(count), features(count)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    yield ("torch-fidelity", lambda: kid(*tensors, kid_subsets=1, kid_subset_size=count, verbose=False),
           lambda: quality.kid(x, y))


def of_precision(count: int) -> Iterator[Way]:
    both, x, y = load("metric_prc").prc_features_to_metric, features(count), features(count)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    yield "torch-fidelity", lambda: both(*tensors, verbose=False), lambda: quality.precision_recall(x, y)


def of_inception_score(count: int) -> Iterator[Way]:
    score, logits = load("metric_isc").isc_features_to_metric, features(count, inception.CLASSES)
    yield ("torch-fidelity", lambda: score(torch.from_numpy(logits), 1),
           lambda: quality.inception_score(logits, splits=1))


def of_pairs(count: int) -> Iterator[Way]:
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (random.integers(0, 256, (16, 128, 128, 3), dtype=np.uint8) for _ in range(2))

    def scikit_image() -> list[float]:
        return [structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                      data_range=255, channel_axis=-1) for x, y in zip(a, b)]

    def torchmetrics() -> torch.Tensor:
        x, y = (torch.from_numpy(side).permute(0, 3, 1, 2).double() for side in (a, b))
        return structural_similarity_index_measure(x, y, data_range=255.0, reduction="none")

    yield "scikit-image", scikit_image, lambda: paired.ssim(a, b)
    yield "torchmetrics", torchmetrics, lambda: paired.ssim(a, b)


WORK: dict[str, Callable[[int], Iterator[Way]]] = {
    "inception": of_inception, "statistics": of_statistics, "frechet": of_frechet, "kid": of_kid,
    "precision and recall": of_precision, "inception score": of_inception_score, "ssim": of_pairs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the measuring of quality against its peers.")
    parser.add_argument("--work", nargs="+", choices=[*WORK, "streaming"], default=[*WORK, "streaming"])
    parser.add_argument("--images", type=int, default=4000, help="images of the stored features")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(streamed(options.measure)))
        return
    rows = [{"work": name, "against": peer, **compare(theirs, ours, options.rounds)}
            for name in options.work if name in WORK for peer, theirs, ours in inference(WORK[name](options.images))]
    if "streaming" in options.work:
        rows += [{"work": "streaming", "images": images, "peak_bytes": fresh(images)} for images in (2000, 8000)]
    show("measuring", rows)


def inference(ways: Iterator[Way]) -> Iterator[Way]:
    """The same, with calls that keep no gradients."""
    for peer, theirs, ours in ways:
        yield peer, torch.inference_mode()(theirs), torch.inference_mode()(ours)


def fresh(images: int) -> int:
    """The peak of a process of its own that takes the statistics of a file of so many images of 64 x 64."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sample.npz")
        np.savez(path, random.integers(0, 256, (images, 64, 64, 3), dtype=np.uint8))
        command = [sys.executable, "-m", "benchmarks.measuring", "--measure", str(path)]
        return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def streamed(path: Path) -> int:
    """Bytes that reading a sample file and gathering 972-d statistics of it take at their most.

    The network is a pooling on a grid: what is asked is what the images and the features take.
    """
    def grid(images: torch.Tensor) -> tuple[torch.Tensor]:
        return (nn.functional.adaptive_avg_pool2d(images, 18).flatten(1),)

    network = Extractor("grid", "means on a grid", grid, weights="none", dither=0, resize="none", device="cpu")
    running = RunningStatistics()
    blocks = network.stream(sample_blocks(path, 64))
    running.add(next(blocks).pool)  # what is imported and reserved on first use
    with peak_memory(starting_bytes=resident_bytes()) as peak:
        for seen in blocks:
            running.add(seen.pool)
        running.statistics()
    return peak.bytes


if __name__ == "__main__":
    settle()
    main()
