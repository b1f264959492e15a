"""Small pictures for folders and documents: a curve or a heat map as SVG, a sheet of sample images as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..files import writing

TIMESTEPS = 1000  # of the noise process, which bins divide
CAPTION_HEIGHT = 14  # pixels under each image of a labelled sheet


def curve_svg(points: Sequence[tuple[float, float]], *, title: str = "", x: str = "images", y: str = "loss",
              log_y: bool = False, width: int = 640, height: int = 320) -> str:
    """A line through (x, y) points as an SVG document that needs nothing else; x and y are what the axes are called.

    Raises:
        ValueError: no points, a point that is not finite, or y not above 0 on a logarithmic axis.
    """
    if not points:
        raise ValueError("a curve needs at least 1 point")
    if not all(math.isfinite(across) and math.isfinite(up) and (up > 0 or not log_y) for across, up in points):
        raise ValueError("a curve's points must be finite, and above 0 on a logarithmic axis")
    xs, ys = [across for across, _ in points], [math.log10(up) if log_y else up for _, up in points]
    x_ticks = _ticks(min(xs), max(xs))
    y_ticks = _log_ticks(min(ys), max(ys)) if log_y else _ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(*ys, *y_ticks), max(*ys, *y_ticks)
    left, right, top, bottom = 64, 16, 36 if title else 16, 48

    def place(across: float, up: float) -> tuple[float, float]:
        return (left + (across - x_low) / ((x_high - x_low) or 1) * (width - left - right),
                top + (y_high - up) / ((y_high - y_low) or 1) * (height - top - bottom))

    parts = []
    for tick in y_ticks:
        _, at = place(x_low, tick)
        label = _short(10 ** tick if log_y else tick)
        parts.append(f'<line x1="{left}" y1="{at:.1f}" x2="{width - right}" y2="{at:.1f}" stroke="#8884"/>'
                     f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        at, _ = place(tick, y_low)
        parts.append(f'<text x="{at:.1f}" y="{height - bottom + 18}" text-anchor="middle">{_short(tick)}</text>')
    dots = ["{:.1f},{:.1f}".format(*place(across, up)) for across, up in zip(xs, ys)]
    line = " ".join(dots * 2 if len(dots) == 1 else dots)  # one point twice is drawn as a dot
    center, middle = left + (width - left - right) / 2, top + (height - top - bottom) / 2
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="#777">\n'
            f"<title>{escape(title or f'{y} over {x}')}</title>\n"
            + (f'<text x="{left}" y="20" font-size="14" font-weight="600">{escape(title)}</text>\n' if title else "")
            + "\n".join(parts)
            + f'\n<polyline points="{line}" fill="none" stroke="#2a78d6" stroke-width="1.5" stroke-linejoin="round" '
            'stroke-linecap="round"/>\n'
            f'<text x="{center:.1f}" y="{height - 8}" text-anchor="middle">{escape(x)}</text>\n'
            f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>\n'
            "</svg>\n")


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
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="#777">\n'
            f"<title>{escape(title or 'heat map')}</title>\n"
            + (f'<text x="16" y="20" font-size="14" font-weight="600">{escape(title)}</text>\n' if title else "")
            + "\n".join([*names, *cells]) + "\n</svg>\n")


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
    """Logarithms of 1, 2 and 5 of every decade between two logarithms, or these two where there are none."""
    ticks = [decade + math.log10(step) for decade in range(math.floor(low), math.ceil(high) + 1) for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high] or [low, high]


def _short(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:.3g}"
