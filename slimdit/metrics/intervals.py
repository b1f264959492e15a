"""How sure a number is: bootstrap intervals over images, paired differences, and what they allow to say.

Efron's percentile bootstrap, recentred: a resample repeats images, which biases distances such as Fréchet's upwards
much as small sets do, so the quantiles are moved by (estimate - median of resamples). The interval then always holds
the estimate; it says how the number would vary over other images of as many. What the number is off by at this many,
it does not correct but state (`Interval.bias`): the mean of the resamples less the estimate. Two sets of equal size are
off by nearly the same, so that their paired difference is not: its bias is near 0.
The reference set is taken as given: it is not resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..sampling.seeds import seeded

RESAMPLES = 200
LEVEL = 0.95
MOST = 1_000_000  # more images than anyone would sample to decide

Resampled = Callable[[np.ndarray], np.ndarray]
"""How often each image is drawn, (resamples, n), to the metric of every resample, (resamples,): `quality.*_of`."""


@dataclass(frozen=True)
class Interval:
    """A number and what it might have been over other images: `low` to `high` at `level`, from `n` images.

    Attributes:
        bias: what the number is expected to be too high by because there are only n images, by the bootstrap.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = LEVEL
    bias: float = 0.0


def bootstrap(metric: Resampled, n: int, *, resamples: int = RESAMPLES, level: float = LEVEL,
              seed: int = 0) -> Interval:
    """A metric of n images with its interval.

    Raises:
        ValueError: there are fewer than 2 images.
    """
    value, *values = metric(np.concatenate([np.ones((1, n)), draws(n, resamples, seed)]))
    return recentred(value, np.array(values), n, level)


def bootstrap_difference(variant: Resampled, baseline: Resampled, n: int, *, resamples: int = RESAMPLES,
                         level: float = LEVEL, seed: int = 0) -> Interval:
    """Variant minus baseline over the same n image ids: both sides draw the same images in every resample.

    Raises:
        ValueError: there are fewer than 2 images.
    """
    return bootstrap(lambda weights: variant(weights) - baseline(weights), n, resamples=resamples, level=level,
                     seed=seed)


def bootstrap_mean(values: np.ndarray, *, resamples: int = 2000, level: float = LEVEL, seed: int = 0) -> Interval:
    """The mean of one number per image (n,), such as SSIM or a hit of class accuracy, with its interval."""
    return bootstrap(mean_of(values), len(values), resamples=resamples, level=level, seed=seed)


def mean_of(values: np.ndarray) -> Resampled:
    """The mean of one number per image, over resamples of the images."""
    return lambda weights: weights @ values.astype(np.float64) / weights.sum(1)


def draws(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n images is drawn when n are drawn with replacement, (resamples, n) float64."""
    if n < 2:
        raise ValueError(f"an interval needs at least 2 images, not {n}")
    random = np.random.default_rng(seeded(seed, "bootstrap", n).initial_seed())
    return random.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def recentred(value: float, values: np.ndarray, n: int, level: float = LEVEL) -> Interval:
    """The interval of an estimate from its resamples.

    Resamples spread as sqrt((n - 1) / n) of what other images would, and the plain quantiles of a few hundred values
    lie too far inside: both are made up for.
    """
    low, middle, high = np.quantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2], method="median_unbiased")
    wider = math.sqrt(n / (n - 1))
    return Interval(float(value), float(value - wider * (middle - low)), float(value + wider * (high - middle)), n,
                    level, float(values.mean() - value))


def verdict(difference: Interval, margin: float, better: Literal["lower", "higher"], unit: str = "") -> str:
    """What a paired difference (variant minus baseline) allows to say about a margin that was set before.

    "no loss within X": even the bad end of the interval is no worse than the margin. "loss": even the good end is.
    Else "too few images: N more": about that many, as intervals shrink with the square root of their number.

    Raises:
        ValueError: the margin is negative, or `better` is neither of the two.
    """
    if margin < 0:
        raise ValueError(f"the margin of a verdict is a loss one accepts, 0 or more, not {margin}")
    if better not in ("lower", "higher"):
        raise ValueError(f"a metric is better lower or higher, not {better!r}")
    harm, best, worst = ((difference.value, difference.low, difference.high) if better == "lower"
                         else (-difference.value, -difference.high, -difference.low))
    if worst <= margin:
        return f"no loss within {margin:g}{' ' + unit if unit else ''}"
    if best > margin:
        return "loss"
    return f"too few images: {_more(difference.n, harm, best, worst, margin)} more"


def _more(n: int, harm: float, best: float, worst: float, margin: float) -> str:
    # The end of the interval that lies across the margin has to come back to it.
    reach, room = (worst - harm, margin - harm) if harm <= margin else (harm - best, harm - margin)
    needed = n * (reach / room) ** 2 - n if room > 0 else math.inf
    return f"{math.ceil(needed):,}" if needed <= MOST else f"over {MOST:,}"
