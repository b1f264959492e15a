"""What slimdit.report.repeats promises: other seeds stand apart, and a finding is one only where seeds agree."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slimdit.report.contrast import Contrast
from slimdit.report.record import BASELINE, Record, Value
from slimdit.report.repeats import apart, seed_table

from .example_records import METRICS, made_up


def rows(*names: str) -> list[Record]:
    return [made_up(name, 38.0, 1.0) for name in (BASELINE, *names)]


def beside(row: str, control: str, low: float, high: float) -> Contrast:
    return Contrast(row, control, ("", ""), {"fd_lite0_difference": Value((low + high) / 2, low, high, 512)})


def test_rows_of_other_seeds_are_told_by_the_row_they_repeat() -> None:
    records = rows("student", "student-seed1", "student-seed2", "stranger-seed1")
    firsts, again = apart(records)
    assert [record.name for record in firsts] == [BASELINE, "student", "stranger-seed1"]
    assert {name: sorted(others) for name, others in again.items()} == {"student": ["1", "2"]}


@pytest.mark.parametrize(("first", "second", "said"), [
    ((-3.0, -1.0), (-4.0, -2.0), "better with every seed"), ((1.0, 3.0), (0.5, 2.0), "worse with every seed"),
    ((-3.0, -1.0), (-1.0, 2.0), "depends on the seed: better, not told apart"),
    ((-1.0, 1.0), (-2.0, 2.0), "not told apart with every seed")])
def test_a_line_says_what_all_seeds_say(first: tuple, second: tuple, said: str) -> None:
    records = rows("student", "student-seed1", "control", "control-seed1")
    contrasts = [beside("student", "control", *first), beside("student-seed1", "control-seed1", *second),
                 beside("student-seed1", "student", -9.0, 9.0)]
    table = seed_table(contrasts, records, METRICS)
    lines = {(row.name, row.cells[0].text): row for row in table.rows}
    assert set(lines) == {("student", BASELINE), ("student", "control"), ("control", BASELINE)}
    assert lines["student", "control"].note == said
    assert [cell.interval for cell in lines["student", "control"].cells[1:]] != ["", ""]


def test_a_control_without_the_other_seed_is_left_out() -> None:
    table = seed_table([beside("student", "control", 1.0, 2.0)], rows("student", "student-seed1", "control"), METRICS)
    assert [row.cells[0].text for row in table.rows] == [BASELINE]


def test_without_other_seeds_there_is_no_line() -> None:
    assert seed_table([], rows("student"), METRICS).rows == ()


def test_the_baseline_beside_which_a_row_is_judged_is_every_seeds_own() -> None:
    record = made_up("student-seed1", 38.0, 1.0)
    worse = replace(record, against_baseline={"fd_lite0_difference": Value(3.0, 2.0, 4.0)})
    better = made_up("student", 36.0, 1.0)
    line, = seed_table([], [made_up(BASELINE, 38.0, 1.0), better, worse], METRICS).rows
    assert line.note == "depends on the seed: better, worse"


def test_a_row_whose_other_seed_ended_badly_is_left_out() -> None:
    failed = Record("student-seed1", status="interrupted", reason="stopped")
    assert seed_table([], [*rows("student"), failed], METRICS).rows == ()
