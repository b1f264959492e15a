"""How long intervals take: 200 resamples of every quality metric, and of the paired difference of the dearest.

    python -m benchmarks.bootstrap

`seconds` is from features to interval, `limit_s` what was asked for; random features, which cost what real ones do.
The reference's own part, which is computed once for all rows, is not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slimdit.metrics import balls, quality
from slimdit.metrics.intervals import Resampled, bootstrap, bootstrap_difference, mean_of

from .result import settle, show

LIMITS: Mapping[tuple[int, int], float] = {(2_000, 112): 10.0, (10_000, 2048): 120.0}
"""Seconds on two cores, by images and features."""
CLASSES = 1008  # of Inception's logits


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the bootstrap of every quality metric.")
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--sizes", nargs="+", default=[f"{n}x{d}" for n, d in LIMITS], help="images x features")
    options = parser.parse_args()
    show("bootstrap", [row for size in options.sizes for row in measure(*map(int, size.split("x")), options.resamples)])


def measure(n: int, width: int, resamples: int) -> list[dict[str, Any]]:
    """Time each metric of n images with so many features."""
    random = np.random.default_rng(0)
    scale = np.exp(-np.linspace(0, 4, width))  # networks' features vary far more in some directions than in others
    real, images, others = (random.normal(shift, 1, (n, width)) * scale for shift in (0, 0.02, 0.03))
    logits, labels = random.normal(0, 2, (n, CLASSES)), random.integers(0, 10, n)
    statistics, among, reach = quality.Statistics.of(real), quality.mean_kernel(real), balls.radii(real, 3)
    metrics: dict[str, Callable[[np.ndarray], Resampled]] = {
        "frechet": lambda x: quality.frechet_of(x, statistics),
        "kid": lambda x: quality.kid_of(x, real, among),
        "precision": lambda x: mean_of(balls.inside(x, real, reach)),
        "recall": lambda x: quality.recall_of(x, real),
        "inception_score": lambda x: quality.inception_score_of(logits),
        "class_accuracy": lambda x: mean_of(quality.class_accuracy(x, labels, real, labels)),
    }
    rows = [timed(name, n, width, resamples, lambda of=of: bootstrap(of(images), n, resamples=resamples))
            for name, of in metrics.items()]
    frechet = metrics["frechet"]
    return [*rows, timed("frechet, paired difference", n, width, resamples, lambda: bootstrap_difference(
        frechet(images), frechet(others), n, resamples=resamples))]


def timed(name: str, n: int, width: int, resamples: int, run: Callable[[], Any]) -> dict[str, Any]:
    """One row."""
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    limit = LIMITS.get((n, width))
    return {"metric": name, "images": n, "features": width, "resamples": resamples, "seconds": float(f"{seconds:.3g}"),
            **({"limit_s": limit, "within": seconds <= limit} if limit else {})}


if __name__ == "__main__":
    settle()
    main()
