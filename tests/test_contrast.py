"""Rows beside their controls: what the table says, and what a file of them may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimdit.report import contrast
from slimdit.report.contrast import Contrast, contrast_table
from slimdit.report.record import Images, Record, Value

from .example_records import METRICS, made_up


def trained(name: str, images: int, seconds: float) -> Record:
    record = made_up(name, 40.0, 1.0)
    return Record(name, metrics=record.metrics, images=Images(f"{name}.png", name[0] * 64), witness=[
        {"method": "prune_width", "seconds": 3.0},
        {"method": "finetune", "steps": images // 64, "images": images, "seconds": seconds}])


def beside(row: Record, control: Record, low: float, high: float) -> Contrast:
    assert row.images and control.images
    return Contrast(row.name, control.name, (row.images.sha256, control.images.sha256),
                    {"fd_lite0_difference": Value((low + high) / 2, low, high, 512), "psnr": Value(30.0, unit="dB")})


@pytest.mark.parametrize(("low", "high", "says"), [
    (-3.0, -1.0, "better"), (1.0, 3.0, "worse"), (-1.0, 2.0, "not told apart"), (0.0, 2.0, "not told apart")])
def test_the_table_says_what_the_interval_says(low: float, high: float, says: str) -> None:
    row, control = trained("alpha", 6400, 20.0), trained("beta", 3200, 10.0)
    table = contrast_table([beside(row, control, low, high)], [row, control], METRICS)
    assert [head.title for head in table.headings[:2]] == ["beside", "Δ fd_lite0"] and table.headings[1].n == 512
    line, = table.rows
    assert (line.name, line.cells[0].text, line.note) == ("alpha", "beta", says)
    assert [cell.text for cell in line.cells[-2:]] == ["6,400 / 3,200", "20 s / 10 s"]  # of the training alone


def test_a_control_that_was_not_trained_cost_nothing() -> None:
    row, control = trained("alpha", 6400, 20.0), made_up("beta", 40.0, 1.0)
    line, = contrast_table([beside(row, control, 1.0, 2.0)], [row, control], METRICS).rows
    assert [cell.text for cell in line.cells[-2:]] == ["6,400 / 0", "20 s / 0"]


def test_no_contrasts_make_no_lines() -> None:
    assert not contrast_table([], [made_up("alpha", 1.0, 1.0)], METRICS).rows


def test_contrasts_are_read_back_and_only_for_the_images_they_are_of(tmp_path: Path) -> None:
    row, control = trained("alpha", 64, 1.0), trained("beta", 64, 1.0)
    made = beside(row, control, 1.0, 2.0)
    contrast.write([made], tmp_path / "alpha.json")
    assert contrast.read(tmp_path / "alpha.json") == [made]
    assert contrast.of_records(tmp_path, {"alpha": row, "beta": control}) == [made]
    assert not contrast.of_records(tmp_path, {"alpha": row})
    assert not contrast.of_records(tmp_path, {"alpha": row, "beta": made_up("beta", 1.0, 1.0)})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "sha256": "", "contrasts": []}', "[" * 100_000])
def test_a_file_that_holds_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "alpha.json").write_text(text)
    with pytest.raises(ValueError, match=r"alpha\.json does not hold contrasts .* bench with --resume"):
        contrast.read(tmp_path / "alpha.json")


def test_one_that_was_changed_is_refused(tmp_path: Path) -> None:
    row, control = trained("alpha", 64, 1.0), trained("beta", 64, 1.0)
    path = tmp_path / "alpha.json"
    contrast.write([beside(row, control, 1.0, 2.0)], path)
    path.write_text(path.read_text().replace("1.5", "0.5"))
    with pytest.raises(ValueError, match="does not hold contrasts"):
        contrast.read(path)
