"""What slimdit.report.stacks promises: a stack is found by its methods, and its parts' numbers are put together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from slimdit.report.record import BASELINE, Record
from slimdit.report.render import as_markdown
from slimdit.report.stacks import stack_table, stacks

from .example_records import METRICS, made_up

FEWER, INTEGERS, CACHE = ({"reduce_steps": {"steps": 10}}, {"quantize": {"weights": "int8"}},
                          {"cache_blocks": {"every": 2}})


def row(name: str, *methods: dict, fd: float = 40.0, speed: float = 2.0, size: float = 5e6) -> Record:
    return made_up(name, fd, speed, size=size, recipe={"methods": list(methods)})


def bench() -> list[Record]:
    return [made_up(BASELINE, 38.0, 1.0, size=1e7), row("fewer", FEWER, fd=39.0, speed=2.0, size=1e7),
            row("integers", INTEGERS, fd=38.5, speed=1.5, size=2.5e6),
            row("both", FEWER, INTEGERS, fd=40.0, speed=2.9, size=2.5e6)]


def test_a_stack_is_a_row_whose_methods_are_those_of_others_in_order() -> None:
    other_way = row("other-way", INTEGERS, FEWER)
    unknown = row("unknown", FEWER, CACHE)
    found = {one.row.name: [part.name for part in one.parts] for one in stacks([*bench(), other_way, unknown])}
    assert found == {"both": ["fewer", "integers"], "other-way": ["integers", "fewer"]}


def test_as_few_parts_as_go_and_only_rows_that_were_measured() -> None:
    three = row("three", FEWER, INTEGERS, CACHE)
    cache = row("cache", CACHE)
    found = {one.row.name: [part.name for part in one.parts] for one in stacks([*bench(), three, cache])}
    assert found["three"] == ["both", "cache"]
    failed = [replace(record, status="failed", reason="x") if record.name == "integers" else record
              for record in bench()]
    assert stacks(failed) == []


def test_ratios_and_shares_are_multiplied_and_differences_added() -> None:
    records = bench()
    stack, = stacks(records)
    baseline, fewer, integers, _ = records
    speed = stack.promised("throughput_ratio", baseline)
    assert speed is not None and speed.low is not None and speed.high is not None
    assert speed.value == pytest.approx(3.0)
    assert speed.low == pytest.approx(3.0 * math.exp(-math.sqrt(2) * -math.log(0.97)), rel=1e-6)
    size = stack.promised("size", baseline)
    assert size is not None and size.value == pytest.approx(2.5e6) and size.unit == "bytes"
    change = stack.promised("fd_lite0_difference", baseline)
    parts = [part.quantity("fd_lite0_difference") for part in (fewer, integers)]
    assert change is not None and change.value == pytest.approx(sum(part.value for part in parts if part))
    assert change.low == pytest.approx(change.value - math.hypot(0.9, 0.9))
    assert stack.promised("nothing", baseline) is None


@pytest.mark.parametrize(("speed", "said"), [(2.0, "slower than promised"), (3.0, "as fast as promised"),
                                             (4.0, "faster than promised")])
def test_the_table_says_whether_the_promise_was_kept(speed: float, said: str) -> None:
    records = [*bench()[:3], row("both", FEWER, INTEGERS, speed=speed)]
    text = as_markdown(stack_table(records, METRICS))
    line = text.splitlines()[-1]
    assert "fewer + integers" in line and said in line
    assert text.splitlines()[0].count("promised") == 5


@pytest.mark.parametrize(("fd", "said"), [(60.0, "worse than promised"), (30.0, "better than promised")])
def test_the_table_says_whether_quality_is_what_the_parts_came_to(fd: float, said: str) -> None:
    records = [*bench()[:3], row("both", FEWER, INTEGERS, fd=fd, speed=3.0)]
    assert said in as_markdown(stack_table(records, METRICS)).splitlines()[-1]
    assert "than promised" not in as_markdown(stack_table(bench(), METRICS)).splitlines()[-1]


def test_a_refused_stack_is_shown_with_its_reason() -> None:
    refused = Record("both", status="refused", reason="cannot be", recipe={"methods": [FEWER, INTEGERS]})
    line = as_markdown(stack_table([*bench()[:3], refused], METRICS)).splitlines()[-1]
    assert "refused: cannot be" in line and "3.00x" in line


def test_without_a_baseline_there_is_no_stack() -> None:
    assert stack_table(bench()[1:], METRICS).rows == ()
