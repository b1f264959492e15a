"""The Pareto front: the rows that no other row beats on both of two measures.

A row *dominates* another when it is at least as good on both measures and better on one. It dominates it *clearly*
when, besides, its interval lies wholly on the better side of the other's on at least one measure: noise alone then
does not put a row behind the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .record import Record, Value

Better = Literal["lower", "higher"]


def front(records: Sequence[Record], x: str, y: str, better_x: Better, better_y: Better, *,
          clearly: bool = False) -> list[str]:
    """Names of the rows on the front, from the best x to the worst.

    Args:
        x, y: metrics or comparisons with the baseline; a row without both is not on the front.
        better_x, better_y: which way is better.
        clearly: whether only a clearly dominated row is taken off the front.

    Raises:
        ValueError: a direction is neither lower nor higher.
    """
    for better in (better_x, better_y):
        if better not in ("lower", "higher"):
            raise ValueError(f"pareto: the better direction is lower or higher, not {better!r}")
    points = {}
    for record in records:
        value_x, value_y = record.quantity(x), record.quantity(y)
        if value_x is not None and value_y is not None:
            points[record.name] = (_costs(value_x, better_x), _costs(value_y, better_y))
    kept = [name for name, point in points.items()
            if not any(_dominates(other, point, clearly) for other in points.values())]
    return sorted(kept, key=lambda name: points[name][0][0])


Costs = tuple[float, float, float]  # value, best end and worst end of the interval, lower is better


def _costs(value: Value, better: Better) -> Costs:
    ends = (value.value if value.low is None else value.low, value.value if value.high is None else value.high)
    if better == "lower":
        return value.value, ends[0], ends[1]
    return -value.value, -ends[1], -ends[0]


def _dominates(one: tuple[Costs, Costs], other: tuple[Costs, Costs], clearly: bool) -> bool:
    if any(a[0] > b[0] for a, b in zip(one, other)):
        return False
    if clearly:
        return any(a[2] < b[1] for a, b in zip(one, other))
    return any(a[0] < b[0] for a, b in zip(one, other))
