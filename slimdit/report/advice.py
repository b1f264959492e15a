"""What to do with a model and a budget, read off the records: the best row that lost nothing, for every wish."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .record import AA, BASELINE, Record, Value
from .render import Cell, Heading, Metrics, Row, Table, better, cell, distances, heading

WISHES = {"many images an hour": "throughput_ratio", "one image sooner": "latency_ratio_batch1",
          "a smaller file": "size", "less memory": "peak_memory"}
"""What somebody may want, and the number that says how well a row does it."""


def advice_table(records: Sequence[Record], metrics: Metrics) -> Table:
    """For every wish the best row without training and the best of all, among those whose verdict is `no loss`.

    A cell names the row, what it gains and its difference in quality. Costs are shares of the baseline's.
    """
    rows = [record for record in records if record.name not in (BASELINE, AA) and record.status == "done"]
    safe = [record for record in rows if record.verdict.startswith("no loss")]
    baseline = next((record for record in records if record.name == BASELINE), None)
    budget = max((spent.value for record in safe if (spent := record.quantity("trained_images"))), default=0.0)
    columns: list[tuple[str, Callable[[Record], bool]]] = [
        ("nothing is trained", lambda record: record.quantity("trained_images") is None),
        (f"training on up to {budget:,.0f} images", lambda record: True)]
    quality = next((f"{name}_difference" for name in distances(records)), None)

    def told(wish: str, fits: Callable[[Record], bool]) -> Cell:
        named = WISHES[wish]
        way = better(named, metrics) or "higher"
        gains = [(value.value, record) for record in safe if fits(record)
                 and (value := relative(record, baseline, named)) is not None]
        if not gains:
            return Cell("nothing measured")
        _, best = (max if way == "higher" else min)(gains, key=lambda pair: pair[0])
        gain = relative(best, baseline, named)
        if gain is None or (gain.value <= 1 if way == "higher" else gain.value >= 1):
            return Cell("nothing gains")
        shown = [f"`{best.name}`:", str(cell(gain, heading(named, [], metrics), metrics))]
        change = best.quantity(quality) if quality else None
        if quality and change is not None:
            head = heading(quality, [], metrics)
            shown[-1] += f", {head.title} {cell(Value(change.value, change.low, change.high), head, metrics)}"
        return Cell(" ".join(shown))

    return Table(tuple(Heading("", name, None, None) for name, _ in columns),
                 tuple(Row(wish, tuple(told(wish, fits) for _, fits in columns), "") for wish in WISHES),
                 first="you want", last=None)


def relative(record: Record, baseline: Record | None, name: str) -> Value | None:
    """A ratio as it is, and a cost as its share of the baseline's."""
    value = record.quantity(name)
    if value is None or "_ratio" in name:
        return value
    whole = baseline.quantity(name) if baseline else None
    if whole is None or not whole.value:
        return None
    return Value(value.value / whole.value, unit="x")
