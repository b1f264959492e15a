"""Quality in numbers: every metric of a set of images with its interval, and what sets two sets of images apart.

One pass over the images serves all metrics. Distances carry the name of their feature network: those of Inception are
FID, sFID, KID ..., those of any other network are `fd_<network>`, `kid_<network>` ... and never compared with them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ..strict import require
from . import METRICS, paired, quality
from .adm import read_samples, read_statistics
from .balls import inside
from .features import Extractor, Features, Reference, bundled_reference
from .intervals import (
    RESAMPLES,
    Interval,
    Resampled,
    bootstrap,
    bootstrap_difference,
    bootstrap_mean,
    mean_of,
    verdict,
)

NAMES: Mapping[str, str] = {"fd": "fid", "kid": "kid", "precision": "precision", "recall": "recall"}
"""What the metrics are called on Inception features."""


def metric_name(kind: str, network: str) -> str:
    """`fd` on Inception features is `fid`, on another network `fd_<network>`."""
    return NAMES[kind] if network == "inception" else f"{kind}_{network}"


def distributions(features: Features, labels: np.ndarray | None, reference: Reference, network: str, *,
                  resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """The metrics of a set of images against a reference, each with its interval.

    Args:
        features: of the images, (n, d).
        labels: the class each was made for, (n,), or None.
        network: the features' name.

    Raises:
        ValueError: there are too few images, or the reference is of another network.
    """
    pool, n = features.pool, len(features.pool)
    if pool.shape[1] != len(reference.statistics.mu):
        raise ValueError(f"the reference {reference.name} has statistics of {len(reference.statistics.mu)} features, "
                         f"{network} gives {pool.shape[1]}: give a reference of the same network, or its images")
    return {name: bootstrap(metric, n, resamples=resamples, seed=seed)
            for name, metric in over_resamples(features, labels, reference, network).items()}


def over_resamples(features: Features, labels: np.ndarray | None, reference: Reference,
                   network: str) -> dict[str, Resampled]:
    """The metrics that these features, this reference and these labels allow, each over resamples of the images."""
    pool = features.pool
    found = {metric_name("fd", network): quality.frechet_of(pool, reference.statistics)}
    if features.spatial is not None and reference.spatial is not None:
        found["sfid"] = quality.frechet_of(features.spatial, reference.spatial)
    if features.logits is not None:
        found["inception_score"] = quality.inception_score_of(features.logits)
    if reference.pool is not None and reference.radii is not None:
        found[metric_name("kid", network)] = quality.kid_of(pool, reference.pool, reference.mean_kernel)
        among = inside(pool, reference.pool, reference.radii)
        found[metric_name("precision", network)] = mean_of(among)
        found[metric_name("recall", network)] = quality.recall_of(pool, reference.pool)
    if labels is not None and reference.pool is not None and reference.labels is not None \
            and labels.max() < (reference.classes or 0):
        found["class_accuracy"] = mean_of(quality.class_accuracy(pool, labels, reference.pool, reference.labels))
    return found


def conditions(images: int, seed: int | None, labels: np.ndarray | None, reference: Reference,
               network: Extractor) -> dict[str, Any]:
    """What a row was measured under, as `protocol.CONDITIONS` names it; None where it is not known."""
    return {"images": images, "seed": seed,
            "labels": None if labels is None else sha256(labels.astype(np.int64).tobytes()).hexdigest(),
            "reference": f"{reference.name}, sha256 {reference.sha256}",
            "features": f"{network.name}, weights sha256 {network.weights}", "dither": network.dither,
            "resize": network.resize}


@dataclass(frozen=True)
class Comparison:
    """How a variant's images differ from its baseline's.

    Attributes:
        intervals: differences (`<metric>_difference`, variant minus baseline) and, where the images are pairs of one
            noise and label, paired fidelity.
        verdict: on the distance with a margin; empty where the protocol sets none.
    """

    intervals: Mapping[str, Interval] = field(default_factory=dict)
    verdict: str = ""


def compare(images: np.ndarray, features: Features, base_images: np.ndarray, base: Features, reference: Reference,
            network: str, *, labels: np.ndarray | None = None, base_labels: np.ndarray | None = None,
            paired_images: bool = True, margin: Mapping[str, float] | None = None, resamples: int = RESAMPLES,
            seed: int = 0) -> Comparison:
    """A variant beside its baseline, image by image.

    Args:
        images, base_images: uint8 (n, height, width, channels), equal numbers.
        labels, base_labels: the class each image was made for, (n,), where that is known.
        paired_images: whether images of one place share noise and label (not so for other seeds).
        margin: per metric, the rise that still counts as no loss.

    Raises:
        Refused: the numbers of images differ, whose distances have different biases, or the labels of pairs do.
    """
    n, name = len(images), metric_name("fd", network)
    require(n == len(base_images), f"{n} images cannot be compared with {len(base_images)}: compare equal numbers only")
    require(not paired_images or labels is None or base_labels is None or np.array_equal(labels, base_labels),
            "images of one place were made for different labels: compare sets of the same seed and labels")
    ours = over_resamples(features, labels, reference, network)
    theirs = over_resamples(base, base_labels, reference, network)
    found = {f"{metric}_difference": bootstrap_difference(ours[metric], theirs[metric], n, resamples=resamples,
                                                          seed=seed)
             for metric in ours if metric in theirs}
    if paired_images:
        found["psnr"] = bootstrap_mean(paired.psnr(images, base_images), seed=seed)
        if min(images.shape[1:3]) >= paired.WINDOW:
            found["ssim"] = bootstrap_mean(paired.ssim(images, base_images), seed=seed)
        found["feature_distance"] = bootstrap_mean(paired.feature_distance(features.pool, base.pool), seed=seed)
    allowed = (margin or {}).get(name)
    said = "" if allowed is None else verdict(found[f"{name}_difference"], allowed, METRICS[name].better)
    return Comparison(found, said)


def open_reference(source: str, network: Extractor) -> Reference:
    """The real images to measure against: `"bundled"`, or an `.npz` of images, of statistics, or of both (ADM's).

    Raises:
        ValueError: the source is none of these, or the bundled reference is of another network.
    """
    if source == "bundled":
        if network.name != "lite0":
            raise ValueError(f"the bundled reference holds lite0 features, not {network.name}: give --reference an "
                             ".npz of statistics or of real images")
        return bundled_reference()
    path = Path(source)
    if path.suffix != ".npz" or not path.is_file():
        raise ValueError(f"reference {source!r} is neither 'bundled' nor an .npz file of statistics or images")
    held = arrays_in(path)
    reference = None
    if "arr_0" in held:
        images, labels = read_samples(path)
        reference = Reference.from_images(images, network, path.name, labels=labels)
    if "mu" in held and (reference is None or network.name == "inception"):
        # ADM's reference batches hold 10,000 images, for precision and recall, and the statistics of the whole set.
        statistics, spatial = read_statistics(path)
        reference = (Reference(None, None, statistics, path.name, network.name, spatial) if reference is None
                     else replace(reference, statistics=statistics, spatial=spatial))
    if reference is None:
        raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma): it is no reference")
    return reference


def arrays_in(path: Path) -> set[str]:
    """The names of the arrays in an `.npz`, none where it is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()
