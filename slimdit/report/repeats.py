"""Whether what was found of rows that train holds with other seeds.

`slimdit bench --seeds 2` calls the second of them `ROW-seed1`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .contrast import Contrast, side
from .record import BASELINE, Record, Value
from .render import Cell, Heading, Metrics, Row, Table, cell, distances, heading

SEED = re.compile(r"(.+)-seed(\d+)")


def apart(records: Sequence[Record]) -> tuple[list[Record], dict[str, dict[str, Record]]]:
    """Records without those of other seeds, and these by the row that they repeat and by seed."""
    named = {record.name: record for record in records}
    again: dict[str, dict[str, Record]] = {}
    for name, record in named.items():
        if (found := SEED.fullmatch(name)) and found[1] in named:
            again.setdefault(found[1], {})[found[2]] = record
    repeats = {record.name for others in again.values() for record in others.values()}
    return [record for record in records if record.name not in repeats], again


def seed_table(contrasts: Sequence[Contrast], records: Sequence[Record], metrics: Metrics) -> Table:
    """A line for every row with other seeds and each of its controls, the baseline first: the difference by seed.

    It holds where every seed's interval is on one side of zero; seeds that disagree are said to.
    """
    firsts, again = apart(records)
    names = [f"{name}_difference" for name in distances(records)][:1]
    seeds = sorted({seed for others in again.values() for seed in others})
    pairs = {(one.row, one.control): one.differences for one in contrasts}
    heads = [Heading(name, f"{heading(name, [], metrics).title}, seed {seed}", heading(name, [], metrics).better, None)
             for name in names for seed in ("0", *seeds)]

    def line(row: Record, control: str, found: Sequence[Value | None]) -> Row:
        cells = [Cell(control), *(cell(value, head, metrics) for value, head in zip(found, heads))]
        return Row(row.name, tuple(cells), says([value for value in found if value is not None], heads[0]))

    rows = []
    for row in firsts:
        others = again.get(row.name, {})
        if not others or not names:
            continue
        judged = [one.quantity(names[0]) if one else None for one in (row, *(others.get(seed) for seed in seeds))]
        if all(value is not None for value in judged[:2]):
            rows.append(line(row, BASELINE, judged))
        for control in dict.fromkeys(control for name, control in pairs if name == row.name):
            values = [_difference(pairs, (row.name, control), names[0]),
                      *(_difference(pairs, (f"{row.name}-seed{seed}", f"{control}-seed{seed}"), names[0])
                        for seed in seeds)]
            if all(value is not None for value in values[:2]):
                rows.append(line(row, control, values))
    return Table((Heading("control", "beside", None, None), *heads), tuple(rows))


def _difference(pairs: Mapping[tuple[str, str], Mapping[str, Value]], pair: tuple[str, str],
                name: str) -> Value | None:
    return pairs.get(pair, {}).get(name)


def says(values: Sequence[Value], head: Heading) -> str:
    """What all seeds say, or that they do not agree."""
    said = list(dict.fromkeys(side(value, head) for value in values))
    return f"{said[0]} with every seed" if len(said) == 1 else "depends on the seed: " + ", ".join(
        side(value, head) for value in values)
