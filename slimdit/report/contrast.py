"""Rows beside their controls: what a method is worth beyond what else was done to the model, image by image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..files import write_json
from .record import STRICT, Record, Value, content_hash
from .render import Cell, Heading, Metrics, Row, Table, better, cell, distances, heading

SCHEMA = 1


@dataclass(frozen=True, config=STRICT)
class Contrast:
    """A row and one of its controls, whose images come from the same noise and labels.

    Attributes:
        row, control: names of the two rows.
        images: the hashes of their images.
        differences: `<metric>_difference`, the row's minus the control's, and the paired fidelity of the two.
    """

    row: str
    control: str
    images: tuple[str, str]
    differences: dict[str, Value]

    def is_of(self, row: Record, control: Record) -> bool:
        """Whether these are the images of the two records."""
        return bool(row.images and control.images) and self.images == (images_of(row), images_of(control))


CONTRASTS = TypeAdapter(list[Contrast])


def images_of(record: Record) -> str:
    """The hash of a row's images, empty where it has none."""
    return record.images.sha256 if record.images else ""


def write(contrasts: Sequence[Contrast], path: Path) -> None:
    """Write the contrasts of a row, with the hash of their content."""
    content = json.loads(json.dumps({"schema": SCHEMA, "contrasts": CONTRASTS.dump_python(list(contrasts),
                                                                                          mode="json")}))
    write_json(path, {**content, "sha256": content_hash(content)})


def read(path: Path) -> list[Contrast]:
    """The contrasts in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not whole, was changed after it was written, or has another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("sha256") != content_hash(content) or content["schema"] != SCHEMA:
            raise ValueError("its hash or its schema is another")
        return CONTRASTS.validate_json(json.dumps(content["contrasts"]))
    except (ValueError, ValidationError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold contrasts as slimdit wrote them ({error}): remove it, and bench with "
                         "--resume") from error


def contrast_table(contrasts: Sequence[Contrast], records: Sequence[Record], metrics: Metrics) -> Table:
    """A line for every row and control: the difference in quality, what it says, and what either cost.

    A difference of which the interval holds zero tells nothing apart.
    """
    named = {record.name: record for record in records}
    judged = [f"{name}_difference" for name in distances(records)]
    counts = {value.n for one in contrasts for name, value in one.differences.items() if name in judged}
    heads = [Heading(name, heading(name, [], metrics).title, better(name, metrics),
                     counts.pop() if len(counts) == 1 else None) for name in judged]
    costs = [heading(name, [], metrics) for name in ("run_macs", "parameters", "trained_images", "training_seconds")]

    def line(one: Contrast) -> Row:
        pair = named[one.row], named[one.control]
        cells = [Cell(one.control), *(cell(one.differences.get(head.name), head, metrics) for head in heads),
                 *(_both(head, pair, metrics) for head in costs)]
        return Row(one.row, tuple(cells), says(one, heads))

    return Table((Heading("control", "beside", None, None), *heads, *costs), tuple(line(one) for one in contrasts))


def says(contrast: Contrast, heads: Sequence[Heading]) -> str:
    """`better`, `worse` or `not told apart` for each distance, once where they agree."""
    return "; ".join(dict.fromkeys(side(contrast.differences[head.name], head) for head in heads
                                   if head.name in contrast.differences))


def side(value: Value, head: Heading) -> str:
    """`better`, `worse`, or `not told apart` where the interval of a difference holds zero."""
    if value.low is None or value.high is None or value.low <= 0 <= value.high:
        return "not told apart"
    return "better" if (value.high < 0) == (head.better == "lower") else "worse"


def _both(head: Heading, pair: tuple[Record, Record], metrics: Metrics) -> Cell:
    texts = [cell(record.quantity(head.name), head, metrics).text for record in pair]
    return Cell(" / ".join(text or "0" for text in texts)) if any(texts) else Cell()


def of_records(folder: Path, records: Mapping[str, Record]) -> list[Contrast]:
    """The contrasts kept in a folder that are of these records' images."""
    found = [one for path in sorted(folder.glob("*.json")) for one in read(path)]
    return [one for one in found if one.row in records and one.control in records
            and one.is_of(records[one.row], records[one.control])]
