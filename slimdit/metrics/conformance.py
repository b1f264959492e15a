"""Whether this machine's numbers are everyone's: ADM's published sample of ImageNet 256 x 256, measured once more.

"Diffusion Models Beat GANs" (Dhariwal and Nichol, arXiv 2105.05233) comes with a reference batch, a sample of 50,000
images, and what their evaluator in TensorFlow says of it. Who has the two files and Inception's weights can check every
step from pixels to numbers: reading, resize, network, the spatial features' order, statistics, distances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import inception, quality
from .adm import read_statistics, sample_blocks
from .features import BATCH, Extractor
from .quality import RunningStatistics, Statistics

REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
SAMPLE = "admnet_guided_upsampled_imagenet256.npz"
WEIGHTS = (Path(inception.URL).name, "weights-inception-2015-12-05-6726825d.pth")  # one file under two names
IMAGES = 60_000  # of the reference batch and the sample together
PUBLISHED: Mapping[str, float] = {"inception_score": 215.8370361328125, "fid": 3.9425574129223264,
                                  "sfid": 6.140433703346162, "precision": 0.8265, "recall": 0.5309}
"""What ADM's evaluator prints for the sample (github.com/openai/guided-diffusion, evaluations/README.md)."""
TOLERANCE: Mapping[str, float] = dict.fromkeys(PUBLISHED, 0.05) | {"fid": 0.01}


@dataclass(frozen=True)
class Check:
    """One metric of the sample beside what was published."""

    metric: str
    found: float
    published: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the two agree."""
        return abs(self.found - self.published) <= self.tolerance

    def __str__(self) -> str:
        apart = self.found - self.published
        return (f"{self.metric} is {self.found:.4f}, published {self.published:.4f}: {apart:+.4f}, "
                + (f"within {self.tolerance:g}" if self.holds
                   else f"{abs(apart) - self.tolerance:.4f} more than the {self.tolerance:g} allowed"))


@dataclass(frozen=True)
class Seen:
    """What the metrics need of a set of images; the spatial features only as statistics."""

    pool: np.ndarray
    logits: np.ndarray
    statistics: Statistics
    spatial: Statistics


def conformance(folder: Path, network: Extractor, *, published: Mapping[str, float] = PUBLISHED, batch: int = BATCH,
                progress: Callable[[int], None] | None = None) -> list[Check]:
    """Measure ADM's sample in `folder` against ADM's reference batch beside it.

    The images are read in parts of `batch`, never all at once. As in ADM's evaluator the distances are to the
    statistics in the reference batch, precision and recall to its images, and the inception score is of parts of 5,000
    images in file order.

    Args:
        network: Inception-v3 with its published weights.
        progress: called with the number of images done, those of the reference first.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: one of the files is not what it should be.
    """
    statistics, spatial = read_statistics(folder / REFERENCE)
    if spatial is None:
        raise ValueError(f"{folder / REFERENCE} holds no spatial statistics (mu_s, sigma_s): it is not ADM's")
    reference = see(folder / REFERENCE, network, batch, progress)
    sample = see(folder / SAMPLE, network, batch, progress and (lambda done: progress(done + len(reference.pool))))
    precision, recall = quality.precision_recall(sample.pool, reference.pool)
    found = {"inception_score": quality.inception_score(sample.logits, shuffle=False)[0],
             "fid": quality.frechet(sample.statistics, statistics),
             "sfid": quality.frechet(sample.spatial, spatial),
             "precision": precision, "recall": recall}
    return [Check(name, found[name], published[name], TOLERANCE[name]) for name in published]


def see(path: Path, network: Extractor, batch: int, progress: Callable[[int], None] | None = None) -> Seen:
    """Take the features of a sample file's images, `batch` at a time."""
    pools, logits, statistics, spatial = [], [], RunningStatistics(), RunningStatistics()
    for features in network.stream(sample_blocks(path, batch)):
        if features.spatial is None or features.logits is None:
            raise ValueError(f"{network.name} has no spatial features or logits: conformance is Inception's")
        statistics.add(features.pool)
        spatial.add(features.spatial)
        pools.append(features.pool.astype(np.float32))  # as the network gave them: a loss of nothing, half the memory
        logits.append(features.logits.astype(np.float32))
        if progress:
            progress(statistics.n)
    return Seen(np.concatenate(pools), np.concatenate(logits), statistics.statistics(), spatial.statistics())


def weights_in(folder: Path) -> Path:
    """Inception's weights in a folder, under either of the names they are published with.

    Raises:
        FileNotFoundError: they are not there.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} does not hold Inception's weights: put {WEIGHTS[0]} there, from "
                            f"{inception.URL}, or name it with --feature-weights")
