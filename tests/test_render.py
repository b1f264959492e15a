"""What slimdit.report.render promises: every number with its interval and N, the same in every form."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from slimdit.report.record import Record, Value
from slimdit.report.render import (
    better,
    compare,
    comparison_table,
    markdown,
    note,
    number,
    sampled,
    table,
    terminal_table,
    update_markdown,
)

from .example_records import METRICS, example_records


@pytest.mark.parametrize(("value", "signed", "expected"), [
    (Value(41.234, 39.81, 42.66, 2000), False, ("41.2", "[39.8, 42.7]")),
    (Value(1.8512, 1.8, 1.9123, unit="x"), False, ("1.85x", "[1.80, 1.91]")),
    (Value(3_912_345.0, unit="bytes"), False, ("3.91 MB", "")),
    (Value(1_500.0, unit="bytes"), False, ("1.50 kB", "")),
    (Value(2.5e9, unit="bytes"), False, ("2.50 GB", "")),
    (Value(3.1e9, unit="MACs"), False, ("3.10 G", "")),
    (Value(0.0123, 0.0119, 0.0131, unit="s"), False, ("12.3 ms", "[11.9, 13.1]")),
    (Value(-0.04, -1.2, 1.3), True, ("0.0", "[-1.2, +1.3]")),
    (Value(1.3, -0.2, 2.8), True, ("+1.3", "[-0.2, +2.8]")),
    (Value(0.00123, 0.00101, 0.00149), False, ("0.00123", "[0.00101, 0.00149]")),
    (Value(12345.0), False, ("12,345", "")),
    (Value(float("inf"), unit="dB"), False, ("∞ dB", "")),
    (Value(0.0), False, ("0", "")),
])
def test_numbers_have_the_decimals_their_interval_deserves(value: Value, signed: bool, expected: tuple) -> None:
    assert number(value, signed=signed) == expected


def test_rows_are_baseline_aa_then_the_others_as_given() -> None:
    names = [row.name for row in table(example_records(), METRICS).rows]
    assert names[:4] == ["baseline", "A/A", "fewer-steps", "int8-weight-only"]
    assert len(names) == len(example_records())


def test_headings_say_which_way_is_better_and_n() -> None:
    titles = [str(head) for head in table(example_records(), METRICS).headings]
    assert titles[:3] == ["fd_lite0 ↓ (N = 2,000)", "Δ fd_lite0 ↓ (N = 2,000)", "throughput ratio ↑ (N = 12)"]
    assert better("latency_ratio_batch8", METRICS) == "higher"
    assert better("unheard_of", METRICS) is None


def test_unequal_n_stand_in_the_cells() -> None:
    records = [Record("a", metrics={"fd_lite0": Value(3.0, 2.0, 4.0, 100)}),
               Record("b", metrics={"fd_lite0": Value(3.0, 2.0, 4.0, 200)})]
    content = table(records, METRICS)
    assert content.headings[0].n is None
    assert [str(row.cells[0]) for row in content.rows] == ["3.0 [2.0, 4.0] N = 100", "3.0 [2.0, 4.0] N = 200"]


def test_a_row_that_did_not_finish_says_why() -> None:
    wide = next(record for record in example_records() if record.name == "wide")
    assert note(wide) == "refused: prune_width needs float weights: put it before quantize"
    assert note(example_records()[2]) == "no loss within 2.0; slower"


def test_markdown_keeps_its_shape_whatever_the_names() -> None:
    lines = markdown(example_records(), METRICS).splitlines()
    assert len(lines) == 2 + len(example_records())
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "| 38.2 [36.8, 39.8] |" in lines[2]
    assert "<script>" not in "".join(lines)
    assert "needed 9 GB \\| had 4 GB" in lines[-1]


def drawn(content: Table, width: int) -> str:
    console = Console(width=width, file=StringIO(), record=True)
    console.print(content)
    return console.export_text()


def test_the_terminal_shows_every_row_and_says_what_did_not_fit() -> None:
    wide, narrow = (drawn(terminal_table(example_records(), METRICS, width=width), width) for width in (170, 80))
    for text in ("baseline", "A/A", "lean", "[36.8, 39.8]", "2.36x", "7.60 MB", "<script>alert"):
        assert text in wide
    assert "Left out" not in wide
    assert "[36.8, 39.8]" in narrow
    assert "1.97x" in narrow
    assert "Left out, as the terminal is narrow" in narrow
    assert "…" not in wide + narrow


def test_a_table_is_replaced_between_its_markers_only(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- table:one -->\nold\n<!-- /table -->\nmiddle\n"
                    "<!-- table:two -->\n<!-- /table -->\nend\n")
    update_markdown(path, "one", "| new |")
    update_markdown(path, "two", "| 2 |")
    update_markdown(path, "two", "| 2 |")
    assert path.read_text() == ("before\n<!-- table:one -->\n| new |\n<!-- /table -->\nmiddle\n"
                                "<!-- table:two -->\n| 2 |\n<!-- /table -->\nend\n")


@pytest.mark.parametrize("text", [
    "nothing", "<!-- table:one -->\nnever closed", "<!-- table:one --> <!-- table:two --> <!-- /table -->",
    "<!-- table:one --> <!-- /table --> <!-- table:one --> <!-- /table -->",
])
def test_missing_or_doubled_markers_are_refused_and_the_file_kept(text: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="must hold"):
        update_markdown(path, "one", "new")
    assert path.read_text() == text


def test_two_runs_side_by_side_say_what_is_not_alike() -> None:
    left = [Record("a", protocol={"images": 100}, provenance={"versions": {"torch": "2.12.0"}},
                   metrics={"fd_lite0": Value(3.0, 2.0, 4.0, 100)}), Record("gone")]
    right = [Record("a", protocol={"images": 200}, provenance={"versions": {"torch": "2.13.0"}},
                    metrics={"fd_lite0": Value(9.0, 8.0, 10.0, 200)})]
    comparison = compare(left, right, METRICS)
    (row,) = comparison.table.rows
    assert (row.name, str(row.cells[0])) == ("a", "3.0 → 9.0 apart")
    assert comparison.warnings == (
        "protocol: images is 100 in the first run and 200 in the second",
        "provenance: versions: torch is '2.12.0' in the first run and '2.13.0' in the second",
        "row 'gone' is in the first run only")
    assert "3.0 → 9.0" in drawn(comparison_table(comparison), 120)
    same = compare(right, right, METRICS)
    assert same.warnings == ()
    assert same.table.rows[0].cells[0].interval == "intervals overlap"


def test_a_row_says_how_many_of_its_steps_are_whole():
    how = {"solver": "ddim", "steps": 50, "guidance": 1.5}
    assert sampled(Record("row", protocol={"row_sampling": how})) == "ddim, 50 steps, guidance 1.5"
    how["cache"] = {"full": [0, 5, 10], "order": 1}
    assert sampled(Record("row", protocol={"row_sampling": how})) == "ddim, 50 steps, 3 of them whole, guidance 1.5"
