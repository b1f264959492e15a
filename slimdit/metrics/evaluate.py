"""Quality in numbers: every metric of a set of images with its interval, and what sets two sets of images apart.

One pass over the images serves all metrics. Distances carry the name of their feature network: those of Inception are
FID, sFID, KID ..., those of any other network are `fd_<network>`, `kid_<network>` ... and never compared with them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from . import METRICS, paired, quality
from .adm import read_samples, read_statistics
from .features import Extractor, Features, Reference, bundled_reference
from .intervals import RESAMPLES, Interval, bootstrap, bootstrap_difference, bootstrap_mean, verdict

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
    options = {"resamples": resamples, "seed": seed}
    found = {metric_name("fd", network): bootstrap(quality.frechet_of(pool, reference.statistics), n, **options)}
    if features.spatial is not None and reference.spatial is not None:
        found["sfid"] = bootstrap(quality.frechet_of(features.spatial, reference.spatial), n, **options)
    if features.logits is not None:
        found["inception_score"] = bootstrap(quality.inception_score_of(features.logits), n, **options)
    if reference.pool is not None:
        found[metric_name("kid", network)] = bootstrap(
            quality.kid_of(pool, reference.pool, reference.mean_kernel), n, **options)
        among = quality.precision(pool, reference.pool)
        found[metric_name("precision", network)] = bootstrap_mean(among, seed=seed)
        covered = quality.recall(pool, reference.pool)
        found[metric_name("recall", network)] = bootstrap_mean(covered, seed=seed)
    if labels is not None and reference.pool is not None and reference.labels is not None \
            and labels.max() < (reference.classes or 0):
        hits = quality.class_accuracy(pool, labels, reference.pool, reference.labels)
        found["class_accuracy"] = bootstrap_mean(hits, seed=seed)
    return found


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
            network: str, *, paired_images: bool = True, margin: Mapping[str, float] | None = None,
            resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """A variant beside its baseline, image by image.

    Args:
        images, base_images: uint8 (n, height, width, channels), equal numbers.
        paired_images: whether images of one place share noise and label (not so for other seeds).
        margin: per metric, the rise that still counts as no loss.

    Raises:
        ValueError: the numbers of images differ: distances of unequal numbers do not compare.
    """
    n = len(images)
    if n != len(base_images):
        raise ValueError(f"{n} images cannot be compared with {len(base_images)}: compare equal numbers only")
    options = {"resamples": resamples, "seed": seed}
    name = metric_name("fd", network)
    found = {f"{name}_difference": bootstrap_difference(
        quality.frechet_of(features.pool, reference.statistics),
        quality.frechet_of(base.pool, reference.statistics), n, **options)}
    if features.spatial is not None and base.spatial is not None and reference.spatial is not None:
        found["sfid_difference"] = bootstrap_difference(
            quality.frechet_of(features.spatial, reference.spatial),
            quality.frechet_of(base.spatial, reference.spatial), n, **options)
    if reference.pool is not None:
        found[f"{metric_name('kid', network)}_difference"] = bootstrap_difference(
            quality.kid_of(features.pool, reference.pool, reference.mean_kernel),
            quality.kid_of(base.pool, reference.pool, reference.mean_kernel), n, **options)
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
