"""Stacks: rows whose methods are those of other rows, one after another. What these promised, beside what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .record import BASELINE, Record, Value
from .render import Cell, Heading, Metrics, Row, Table, better, cell, distances, heading, note

RATIOS = ("throughput_ratio", "latency_ratio_batch1")
COSTS = ("size", "run_macs")  # of which the shares of the baseline's are multiplied


@dataclass(frozen=True)
class Stack:
    """A row and the rows that it is made of, in order."""

    row: Record
    parts: tuple[Record, ...]

    def promised(self, name: str, baseline: Record) -> Value | None:
        """What the parts come to: ratios multiplied, costs as shares of the baseline's multiplied, differences added.

        Its interval takes the parts' to be independent: their half-widths are added in squares, of a product those of
        its logarithm. None where a part lacks the number.
        """
        values = [part.quantity(name) for part in self.parts]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        if name.endswith("_difference"):
            return _combined(known, sum, lambda value: value, lambda value: value)
        whole = baseline.quantity(name) if name in COSTS else None
        if name in COSTS and whole is None:
            return None
        unit = whole.value if whole is not None else 1.0
        shares = [replace(value, value=value.value / unit) for value in known]
        product = _combined(shares, math.prod, math.log, math.exp)
        return replace(product, value=product.value * unit, unit=known[0].unit)


def _combined(values: Sequence[Value], total: Callable[[Iterable[float]], float], there: Callable[[float], float],
              back: Callable[[float], float]) -> Value:
    """Values added, or multiplied as their logarithms are (`there` and `back`); an interval where all have one."""
    whole = total(value.value for value in values)
    ends = [(value.low, value.high) for value in values]
    if any(low is None or high is None for low, high in ends):
        return Value(whole)
    halves = [(there(value.value) - there(low), there(high) - there(value.value))
              for value, (low, high) in zip(values, ends) if low is not None and high is not None]
    below, above = (math.sqrt(sum(max(0.0, half) ** 2 for half in side)) for side in zip(*halves))
    return Value(whole, back(there(whole) - below), back(there(whole) + above))


def stacks(records: Sequence[Record]) -> list[Stack]:
    """The rows that are made of at least two others, whatever became of them."""
    named = [record for record in records if record.status == "done" and methods(record)]
    found = []
    for record in records:
        parts = _parts(methods(record), [other for other in named if other.name != record.name])
        if parts is not None and len(parts) > 1:
            found.append(Stack(record, parts))
    return found


def methods(record: Record) -> list[dict]:
    """The methods of a row's recipe, with their options."""
    return list(record.recipe.get("methods", ()))


def _parts(wanted: list[dict], others: Sequence[Record]) -> tuple[Record, ...] | None:
    """Rows whose methods make up a list, as few as go; None where none do."""
    if not wanted:
        return ()
    ways = [(other, *rest) for other in others if methods(other) == wanted[:len(methods(other))]
            if (rest := _parts(wanted[len(methods(other)):], others)) is not None]
    return min(ways, key=len, default=None)


def stack_table(records: Sequence[Record], metrics: Metrics) -> Table:
    """A line for every stack: what it is made of, and each number as promised and as measured."""
    baseline = next((record for record in records if record.name == BASELINE), None)
    found = [] if baseline is None else stacks(records)
    numbers = [*(name for name in (*RATIOS, *COSTS) if any(record.quantity(name) for record in records)),
               *(f"{name}_difference" for name in distances(records))]
    heads = [(heading(name, [one.row for one in found], metrics)) for name in numbers]

    def line(one: Stack) -> Row:
        assert baseline is not None
        cells = [Cell(" + ".join(part.name for part in one.parts))]
        for head in heads:
            cells += [cell(one.promised(head.name, baseline), head, metrics),
                      cell(one.row.quantity(head.name), head, metrics)]
        return Row(one.row.name, tuple(cells), "; ".join(filter(None, (says(one, baseline), note(one.row)))))

    pairs = [two for head in heads for two in (Heading(head.name, f"{head.title}, promised", head.better, None),
                                               Heading(head.name, "measured", better(head.name, metrics), head.n))]
    return Table((Heading("parts", "made of", None, None), *pairs), tuple(map(line, found)))


def says(one: Stack, baseline: Record) -> str:
    """Whether a stack is as fast and as good as its parts promised, by the intervals of both."""
    quality = [f"{name}_difference" for name in distances([baseline])][:1]
    said = [_kept(one, baseline, RATIOS[0], "slower", "faster", "as fast as promised"),
            *(_kept(one, baseline, name, "better", "worse", "") for name in quality)]
    return "; ".join(filter(None, said))


def _kept(one: Stack, baseline: Record, name: str, below: str, above: str, alike: str) -> str:
    promised, measured = one.promised(name, baseline), one.row.quantity(name)
    if promised is None or measured is None or promised.low is None or promised.high is None:
        return ""
    if measured.low is None or measured.high is None:
        return ""
    if measured.high < promised.low:
        return f"{below} than promised"
    return f"{above} than promised" if measured.low > promised.high else alike
