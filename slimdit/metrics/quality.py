"""How close a set of images is to a reference set, from the features of both.

Every metric here is also available over resamples of the images (`*_of`), which is what intervals are made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigvalsh

from ..sampling.seeds import seeded
from .balls import blocks, inside, inside_each_other, neighbours, radii, squared_distances

Resampled = Callable[[np.ndarray], np.ndarray]
"""How often each image is drawn, (resamples, n), to the metric of every resample, (resamples,)."""

SCORED = 5000  # images per part of the inception score
GATHERED = 1024  # images whose products are summed at once: of few, adding up matrices takes longer than making them
NEIGHBOURS = 64  # of an image that a resample's recall looks at
TINY = np.finfo(np.float64).tiny
WIDE = 1024  # features from which on products that are averaged over many pairs or resamples are taken in float32
NOT_FINITE = "a feature is not finite: look at the images, or at the feature network's weights"


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features: all that the Fréchet distance needs of a set of images.

    Attributes:
        mu: mean, (d,) float64.
        sigma: covariance with n - 1, (d, d) float64.
        n: how many images there were; None where a file does not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """The statistics of features (n, d).

        Raises:
            ValueError: there are fewer than 2 images, or a feature is not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features of {features.shape} have no covariance: give (images, d) of 2 or more images")
        if not np.isfinite(features).all():
            raise ValueError(NOT_FINITE)
        x = features.astype(np.float64)
        mu = x.mean(0)
        return cls(mu, (x - mu).T @ (x - mu) / (len(x) - 1), len(x))

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets together (Chan, Golub and LeVeque 1979).

        Raises:
            ValueError: one of the two does not know how many images it stands for.
        """
        if self.n is None or other.n is None:
            raise ValueError("statistics without a number of images cannot be merged: compute them from the images")
        n, apart = self.n + other.n, other.mu - self.mu
        scatter = ((self.n - 1) * self.sigma + (other.n - 1) * other.sigma
                   + np.outer(apart, apart) * (self.n * other.n / n))
        return Statistics(self.mu + apart * (other.n / n), scatter / (n - 1), n)


class RunningStatistics:
    """Statistics gathered part by part, in memory that does not grow with the number of images."""

    def __init__(self) -> None:
        self.n = 0
        self._waiting: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Count in the features of some more images, (n, d).

        Raises:
            ValueError: a feature is not finite.
        """
        if not np.isfinite(features).all():
            raise ValueError(NOT_FINITE)
        x = features.astype(np.float64)
        if not self.n:
            self._origin = x.mean(0)  # near the mean of all, so that nothing cancels below
            self._sum, self._products = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        x -= self._origin
        self._sum += x.sum(0)
        self.n += len(x)
        self._waiting.append(x)
        if sum(map(len, self._waiting)) >= GATHERED:
            self._gather()

    def _gather(self) -> None:
        if self._waiting:
            x = np.concatenate(self._waiting)
            self._products += x.T @ x
            self._waiting = []

    def statistics(self) -> Statistics:
        """Of all features so far.

        Raises:
            ValueError: there were fewer than 2 images.
        """
        if self.n < 2:
            raise ValueError(f"features of {self.n} images have no covariance: give 2 or more images")
        self._gather()
        mean = self._sum / self.n
        sigma = (self._products - self.n * np.outer(mean, mean)) / (self.n - 1)
        return Statistics(self._origin + mean, sigma, self.n)


def frechet(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance of two Gaussians: |mu_a - mu_b|² + tr(A + B - 2 (A B)^½) (Heusel et al., 1706.08500).

    With A = H H', the eigenvalues of A B are those of the symmetric H' B H, which are quick to find and not negative.
    No inverse is needed: covariances of fewer images than features are exact here, and the usual epsilon on the
    diagonal is never added.

    Raises:
        ValueError: the features of the two have different widths.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"features of {a.mu.size} and {b.mu.size} numbers cannot be compared: use one feature network")
    few, many = sorted((a, b), key=lambda statistics: statistics.n or math.inf)
    half = half_of(few)
    cross = np.sqrt(eigvalsh(half.T @ many.sigma @ half, check_finite=False).clip(min=0)).sum()
    return float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross)


def half_of(statistics: Statistics) -> np.ndarray:
    """H of H H' = sigma, (d, rank): n images span n - 1 directions, and the eigenvalues beyond are rounding."""
    rank = min(len(statistics.mu), (statistics.n or math.inf) - 1)
    values, vectors = np.linalg.eigh(statistics.sigma)
    return vectors[:, -rank:] * np.sqrt(values[-rank:].clip(min=0))


def root(sigma: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_of(features: np.ndarray, reference: Statistics) -> Resampled:
    """The Fréchet distance of features (n, d) to a reference, over resamples of the images.

    The reference's root is multiplied into the features once, so that a resample costs one weighted covariance and its
    eigenvalues. From `WIDE` features on those are taken in float32, which moves a resample far less than resampling
    does; all images once, which is the estimate itself, stays in float64.
    """
    x = features - reference.mu  # centred once: no cancellation in the covariance below
    squares, rooted = (x ** 2).sum(1), x @ root(reference.sigma)
    quick = rooted.astype(np.float32) if rooted.shape[1] >= WIDE else rooted
    scale = np.trace(reference.sigma)

    def resampled(weights: np.ndarray) -> np.ndarray:
        return np.array([one(row) for row in weights])

    def one(weights: np.ndarray) -> float:
        n, drawn = weights.sum(), np.flatnonzero(weights)
        mu = weights @ x / n
        spread = (weights @ squares - n * (mu @ mu)) / (n - 1)  # the trace of the covariance
        return mu @ mu + spread + scale - 2 * cross(rooted if (weights == 1).all() else quick, weights, drawn)

    return resampled


def cross(rooted: np.ndarray, weights: np.ndarray, drawn: np.ndarray) -> float:
    """tr (A B)^½ for features with B^½ multiplied in, (n, d), of which those at `drawn` count `weights` times."""
    n, counts, rows = weights.sum(), weights[drawn].astype(rooted.dtype), rooted[drawn]
    rows -= counts @ rows / counts.sum()
    rows *= np.sqrt(counts / (n - 1)).astype(rooted.dtype)[:, None]
    rank = min(len(drawn) - 1, rooted.shape[1])  # the eigenvalues beyond are rounding, which a root would magnify
    values = eigvalsh(rows.T @ rows, overwrite_a=True, check_finite=False)
    return float(np.sqrt(values[len(values) - rank:].clip(min=0)).sum(dtype=np.float64))


def kid(features: np.ndarray, reference: np.ndarray) -> float:
    """Kernel distance: the unbiased squared MMD with the kernel (x·y / d + 1)³ (Binkowski et al., 1801.01401).

    Over all pairs of images rather than over subsets, which has the same mean and the least variance.
    """
    between = sum(total(kernel(*pair)) for pair in pairs_of_blocks(features, reference))
    return mean_kernel(features) + mean_kernel(reference) - 2 * between / (len(features) * len(reference))


def kid_of(features: np.ndarray, reference: np.ndarray, among_reference: float | None = None) -> Resampled:
    """KID over resamples of the images; the pairs of an image with its own copy are left out, so none is biased.

    Args:
        among_reference: `mean_kernel(reference)`, where it is known already.
    """
    x, y = features.astype(np.float64), reference.astype(np.float64)
    to_reference = np.concatenate([kernel(rows, y).mean(1) for rows in blocks(x)])
    if among_reference is None:
        among_reference = mean_kernel(y)

    def resampled(weights: np.ndarray) -> np.ndarray:
        n = weights.sum(1)
        own = (weights ** 2) @ own_kernel(x)
        pairs, start = np.zeros(len(weights)), 0
        for rows in blocks(x):
            pairs += ((weights[:, start:start + len(rows)] @ kernel(rows, x)) * weights).sum(1)
            start += len(rows)
        among = (pairs - own) / (n ** 2 - (weights ** 2).sum(1))
        return among + among_reference - 2 * (weights @ to_reference) / n

    return resampled


def mean_kernel(features: np.ndarray) -> float:
    """KID's kernel, averaged over all pairs of different images of a set."""
    y, n = averaged(features), len(features)
    among = 0.0
    start = 0
    for rows in blocks(y):
        start += len(rows)
        among += total(kernel(rows, rows)) + 2 * total(kernel(rows, y[start:]))  # the kernel is symmetric
    return float((among - own_kernel(features.astype(np.float64)).sum()) / (n * (n - 1)))


def averaged(features: np.ndarray) -> np.ndarray:
    """Features in the type that products averaged over many pairs are taken in."""
    return features.astype(np.float32 if features.shape[1] >= WIDE else np.float64)


def pairs_of_blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of x, each with all of y, as `averaged`."""
    x, y = averaged(x), averaged(y)
    return ((rows, y) for rows in blocks(x))


def total(values: np.ndarray) -> float:
    """The sum, in float64."""
    return float(values.sum(dtype=np.float64))


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's polynomial kernel of all pairs, (n, m)."""
    linear = x @ y.T
    linear /= x.shape[1]
    linear += 1
    cube = linear * linear  # numpy's power is many times slower
    cube *= linear
    return cube


def own_kernel(x: np.ndarray) -> np.ndarray:
    """The kernel of every image with itself, (n,)."""
    return ((x ** 2).sum(1) / x.shape[1] + 1) ** 3


def precision(features: np.ndarray, reference: np.ndarray, k: int = 3) -> np.ndarray:
    """Whether each image lies among the reference, (n,) bool; their mean is the precision (arXiv 1904.06991).

    An image is among a set if it is no farther from one of its members than that member's k-th neighbour in the set.

    Raises:
        ValueError: the reference has k images or fewer.
    """
    return inside(features, reference, radii(reference, k))


def recall(features: np.ndarray, reference: np.ndarray, k: int = 3) -> np.ndarray:
    """Whether each reference image lies among the images, (len(reference),) bool; their mean is the recall.

    Raises:
        ValueError: there are k images or fewer.
    """
    return inside(reference, features, radii(features, k))


def recall_of(features: np.ndarray, reference: np.ndarray, k: int = 3) -> Resampled:
    """The recall over resamples of the images: a ball reaches to the k-th nearest other image that was drawn.

    Copies of an image are no neighbours of it, which would shrink its ball to nothing. Of every image only the
    `NEIGHBOURS` nearest are kept, of which one resample in a hundred million draws fewer than three; of every
    reference image only the `NEIGHBOURS` balls that come nearest to holding it, for their size.

    Raises:
        ValueError: there are k images or fewer.
    """
    others = min(NEIGHBOURS, len(features) - 1)
    near, distance = neighbours(features, features, others + 1)
    first = np.argmax(near == np.arange(len(features))[:, None], axis=1)  # itself, which equal images may precede
    apart = np.arange(others + 1) != first[:, None]
    near, distance = near[apart].reshape(-1, others), distance[apart].reshape(-1, others)
    if others < k:
        raise ValueError(f"{len(features)} images have no {k}-th neighbour: give more than {k}")
    balls, to_balls = holding(reference, features, distance[:, k - 1])

    def resampled(weights: np.ndarray) -> np.ndarray:
        return np.array([one(drawn) for drawn in weights > 0])

    def one(drawn: np.ndarray) -> float:
        there = drawn[near].cumsum(1) == k
        reach = np.where(there.any(1), distance[np.arange(len(distance)), there.argmax(1)], np.inf)
        return float(((to_balls <= reach[balls]) & drawn[balls]).any(1).mean())

    return resampled


def holding(points: np.ndarray, members: np.ndarray, squared_radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The members whose balls come nearest to holding every point: places and squared distances, `NEIGHBOURS` each."""
    count, found = min(NEIGHBOURS, len(members)), []
    for rows in blocks(points):
        distances = squared_distances(rows, members)
        places = np.argpartition(distances / np.maximum(squared_radii, TINY), count - 1, axis=1)[:, :count]
        found.append((places, np.take_along_axis(distances, places, 1)))
    return np.concatenate([places for places, _ in found]), np.concatenate([near for _, near in found])


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Precision and recall as shares, 0..1."""
    among, held = inside_each_other(features, reference, radii(features, k), radii(reference, k))
    return float(among.mean()), float(held.mean())


def inception_score(logits: np.ndarray, *, splits: int | None = None, shuffle: bool = True,
                    seed: int = 0) -> tuple[float, float]:
    """Exp of the mean divergence of the class posteriors from their mean (Salimans et al., arXiv 1606.03498).

    Args:
        logits: (n, classes), without bias as in the TensorFlow graph.
        splits: parts that are scored apart and averaged; the usual parts of 5,000 images where None.
        shuffle: images are put into the parts at random, because class-sorted files lower the score of each part;
            False leaves them in file order, as ADM's evaluator does.

    Returns:
        The mean over splits and their standard deviation.
    """
    scores = [score_of(whole_or(logits, part))(np.ones((1, len(part))))[0]
              for part in score_parts(len(logits), splits, shuffle, seed)]
    return float(np.mean(scores)), float(np.std(scores))


def inception_score_of(logits: np.ndarray) -> Resampled:
    """The inception score in the usual parts of 5,000 images, over resamples of the images."""
    parts = score_parts(len(logits))
    scores = [score_of(logits[part]) for part in parts]
    return lambda weights: np.mean([score(weights[:, part]) for score, part in zip(scores, parts)], axis=0)


def score_parts(n: int, splits: int | None = None, shuffle: bool = True, seed: int = 0) -> list[np.ndarray]:
    """The places of the images in each part of the inception score."""
    random = np.random.default_rng(seeded(seed, "inception score").initial_seed())
    parts = splits or max(1, n // SCORED)
    order = random.permutation(n) if shuffle and parts > 1 else np.arange(n)
    return np.array_split(order, parts)


def whole_or(logits: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The rows of a part, without copying them where it is all of them in order."""
    return logits if len(part) == len(logits) else logits[part]


def score_of(logits: np.ndarray) -> Resampled:
    """The inception score of one part, over resamples of its images."""
    shifted = logits.astype(np.float64)
    shifted -= logits.max(1, keepdims=True).astype(np.float64)
    raised = np.exp(shifted)
    sums = raised @ np.ones(logits.shape[1])  # p = raised / sums, which is never written out
    negative_entropy = np.einsum("nc,nc->n", raised, shifted) / sums - np.log(sums)

    def resampled(weights: np.ndarray) -> np.ndarray:
        shares = weights / weights.sum(1, keepdims=True)
        marginal = (shares / sums) @ raised
        log_marginal = np.log(marginal.clip(min=np.finfo(np.float64).tiny))
        return np.exp(shares @ negative_entropy - (marginal * log_marginal).sum(1))

    return resampled


def class_accuracy(features: np.ndarray, labels: np.ndarray, reference: np.ndarray, reference_labels: np.ndarray,
                   k: int = 5) -> np.ndarray:
    """Whether each image looks like the class it was asked for, (n,) bool; their mean is the class accuracy.

    The class of an image is the vote of its k nearest labelled reference images in feature space; nearer ones break
    ties. Real images do not score 1: compare with the same number for held-out real images.

    Args:
        labels: the class each image was made for, (n,).

    Raises:
        ValueError: the reference has fewer than k images, or labels are missing.
    """
    if len(reference) < k:
        raise ValueError(f"{len(reference)} reference images are too few for {k} neighbours: give at least {k}")
    if len(labels) != len(features) or len(reference_labels) != len(reference):
        raise ValueError("class accuracy needs one label per image and per reference image")
    worth = 1 + np.arange(k, 0, -1) / (k * k)  # a whole vote, and less than one more in all for being near
    predicted = []
    for rows in blocks(features):
        distances = squared_distances(rows, reference)
        nearest = np.argpartition(distances, k - 1, axis=1)[:, :k]
        nearest = np.take_along_axis(nearest, np.take_along_axis(distances, nearest, 1).argsort(1, kind="stable"), 1)
        votes = np.zeros((len(rows), int(reference_labels.max()) + 1))
        np.add.at(votes, (np.arange(len(rows))[:, None], reference_labels[nearest]), worth)
        predicted.append(votes.argmax(1))
    return np.concatenate(predicted) == labels
