"""Numbers inside sentences of a Markdown page, rendered from records like its tables.

`<!-- study: shallow throughput_ratio -->1.14x [1.13, 1.22]<!-- / -->` is a row's number with its interval. A row may be
`ROW/CONTROL`, for their difference; a number may be `saved NAME`, by how much a cost is below the baseline's, or
`worst NAME`, the largest that the routing of any block has of it, both in percent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..files import write_text
from .advice import relative
from .contrast import Contrast
from .record import BASELINE, Record, Value
from .render import Metrics, cell, heading

PLACE = re.compile(r"<!-- (?P<folder>[\w-]+): (?P<row>\S+) (?P<number>[\w -]+?) -->(?P<old>.*?)<!-- / -->", re.DOTALL)


def update_prose(path: Path, folder: str, records: Sequence[Record], contrasts: Sequence[Contrast],
                 metrics: Metrics) -> int:
    """Render anew what a page says of the records of a folder; returns at how many places.

    Raises:
        ValueError: a place asks for what there is not.
    """
    text = path.read_text(encoding="utf-8")
    named = {record.name: record for record in records}
    pairs = {f"{one.row}/{one.control}": one.differences for one in contrasts}
    found = 0

    def rendered(place: re.Match[str]) -> str:
        nonlocal found
        if place["folder"] != folder:
            return place[0]
        found += 1
        said = _said(place["row"], place["number"], named, pairs, metrics)
        if said is None:
            raise ValueError(f"{path}: the records of {folder} have no {place['number']} of {place['row']}")
        return f"<!-- {folder}: {place['row']} {place['number']} -->{said}<!-- / -->"

    text = PLACE.sub(rendered, text)
    if found:
        write_text(path, text)
    return found


def _said(row: str, number: str, named: Mapping[str, Record], pairs: Mapping[str, Mapping[str, Value]],
          metrics: Metrics) -> str | None:
    how, _, name = number.rpartition(" ")
    if row in pairs:
        value = pairs[row].get(name)
    elif row not in named:
        return None
    elif how == "saved":
        share = relative(named[row], named.get(BASELINE), name)
        return None if share is None else f"{100 * (1 - share.value):.0f} %"
    elif how == "worst":
        routing = [entry["routing"] for entry in named[row].witness if entry.get("routing")]
        return f"{100 * max(block[name] for block in routing[-1].values()):.0f} %" if routing else None
    else:
        value = named[row].quantity(name)
    return None if value is None else str(cell(value, replace(heading(name, [], metrics), n=value.n), metrics))
