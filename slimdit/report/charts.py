"""Small pictures for folders and documents: a plot or a heat map as SVG, a sheet of sample images as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..files import writing

TIMESTEPS = 1000  # of the noise process, which bins divide
COLORS = ("#2a78d6", "#c8552d", "#2e9e6b", "#8a5cc2", "#b08a1e")
CAPTION_HEIGHT = 14  # pixels under each image of a labelled sheet


@dataclass(frozen=True)
class Point:
    """A place in a plot.

    Attributes:
        x_ends, y_ends: the ends of its intervals, drawn as bars.
        name: written beside it.
        hollow: drawn as a ring that tells its name to a pointer only, for what stands behind.
    """

    x: float
    y: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None
    name: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: in the legend, where there is more than one series.
        line: whether they are joined, in the order given: `"solid"`, `"dotted"` or not at all.
        marks: whether each is drawn as a dot.
    """

    points: Sequence[Point]
    name: str = ""
    line: Literal["solid", "dotted", ""] = ""
    marks: bool = True


def plot_svg(series: Sequence[Series], *, title: str = "", x: str = "", y: str = "", log_x: bool = False,
             log_y: bool = False, width: int = 760, height: int = 440) -> str:
    """Series of points with intervals and names as an SVG document that needs nothing else.

    Raises:
        ValueError: no points, a point that is not finite, or one that is not above 0 on a logarithmic axis.
    """
    points = [point for one in series for point in one.points]
    if not points:
        raise ValueError("a plot needs at least 1 point")
    across, up = (_Axis.of([value for point in points for value in ((getattr(point, name)), *(
        getattr(point, f"{name}_ends") or ()))], log) for name, log in (("x", log_x), ("y", log_y)))
    legend = [one.name for one in series if one.name] if len(series) > 1 else []
    left, right, top, bottom = 64, 20, (36 if title else 16) + 18 * len(legend), 48
    across = across.roomier(0.12 if any(point.name for point in points) else 0.0)

    def place(point_x: float, point_y: float) -> tuple[float, float]:
        return (left + across.share(point_x) * (width - left - right),
                height - bottom - up.share(point_y) * (height - top - bottom))

    parts = []
    for tick in up.ticks():
        _, at = place(across.low, tick)
        parts.append(f'<line x1="{left}" y1="{at:.1f}" x2="{width - right}" y2="{at:.1f}" stroke="#8884"/>'
                     f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in across.ticks():
        at, _ = place(tick, up.low)
        parts.append(f'<text x="{at:.1f}" y="{height - bottom + 18}" text-anchor="middle">{_short(tick)}</text>')
    named = {str(number): place(point.x, point.y) for number, point in enumerate(points)
             if point.name and not point.hollow}
    positions = label_places(named, {str(number): point.name for number, point in enumerate(points)}, 6.2, 13)
    number = 0
    for order, one in enumerate(series):
        color = COLORS[order % len(COLORS)]
        if one.line:
            dots = ["{:.1f},{:.1f}".format(*place(point.x, point.y)) for point in one.points]
            dash = ' stroke-dasharray="2 4"' if one.line == "dotted" else ""
            parts.append(f'<polyline points="{" ".join(dots * 2 if len(dots) == 1 else dots)}" fill="none" '
                         f'stroke="{color}" stroke-width="1.5" stroke-linejoin="round" stroke-linecap="round"{dash}/>')
        for point in one.points:
            if one.marks:
                parts += _mark(point, place, color, positions.get(str(number)))
            number += 1
        if one.name in legend:
            line = (36 if title else 16) + 18 * legend.index(one.name)
            parts.append(f'<rect x="{left}" y="{line - 9}" width="10" height="10" fill="{color}"/>'
                         f'<text x="{left + 16}" y="{line}">{escape(one.name)}</text>')
    return _document(parts, width, height, title or f"{y} over {x}", title, left) + (
        f'<text x="{left + (width - left - right) / 2:.1f}" y="{height - 8}" text-anchor="middle">{escape(x)}</text>\n'
        f'<text transform="translate(14 {top + (height - top - bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y)}</text>\n</svg>\n")


def curve_svg(points: Sequence[tuple[float, float]], *, title: str = "", x: str = "images", y: str = "loss",
              log_y: bool = False, width: int = 640, height: int = 320) -> str:
    """A line through (x, y) points as an SVG document that needs nothing else; x and y are what the axes are called.

    Raises:
        ValueError: as `plot_svg`.
    """
    line = Series([Point(across, up) for across, up in points], line="solid", marks=False)
    return plot_svg([line], title=title, x=x, y=y, log_y=log_y, width=width, height=height)


def _mark(point: Point, place: Callable[[float, float], tuple[float, float]], color: str,
          label: tuple[float, float, str] | None) -> list[str]:
    """A dot with its bars and its name."""
    at_x, at_y = place(point.x, point.y)
    parts = []
    for ends in ([(place(end, point.y)) for end in point.x_ends] if point.x_ends else [],
                 [(place(point.x, end)) for end in point.y_ends] if point.y_ends else []):
        if ends:
            (x1, y1), (x2, y2) = ends
            parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
                         'stroke-opacity=".55"/>')
    fill = "none" if point.hollow else color
    told = f"<title>{escape(point.name)}: {point.x:.4g}, {point.y:.4g}</title>" if point.name else ""
    parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="{fill}" stroke="{color}">{told}</circle>')
    if label:
        x, y, anchor = label
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11">{escape(point.name)}</text>')
    return parts


def label_places(places: Mapping[str, tuple[float, float]], texts: Mapping[str, str], letter: float,
                 line: float) -> dict[str, tuple[float, float, str]]:
    """Where the name of each point stands, in pixels down the page: where it covers the least of names and points.

    Args:
        places: pixels of each point.
        texts: what is written beside it.
        letter, line: the size of a letter and of a line, in pixels.

    Returns:
        x, y of the text's baseline, and its anchor.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places.values()]
    found = {}
    for name, (x, y) in sorted(places.items(), key=lambda item: item[1]):
        wide = letter * len(texts[name])
        boxes = {(x + shift, y + drop, anchor): (x + shift - wide * part, y + drop - line + 3, x + shift
                                                 + wide * (1 - part), y + drop + 3)
                 for anchor, shift, part in (("start", 7, 0.0), ("end", -7, 1.0), ("middle", 0, 0.5))
                 for drop in ((4, -7, 15, -20, 28) if anchor != "middle" else (-9, 18, -22, 31))}
        found[name] = min(boxes, key=lambda at: sum(overlap(boxes[at], box) for box in taken))
        taken.append(boxes[found[name]])
    return found


Box = tuple[float, float, float, float]


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes (left, top, right, bottom) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class _Axis:
    """From the least to the most of some values, logarithmic or not."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], log: bool) -> _Axis:
        if not all(math.isfinite(value) and (value > 0 or not log) for value in values):
            raise ValueError("a plot's points must be finite, and above 0 on a logarithmic axis")
        return cls(min(values), max(values), log)

    def place(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def share(self, value: float) -> float:
        low, high = self.place(self.low), self.place(self.high)
        return (self.place(value) - low) / ((high - low) or 1)

    def roomier(self, share: float) -> _Axis:
        low, high = self.place(self.low), self.place(self.high)
        low, high = low - share * (high - low), high + share * (high - low)
        return _Axis(10 ** low, 10 ** high, True) if self.log else _Axis(low, high, False)

    def ticks(self) -> list[float]:
        if self.log:
            return [10 ** tick for tick in _log_ticks(math.log10(self.low), math.log10(self.high))]
        return _ticks(self.low, self.high)


def heat_map_svg(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], *,
                 title: str = "") -> str:
    """Values by row and column as an SVG document that needs nothing else: a darker cell is a larger value.

    The shades are logarithmic, from the smallest value above 0 to the largest; 0 stays blank.

    Raises:
        ValueError: no cell, another number of values than of cells, or a value that is not finite or is below 0.
    """
    if not rows or not columns or [len(row) for row in values] != [len(columns)] * len(rows):
        raise ValueError(f"a heat map of {len(rows)} rows and {len(columns)} columns needs a value for each cell")
    if not all(math.isfinite(value) and value >= 0 for row in values for value in row):
        raise ValueError("a heat map's values must be finite and at least 0")
    logarithms = [math.log10(value) for row in values for value in row if value > 0] or [0.0]
    low, high = min(logarithms), max(logarithms)
    left, top, wide, tall = 16 + 7 * max(map(len, rows)), 60 if title else 36, 84, 20
    width, height = left + wide * len(columns) + 16, top + tall * len(rows) + 16

    def cell(across: int, down: int, value: float) -> str:
        shade = 0.08 + 0.92 * (math.log10(value) - low) / ((high - low) or 1) if value > 0 else 0.0
        x, y = left + wide * across, top + tall * down
        return (f'<rect x="{x}" y="{y}" width="{wide - 1}" height="{tall - 1}" fill="#2a78d6" '
                f'fill-opacity="{shade:.3f}"/>'
                f'<text x="{x + wide / 2:.0f}" y="{y + 14}" text-anchor="middle" '
                f'fill="{"#fff" if shade > 0.5 else "#777"}">{value:.2g}</text>')

    names = [f'<text x="{left + wide * (across + 0.5):.0f}" y="{top - 10}" text-anchor="middle">{escape(name)}</text>'
             for across, name in enumerate(columns)]
    names += [f'<text x="{left - 8}" y="{top + tall * down + 14}" text-anchor="end">{escape(name)}</text>'
              for down, name in enumerate(rows)]
    cells = [cell(across, down, value) for down, row in enumerate(values) for across, value in enumerate(row)]
    return _document([*names, *cells], width, height, title or "heat map", title, 16) + "</svg>\n"


def _document(parts: Sequence[str], width: int, height: int, told: str, title: str, left: int) -> str:
    """The beginning of an SVG document, with what it holds: its end is still to come."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="#777">\n'
            f"<title>{escape(told)}</title>\n"
            + (f'<text x="{left}" y="20" font-size="14" font-weight="600">{escape(title)}</text>\n' if title else "")
            + "\n".join(parts) + "\n")


def routing_svg(routing: Mapping[str, Mapping[str, Any]]) -> str:
    """What a witness says of routing, as a heat map: for each block and timestep bin each expert's share of uses."""
    rows, values = [], []
    for name, summary in routing.items():
        width = TIMESTEPS // len(summary["load"])
        for number, load in reversed(list(enumerate(summary["load"]))):
            rows.append(f"{name}, t {number * width}..{(number + 1) * width - 1}")
            values.append(load)
    return heat_map_svg(rows, [f"expert {number}" for number in range(len(values[0]))], values,
                        title="Share of uses by expert")


def grid_png(images: np.ndarray, columns: int, path: Path, *, scale: int = 1,
             labels: Sequence[str] | None = None, gap: int = 2) -> None:
    """Write a sheet of images, row by row, as a PNG.

    Args:
        images: uint8, (images, height, width, 1 or 3).
        scale: each pixel becomes a square of so many.
        labels: a short caption for each image, under it.
        gap: pixels between images.

    Raises:
        ValueError: the array, the columns, the scale or the number of labels does not fit.
    """
    from PIL import Image, ImageDraw

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError("a sheet needs uint8 images, (images, height, width, 1 or 3), "
                         f"not {images.dtype} {images.shape}")
    if columns < 1 or scale < 1:
        raise ValueError(f"a sheet needs at least 1 column and scale 1, not {columns} and {scale}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} images have {len(labels)} labels: give one for each, or none")
    columns = min(columns, len(images))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    step_x, step_y = width + gap, height + gap + (CAPTION_HEIGHT if labels is not None else 0)
    mode, paper, ink = ("L", 255, 64) if images.shape[-1] == 1 else ("RGB", (255,) * 3, (64,) * 3)
    sheet = Image.new(mode, (columns * step_x + gap, -(-len(images) // columns) * step_y + gap), paper)
    draw = ImageDraw.Draw(sheet)
    for place, image in enumerate(images):
        x, y = gap + place % columns * step_x, gap + place // columns * step_y
        picture = Image.fromarray(image[..., 0] if mode == "L" else image)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if labels is not None:
            draw.text((x, y + height + 1), labels[place], fill=ink)
    with writing(path) as beside:
        sheet.save(beside, format="PNG", optimize=True)


def _ticks(low: float, high: float) -> list[float]:
    """Some five round numbers between two."""
    if high <= low:
        return [low]
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 of every decade between two logarithms, or of more where these are few."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), [step / 10 for step in range(10, 100)]):
        ticks = [decade + math.log10(step) for decade in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        if len(inside := [tick for tick in ticks if low <= tick <= high]) > 3:
            return inside if len(inside) < 12 else inside[::len(inside) // 6]
    return [low, high]


def _short(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:.3g}"
