"""Records as tables: for the terminal, for the README and for the HTML report, all from the same rows.

A number is never shown without its interval and the number of images it rests on, where it has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..files import write_text
from .pareto import Better
from .record import Record, Value, in_order

if TYPE_CHECKING:
    from rich.table import Table as RichTable



class Described(Protocol):
    """What a report needs to know of a metric."""

    @property
    def unit(self) -> str:
        """As in `"dB"`, or `""`."""

    @property
    def better(self) -> Better:
        """Which way is better."""


Metrics = Mapping[str, Described]

COLUMNS = ("fid", "sfid", "fd_lite0", "throughput_ratio", "latency_ratio_batch1", "psnr", "size", "peak_memory",
           "run_macs", "trained_images")
"""The columns of the main table, as far as the records have them; a difference follows its metric."""

TITLES = {"psnr": "PSNR", "ssim": "SSIM", "fid": "FID", "sfid": "sFID", "kid": "KID", "macs": "MACs",
          "run_macs": "MACs per image", "size": "file size", "throughput_ratio": "throughput ratio",
          "latency_ratio_batch1": "latency ratio, batch 1",
          "trained_images": "images trained on", "training_seconds": "training time"}
ARROWS = {"lower": "↓", "higher": "↑"}


@dataclass(frozen=True)
class Cell:
    """A number as it is read: `41.2`, its interval `[39.8, 42.7]`, and its N where the heading does not say it."""

    text: str = ""
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".strip()


@dataclass(frozen=True)
class Heading:
    """A column: its metric, its title, which way is better, and the N that all its numbers share."""

    name: str
    title: str
    better: Better | None
    n: int | None

    def __str__(self) -> str:
        arrow = f" {ARROWS[self.better]}" if self.better else ""
        return f"{self.title}{arrow}" + (f" (N = {self.n:,})" if self.n is not None else "")


@dataclass(frozen=True)
class Row:
    """A record's line: its name, its numbers, and what is to be said of it."""

    name: str
    cells: tuple[Cell, ...]
    note: str


@dataclass(frozen=True)
class Table:
    """Headings and rows, ready to be drawn anywhere.

    Attributes:
        first: what the column of the rows' names is called.
        last: what that of their notes is called; None leaves it out.
    """

    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]
    first: str = "row"
    last: str | None = "verdict"


def table(records: Sequence[Record], metrics: Metrics, columns: Sequence[str] | None = None) -> Table:
    """The rows of records: baseline, A/A, then the others as given.

    Args:
        columns: names of metrics or comparisons; `COLUMNS` as far as present where not given.
    """
    ordered = in_order(records)
    headings = tuple(heading(name, ordered, metrics) for name in (columns or main_columns(ordered)))
    return Table(headings, tuple(
        Row(record.name, tuple(cell(record.quantity(head.name), head, metrics) for head in headings), note(record))
        for record in ordered))


def terminal_table(records: Sequence[Record], metrics: Metrics, columns: Sequence[str] | None = None, *,
                   width: int | None = None) -> RichTable:
    """The table for a terminal, intervals on a second line.

    Args:
        width: characters there are, the terminal's own where not given; columns that do not fit are left out, last
            first, and named below the table.
    """
    from rich.console import Console

    content = table(records, metrics, columns)
    shown = _fitting(content, Console().width if width is None else width)
    left_out = ", ".join(head.title for head in content.headings[shown:])
    return drawn(Table(content.headings[:shown], tuple(Row(row.name, row.cells[:shown], row.note)
                                                        for row in content.rows)),
                  f"Left out, as the terminal is narrow: {left_out}." if left_out else "")


def markdown(records: Sequence[Record], metrics: Metrics, columns: Sequence[str] | None = None) -> str:
    """The table in GitHub's Markdown."""
    return as_markdown(table(records, metrics, columns))


def as_markdown(content: Table) -> str:
    """A table in GitHub's Markdown."""
    lines = [[content.first, *(str(head) for head in content.headings), content.last or ""],
             ["---", *("---:" for _ in content.headings), "---"],
             *([row.name, *(str(cell) for cell in row.cells), row.note] for row in content.rows)]
    if content.last is None:
        lines = [line[:-1] for line in lines]
    return "\n".join("| " + " | ".join(_markdown_text(text) for text in line) + " |" for line in lines)


def update_markdown(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- table:NAME -->` and the next `<!-- /table -->` of a Markdown file.

    Raises:
        ValueError: the file does not hold this pair of markers exactly once.
    """
    begin, closing = opening(name), "<!-- /table -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    old, closed, after = rest.partition(closing)
    if not found or not closed or begin in rest or "<!-- table:" in old:
        raise ValueError(f"{path} must hold '{begin}' once and '{closing}' after it, for the table to go between")
    write_text(path, f"{before}{begin}\n{text.strip()}\n{closing}{after}")


def opening(name: str) -> str:
    """The marker after which a Markdown file has the table of that name."""
    return f"<!-- table:{name} -->"


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side: a table of `left → right`, and what keeps its numbers from being compared."""

    table: Table
    warnings: tuple[str, ...]


def compare(left: Sequence[Record], right: Sequence[Record], metrics: Metrics,
            columns: Sequence[str] | None = None) -> Comparison:
    """Put the rows of two runs side by side, by name; the second line of a cell says whether the intervals overlap."""
    lefts, rights = ({record.name: record for record in in_order(side)} for side in (left, right))
    both = [name for name in lefts if name in rights]
    everything = [*left, *right]
    headings = tuple(heading(name, everything, metrics) for name in (columns or main_columns(everything)))
    rows = tuple(Row(name, tuple(_compared(lefts[name], rights[name], head, metrics) for head in headings),
                     "; ".join(filter(None, (_either(told, lefts[name], rights[name]) for told in (note, sampled)))))
                 for name in both)
    alone = [*(f"row {name!r} is in the first run only" for name in lefts if name not in rights),
             *(f"row {name!r} is in the second run only" for name in rights if name not in lefts)]
    differences = [*_differences("protocol", [(lefts[name].protocol, rights[name].protocol) for name in both], None),
                   *_differences("provenance", [(lefts[name].provenance, rights[name].provenance) for name in both],
                                 ("commit", "cpu", "gpu", "device", "threads", "dtype", "versions"))]
    return Comparison(Table(headings, rows), (*differences, *alone))


def comparison_table(comparison: Comparison) -> RichTable:
    """A comparison for a terminal."""
    return drawn(comparison.table, "\n".join(f"Not alike: {warning}." for warning in comparison.warnings))


def main_columns(records: Sequence[Record]) -> list[str]:
    """Those of `COLUMNS` that some record has, each followed by its difference to the baseline."""
    candidates = [name for column in COLUMNS for name in (column, f"{column}_difference")]
    return [name for name in candidates if any(record.quantity(name) for record in records)]


def distances(records: Sequence[Record]) -> list[str]:
    """The distribution distances that any record has: what quality is judged by."""
    return [name for name in dict.fromkeys(name for record in records for name in record.metrics)
            if name.startswith(("fid", "sfid", "fd_"))]


def heading(name: str, records: Sequence[Record], metrics: Metrics) -> Heading:
    """The heading of a column; its N where all records that have an N share one."""
    values = [record.quantity(name) for record in records]
    counts = {value.n for value in values if value is not None and value.n is not None}
    return Heading(name, title(name), better(name, metrics), counts.pop() if len(counts) == 1 else None)


def title(name: str) -> str:
    """What a metric or a comparison is called in a heading."""
    if name.endswith("_difference"):
        return f"Δ {title(name.removesuffix('_difference'))}"
    if name in TITLES or name.startswith("fd_"):
        return TITLES.get(name, name)
    return name.replace("_", " ")


def better(name: str, metrics: Metrics) -> Better | None:
    """Which way a metric is better; a difference is better the way its metric is. None where that is not known.

    A ratio is the baseline's time over the row's, whatever its name: above 1 the row is faster.
    """
    known = metrics.get(name) or metrics.get(name.removesuffix("_difference"))
    return known.better if known else "higher" if "_ratio" in name else None


def cell(value: Value | None, head: Heading, metrics: Metrics) -> Cell:
    """A value as it is read under a heading."""
    if value is None:
        return Cell()
    known = metrics.get(head.name) or metrics.get(head.name.removesuffix("_difference"))
    text, interval = number(value, unit=value.unit or (known.unit if known else ""),
                            signed=head.name.endswith("_difference"))
    count = f"N = {value.n:,}" if value.n is not None and value.n != head.n else ""
    return Cell(text, " ".join(part for part in (interval, count) if part))


def number(value: Value, *, unit: str | None = None, signed: bool = False) -> tuple[str, str]:
    """A value and its interval as text: ("41.2", "[39.8, 42.7]"), ("1.85x", "[1.80, 1.91]"), ("3.9 MB", "").

    As many decimals as the interval's width deserves, or three figures where there is none.
    """
    factor, suffix = _scale(value.unit if unit is None else unit, value.value)
    ends = [end * factor for end in (value.low, value.high) if end is not None]
    scaled = value.value * factor
    decimals = _decimals(scaled, ends) if suffix != "x" else 2
    sign = "+" if signed else ""

    def text(x: float) -> str:
        rounded = round(x, decimals) + 0.0 if math.isfinite(x) else x  # + 0.0 turns -0.0 into 0.0
        return f"{rounded:{sign if rounded else ''},.{decimals}f}" if math.isfinite(x) else ("∞" if x > 0 else "-∞")

    shown = text(scaled) + (suffix if suffix in ("x", "%") else f" {suffix}" if suffix else "")
    return shown, f"[{text(ends[0])}, {text(ends[1])}]" if ends else ""


def note(record: Record) -> str:
    """What is to be said of a row: its verdict and remarks, or how and why it ended early."""
    said = [record.verdict, *record.remarks]
    if record.status != "done":
        said.insert(0, f"{record.status.replace('_', ' ')}: {record.reason}")
    return "; ".join(part for part in said if part)


def sampled(record: Record) -> str:
    """How a row's images were made: `ddim, 50 steps, 10 of them whole, guidance 1.5`, where the record says."""
    how = dict(record.protocol.get("row_sampling") or {})
    if how.get("cache"):
        how["whole"] = len(how["cache"]["full"])
    return ", ".join(text.format(how[name]) for name, text in (
        ("solver", "{}"), ("steps", "{} steps"), ("whole", "{} of them whole"), ("guidance", "guidance {:g}"))
        if name in how)


def _either(told: Callable[[Record], str], left: Record, right: Record) -> str:
    return " → ".join(dict.fromkeys((told(left), told(right))))


def drawn(content: Table, caption: str = "") -> RichTable:
    """A table for a terminal, intervals on a second line."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(box=box.SIMPLE_HEAD, show_lines=True, caption=Text(caption) if caption else None,
                      caption_justify="left")
    made.add_column("row", overflow="fold", min_width=8)
    for head in content.headings:
        made.add_column(Text("\n".join(_heading_lines(head))), justify="right", no_wrap=True)
    made.add_column("verdict", overflow="fold", min_width=12)
    for row in content.rows:
        cells = [Text(cell.text).append(f"\n{cell.interval}" if cell.interval else "", style="dim")
                 for cell in row.cells]
        made.add_row(Text(row.name, style="bold"), *cells, Text(row.note))
    return made


def _heading_lines(head: Heading) -> list[str]:
    words = f"{head.title} {ARROWS[head.better] if head.better else ''}".split()
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < 12:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [*lines, *([f"N = {head.n:,}"] if head.n is not None else [])]


def _fitting(content: Table, width: int) -> int:
    """How many columns of numbers fit beside the rows' names and verdicts."""
    left = width - 32
    for place, head in enumerate(content.headings):
        texts = [*_heading_lines(head), *(text for row in content.rows
                                          for text in (row.cells[place].text, row.cells[place].interval))]
        left -= max(map(len, texts)) + 2
        if left < 0:
            return max(1, place)
    return len(content.headings)


def _scale(unit: str, value: float) -> tuple[float, str]:
    """Factor and unit in which a number reads well."""
    size = abs(value) if math.isfinite(value) else 1.0
    if unit == "bytes":
        return (1e-9, "GB") if size >= 1e9 else (1e-6, "MB") if size >= 1e5 else (1e-3, "kB")
    if unit in ("MACs", "FLOPs", "parameters"):
        for factor, prefix in ((1e-12, "T"), (1e-9, "G"), (1e-6, "M")):
            if size * factor >= 1:
                return factor, prefix
        return 1.0, ""
    if unit in ("s", "seconds"):
        return (1e3, "ms") if size < 1 else (1.0, "s")
    return 1.0, "x" if unit == "ratio" else unit


def _decimals(value: float, ends: Sequence[float]) -> int:
    width = ends[1] - ends[0] if ends else 0.0
    if width > 0 and math.isfinite(width):
        return min(5, max(0, 1 - math.floor(math.log10(width))))
    if value == 0 or not math.isfinite(value) or (value == round(value) and abs(value) < 1e6):
        return 0
    return min(5, max(0, 2 - math.floor(math.log10(abs(value)))))


def _compared(left: Record, right: Record, head: Heading, metrics: Metrics) -> Cell:
    one, other = left.quantity(head.name), right.quantity(head.name)
    if one is None and other is None:
        return Cell()
    text = " → ".join(str(cell(value, head, metrics).text) or "none" for value in (one, other))
    if one is None or other is None or one.low is None or one.high is None or other.low is None or other.high is None:
        return Cell(text)
    apart = one.high < other.low or other.high < one.low
    return Cell(text, "apart" if apart else "intervals overlap")


def _differences(what: str, pairs: Sequence[tuple[Mapping[str, object], Mapping[str, object]]],
                 keys: Sequence[str] | None) -> list[str]:
    said: dict[str, None] = {}
    for one, other in pairs:
        for key in keys or sorted({*one, *other}):
            a, b = one.get(key), other.get(key)
            if isinstance(a, Mapping) and isinstance(b, Mapping):
                said.update(dict.fromkeys(_differences(f"{what}: {key}", [(a, b)], None)))
            elif a != b:
                said[f"{what}: {key} is {a!r} in the first run and {b!r} in the second"] = None
    return list(said)


def _markdown_text(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.replace("\\", "\\\\").replace("|", "\\|").split())
