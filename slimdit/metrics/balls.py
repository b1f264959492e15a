"""Balls around images in feature space, which precision and recall are made of (arXiv 1904.06991).

Distances of all pairs are taken in float32, by one product; what is too near a ball's surface to tell is then looked at
exactly, in float64. So the answers are those of exact distances, in half their time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ROWS = 1024  # images per block of a distance matrix: 1024 x 50,000 floats are 200 MB
SPARE = 4  # neighbours beyond the k-th that are looked at exactly
FEW = 64  # images whose neighbours' features are held at a time
EPSILON = np.finfo(np.float32).eps


class RoughDistances:
    """Squared distances of two sets, in float32, less a number for every y.

    Args:
        x, y: features (n, d) and (m, d).
        less: (m,), what is taken off; nothing by default.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, less: np.ndarray | None = None) -> None:
        centre = y.mean(0)  # distances are the same around it, and lose less to rounding
        self.x, self.y = (np.asarray(side - centre, np.float32) for side in (x, y))
        self.x_size, self.y_size = ((side.astype(np.float64) ** 2).sum(1) for side in (self.x, self.y))
        less = np.zeros(len(y)) if less is None else less
        self.error = EPSILON * (16 + 4 * x.shape[1] ** 0.5)  # of a sum of d products, for each unit of what is summed
        # |x - y|² = [-2 x, |x|², 1] [y, 1, |y|²]: nothing is left to do after the product.
        self._left = np.column_stack([-2 * self.x, self.x_size, np.ones(len(x))]).astype(np.float32)
        self._right = np.column_stack([self.y, np.ones(len(y)), self.y_size - less]).astype(np.float32)
        self.y_size = self.y_size + less

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of x, and their distances: (rows, m)."""
        for start in range(0, len(self._left), ROWS):
            rows = slice(start, start + ROWS)
            yield rows, self._left[rows] @ self._right.T


def radii(members: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of every member to its k-th nearest other member.

    Raises:
        ValueError: there are k members or fewer.
    """
    if len(members) <= k:
        raise ValueError(f"{len(members)} images have no {k}-th neighbour: give more than {k}")
    rough, count, found = RoughDistances(members, members), min(k + 1 + SPARE, len(members)), []
    for rows, distances in rough.blocks():
        places = np.argpartition(distances, count - 1, axis=1)[:, :count]
        reached = np.take_along_axis(distances, places, 1).max(1)
        among = members[rows]
        # The nearest is the member itself, at 0.
        kth = np.concatenate([np.partition(apart(among[start:start + FEW, None], members[places[start:start + FEW]]),
                                           k, axis=1)[:, k] for start in range(0, len(among), FEW)])
        slack = rough.error * (rough.x_size[rows] + rough.y_size.max())
        unsure = np.flatnonzero((kth > reached - slack) & (count < len(members)))
        if len(unsure):
            kth[unsure] = np.partition(squared_distances(among[unsure], members), k, axis=1)[:, k]
        found.append(kth)
    return np.concatenate(found)


def inside(points: np.ndarray, members: np.ndarray, squared_radii: np.ndarray) -> np.ndarray:
    """Whether each point lies in the ball of any member, (len(points),) bool."""
    rough = RoughDistances(points, members, squared_radii)
    return np.concatenate([held(beyond, points[rows], Balls(members, squared_radii), rough.error, rough.x_size[rows],
                                rough.y_size) for rows, beyond in rough.blocks()])


def inside_each_other(x: np.ndarray, y: np.ndarray, x_radii: np.ndarray,
                      y_radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`inside` of x in y's balls and of y in x's, of the same distances."""
    rough, of_x, of_y = RoughDistances(x, y, y_radii), [], np.zeros(len(y), bool)
    for rows, beyond in rough.blocks():
        points, own, size = x[rows], x_radii[rows], rough.x_size[rows]
        of_x.append(held(beyond, points, Balls(y, y_radii), rough.error, size, rough.y_size))
        beyond -= own[:, None].astype(np.float32)
        beyond += y_radii.astype(np.float32)
        of_y |= held(beyond.T, y, Balls(points, own), rough.error, rough.y_size, size + own)
    return np.concatenate(of_x), of_y


class Balls(NamedTuple):
    """Balls around members, (n, d), of squared radii, (n,)."""

    members: np.ndarray
    squared_radii: np.ndarray


def held(beyond: np.ndarray, points: np.ndarray, balls: Balls, error: float, point_size: np.ndarray,
         ball_size: np.ndarray) -> np.ndarray:
    """Which points lie in any ball, (points,) bool.

    Args:
        beyond: how far each point is outside each ball, roughly: (points, balls).
        error: of such a number, for each unit of the point's and the ball's size together.
    """
    nearest, slack = beyond.min(1), error * (point_size + ball_size.max())
    inside = nearest < -slack
    for place in np.flatnonzero(~inside & (nearest <= slack)):
        near = np.flatnonzero(beyond[place] <= error * (point_size[place] + ball_size))
        inside[place] = (apart(points[place], balls.members[near]) <= balls.squared_radii[near]).any()
    return inside


def neighbours(points: np.ndarray, members: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest members of every point, nearest first: their places and squared distances, (len(points), count)."""
    found = []
    for rows in blocks(points):
        distances = squared_distances(rows, members)
        places = np.argpartition(distances, count - 1, axis=1)[:, :count]
        near = np.take_along_axis(distances, places, 1)
        order = near.argsort(1, kind="stable")
        found.append((np.take_along_axis(places, order, 1), np.take_along_axis(near, order, 1)))
    return np.concatenate([places for places, _ in found]), np.concatenate([near for _, near in found])


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of all pairs, (n, m)."""
    x, y = x.astype(np.float64, copy=False), y.astype(np.float64, copy=False)
    return ((x ** 2).sum(1)[:, None] + (y ** 2).sum(1) - 2 * x @ y.T).clip(min=0)


def apart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances along the last axis, exact but for the rounding of their sum."""
    return ((x.astype(np.float64, copy=False) - y) ** 2).sum(-1)


def blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """`x` in parts of at most `ROWS` rows."""
    return (x[start:start + ROWS] for start in range(0, len(x), ROWS))
