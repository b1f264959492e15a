"""What slimdit.report.record promises: whole records come back equal, damaged ones are refused, no PyTorch to read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from slimdit.report.record import (
    AA,
    BASELINE,
    SCHEMA,
    Record,
    Value,
    in_order,
    provenance,
    read,
    read_all,
    record_path,
    write,
)

from .example_records import example_records


@pytest.mark.parametrize("record", example_records(), ids=lambda record: record.name)
def test_a_record_comes_back_equal(record: Record, tmp_path: Path) -> None:
    path = write(record, tmp_path)
    assert path == record_path(tmp_path, record.name)
    assert path.parent == tmp_path
    assert read(path) == record


def test_infinity_comes_back_and_nan_is_refused(tmp_path: Path) -> None:
    record = Record("same", metrics={"psnr": Value(math.inf, 40.0, math.inf, 8, "dB")})
    assert read(write(record, tmp_path)) == record
    assert json.loads(record_path(tmp_path, "same").read_text())["metrics"]["psnr"]["value"] == "inf"
    with pytest.raises(ValueError, match="NaN"):
        Value(math.nan)


@pytest.mark.parametrize(("arguments", "said"), [
    ((1.0, 0.5), "both ends"), ((1.0, 2.0, 1.0), "from low to high"), (("1",), "number"),
    ((1.0, None, None, 2.5), "int"),
])
def test_wrong_values_are_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Value(*arguments)


@pytest.mark.parametrize(("fields", "said"), [
    ({"name": " "}, "1 to 80"), ({"name": "x", "status": "fine"}, "status"), ({"name": "x", "status": "failed"}, "why"),
    ({"name": "x", "metrics": {"fid": 3.0}}, "fid"), ({"name": "x", "colour": "red"}, "colour"),
])
def test_wrong_records_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Record(**fields)


def test_what_json_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for witness in ({"norm": math.nan}, {"thing": object()}):
        with pytest.raises(ValueError, match="'odd' cannot be written"):
            write(Record("odd", witness=[witness]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    path = write(Record("row", metrics={"size": Value(100.0, unit="bytes")}), tmp_path)
    path.write_text(path.read_text().replace("100.0", "50.0"))
    with pytest.raises(ValueError, match="changed after it was written"):
        read(path)


def test_indentation_is_not_content(tmp_path: Path) -> None:
    record = Record("row", metrics={"size": Value(100.0, unit="bytes")})
    path = write(record, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=None, sort_keys=True))
    assert read(path) == record


def test_damaged_and_foreign_files_get_a_sentence(tmp_path: Path) -> None:
    path = write(Record("row"), tmp_path)
    whole = path.read_text()
    path.write_text(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="not whole JSON"):
        read(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="not a slimdit record"):
        read(path)
    path.write_text(whole.replace(f'"schema": {SCHEMA}', '"schema": 99'))
    with pytest.raises(ValueError, match="schema 99"):
        read(path)


def test_names_are_file_names_that_never_meet(tmp_path: Path) -> None:
    names = ["A/A", "A A", "A-A", "../up", "..", "a\\b", "a:b", "ä", "<b>"]
    paths = [write(Record(name), tmp_path) for name in names]
    assert len(set(paths)) == len(names)
    assert {path.parent for path in paths} == {tmp_path}
    assert {record.name for record in read_all(tmp_path)} == set(names)


def test_all_are_read_baseline_first_then_by_date(tmp_path: Path) -> None:
    for name, date in ((BASELINE, "3"), ("late", "2"), ("early", "1"), (AA, "4")):
        write(Record(name, provenance={"date": date}), tmp_path)
    assert [record.name for record in read_all(tmp_path)] == [BASELINE, AA, "early", "late"]
    assert [record.name for record in in_order([Record("b"), Record("a"), Record(BASELINE)])] == [BASELINE, "b", "a"]
    with pytest.raises(FileNotFoundError, match="no records"):
        read_all(tmp_path / "nowhere")


def test_provenance_says_where_numbers_come_from() -> None:
    facts = provenance(seeds={"images": 3}, threads=2, command=["slimdit", "bench", "my recipe.toml"])
    assert facts["command"] == "slimdit bench 'my recipe.toml'"
    assert facts["seeds"] == {"images": 3}
    assert facts["threads"] == 2
    assert facts["schema"] == SCHEMA
    assert facts["cpu"]
    assert {"python", "torch", "numpy"} <= facts["versions"].keys()
    assert facts["commit"] is None or (len(facts["commit"]) == 40 and isinstance(facts["dirty"], bool))
    json.dumps(facts)


def test_reading_records_imports_no_pytorch() -> None:
    code = ("import sys, slimdit.report.record, slimdit.report.render, slimdit.report.html, slimdit.report.charts\n"
            "slimdit.report.record.provenance()\nassert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
