"""What slimdit.report.pareto promises: the rows nobody beats, by value or beyond the intervals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimdit.report.pareto import front
from slimdit.report.record import Record, Value


def row(name: str, speed: float, loss: float, half: float = 0.0) -> Record:
    return Record(name, metrics={"loss": Value(loss, loss - half, loss + half)},
                  against_baseline={"speed": Value(speed, speed - half, speed + half)})


def test_dominated_rows_are_off_the_front_from_the_best_x_to_the_worst() -> None:
    rows = [row("good", 1, 1), row("beaten", 1, 3), row("fast", 3, 2), row("also beaten", 2.5, 2.5)]
    assert front(rows, "speed", "loss", "higher", "lower") == ["fast", "good"]


def test_directions_decide() -> None:
    rows = [row("a", 1, 1), row("b", 2, 2)]
    assert front(rows, "speed", "loss", "higher", "lower") == ["b", "a"]
    assert front(rows, "speed", "loss", "higher", "higher") == ["b"]
    assert front(rows, "speed", "loss", "lower", "lower") == ["a"]


def test_equal_rows_stay_together_and_a_row_without_both_is_left_out() -> None:
    rows = [row("one", 1, 1), row("two", 1, 1), Record("failed", status="failed", reason="it broke")]
    assert set(front(rows, "speed", "loss", "higher", "lower")) == {"one", "two"}
    assert front([], "speed", "loss", "higher", "lower") == []


def test_noise_alone_puts_no_row_behind_a_clear_front() -> None:
    close = [row("better", 1.1, 1.0, half=0.5), row("worse", 1.0, 1.1, half=0.5)]
    assert front(close, "speed", "loss", "higher", "lower") == ["better"]
    assert front(close, "speed", "loss", "higher", "lower", clearly=True) == ["better", "worse"]
    apart = [row("better", 3.0, 1.0, half=0.5), row("worse", 1.0, 1.1, half=0.5)]
    assert front(apart, "speed", "loss", "higher", "lower", clearly=True) == ["better"]


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="'up'"):
        front([], "speed", "loss", "up", "lower")  # type: ignore[arg-type]


numbers = st.integers(-5, 5).map(float)


@given(st.lists(st.tuples(numbers, numbers, st.sampled_from([0.0, 0.5, 2.0])), min_size=1, max_size=8))
def test_against_the_definition(points: list[tuple[float, float, float]]) -> None:
    rows = [row(str(i), *point) for i, point in enumerate(points)]
    kept = set(front(rows, "speed", "loss", "higher", "lower"))
    expected = {str(i) for i, (x, y, _) in enumerate(points)
                if not any(a >= x and b <= y and (a, b) != (x, y) for a, b, _ in points)}
    assert kept == expected
    assert kept
    assert kept <= set(front(rows, "speed", "loss", "higher", "lower", clearly=True))
