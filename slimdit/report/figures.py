"""The pictures of a study, from its records: fronts, sweeps of an option, students, routing, and sample images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from .advice import relative
from .charts import Point, Series, grid_png, plot_svg, routing_svg
from .pareto import front
from .record import AA, BASELINE, Record, Value
from .render import ARROWS, Metrics, better, distances, title
from .repeats import apart
from .stacks import methods

FRONTS = ("throughput_ratio", "latency_ratio_batch1", "size", "peak_memory")
SHOWN = 10  # images of a row beside the baseline's
FAR = 12.0  # a row whose distance is so many times the baseline's says nothing on a front


def write_figures(records: Sequence[Record], sheets: Mapping[str, Path], folder: Path, metrics: Metrics) -> list[Path]:
    """Write every picture that the records give; returns their paths.

    Args:
        sheets: a PNG of samples for each row's name, the same ids in every one, ten in a line.
    """
    records = apart(records)[0]
    quality = next(iter(distances(records)), None)
    if quality is None:
        return []
    drawn = {f"front-{name}.svg": front_svg(records, name, quality, metrics) for name in FRONTS}
    drawn |= {f"sweep-{name}.svg": svg for name, svg in sweeps(records, quality).items()}
    drawn["students.svg"] = students_svg(records, quality)
    drawn |= {f"routing-{record.name}.svg": routing_svg(made[-1]) for record in records
              if (made := [entry["routing"] for entry in record.witness if entry.get("routing")])}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, svg in drawn.items():
        if svg:
            write_text(folder / name, svg)
            written.append(folder / name)
    for name, record in extremes(records, quality).items():
        if record.name in sheets and BASELINE in sheets:
            pair_png(sheets[BASELINE], sheets[record.name], folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written


def front_svg(records: Sequence[Record], x: str, quality: str, metrics: Metrics) -> str:
    """Quality against what a row costs or gains beside the baseline, with intervals; the front as a dotted line.

    Rows that are clearly dominated are hollow; those whose quality is far off any front are left out. Empty where
    fewer than two rows have both numbers.
    """
    baseline = next((record for record in records if record.name == BASELINE), None)
    base = baseline.quantity(quality) if baseline else None
    shown = {}
    for record in records:
        value = Value(1.0, unit="x") if record is baseline else relative(record, baseline, x)
        judged = record.quantity(quality)
        if record.name != AA and value and judged and (base is None or judged.value < FAR * base.value):
            shown[record.name] = (record, value, judged)
    if len(shown) < 2:
        return ""
    rows = [Record(name, metrics={x: value, quality: judged}) for name, (_, value, judged) in shown.items()]
    way = better(x, metrics) or "higher"
    ways = (way, better(quality, metrics) or "lower")
    unbeaten = front(rows, x, quality, *ways, clearly=True)
    points = {name: Point(value.value, judged.value, _ends(value), _ends(judged), name, name not in unbeaten)
              for name, (_, value, judged) in shown.items()}
    line = Series([Point(points[name].x, points[name].y) for name in front(rows, x, quality, *ways)], line="dotted",
                  marks=False)
    across = title(x) if "_ratio" in x else f"{title(x)}, share of the baseline's"
    return plot_svg([Series(list(points.values())), line], x=f"{across} ({ARROWS[way]} {way} is better)",
                    y=f"{title(quality)} ({ARROWS[ways[1]]} {ways[1]} is better)", log_x=True, log_y=True, height=520)


def sweeps(records: Sequence[Record], quality: str) -> dict[str, str]:
    """For every option that alone tells three rows or more apart, quality over its values."""
    found: dict[str, dict[str, list[Point]]] = {}
    for record in records:
        judged = record.quantity(quality)
        for number, method in enumerate(methods(record)):
            for name, values in method.items():
                for option, value in values.items():
                    if judged is None or isinstance(value, bool) or not isinstance(value, (int, float)):
                        continue
                    rest = [*methods(record)]
                    rest[number] = {name: {**values, option: None}}
                    alike = json.dumps(rest, sort_keys=True)
                    found.setdefault(option, {}).setdefault(alike, []).append(
                        Point(value, judged.value, y_ends=_ends(judged)))
    drawn = {}
    for option, groups in found.items():
        lines = [sorted(points, key=lambda point: point.x) for points in groups.values()
                 if len({point.x for point in points}) > 2]
        if lines:
            drawn[option] = plot_svg([Series(points, line="solid") for points in lines], x=option,
                                     y=title(quality), height=320)
    return drawn


def students_svg(records: Sequence[Record], quality: str) -> str:
    """Quality over computation of the rows that distil and of the baseline; empty where none does."""
    rows = [record for record in records
            if record.name == BASELINE or any("distill" in method for method in methods(record)[:1])]
    points = [Point(cost.value / 1e9, judged.value, y_ends=_ends(judged), name=record.name) for record in rows
              if len(methods(record)) < 2 and (cost := record.quantity("run_macs"))
              and (judged := record.quantity(quality))]
    if len(points) < 3:
        return ""
    return plot_svg([Series(points)], x="GMACs per image", y=title(quality), log_y=True)


def extremes(records: Sequence[Record], quality: str) -> dict[str, Record]:
    """The fastest row that lost nothing, as `best`, and the row of the worst quality."""
    rows = [record for record in records if record.name not in (BASELINE, AA) and record.quantity(quality)]
    safe = [record for record in rows if record.verdict.startswith("no loss")]
    ends: dict[str, Record] = {}
    if safe:
        ends["best"] = max(safe, key=lambda record: _value(record, "throughput_ratio"))
    if rows:
        ends["worst"] = max(rows, key=lambda record: _value(record, quality))
    return ends


def pair_png(above: Path, below: Path, path: Path) -> None:
    """The first line of two sheets, one above the other: the same noise and label in each column."""
    from PIL import Image

    lines = []
    for sheet in (above, below):
        with Image.open(sheet) as picture:
            pixels = np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
        side = (pixels.shape[1] - GAP) // SHOWN
        lines += [pixels[GAP:side, GAP + place * side:(place + 1) * side] for place in range(SHOWN)]
    images = np.stack(lines)
    grid_png(images[..., None] if images.ndim == 3 else images, SHOWN, path, gap=GAP)


GAP = 2  # of `charts.grid_png`


def _ends(value: Value) -> tuple[float, float] | None:
    return None if value.low is None or value.high is None else (value.low, value.high)


def _value(record: Record, name: str) -> float:
    found: Any = record.quantity(name)
    return found.value if found else 0.0
