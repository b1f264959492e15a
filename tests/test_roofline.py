"""What slimdit.roofline promises: shares that add up, peaks that no product beats, and a table of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from slimdit import roofline
from slimdit.cli import app
from slimdit.pipeline import DTYPES
from slimdit.roofline import Settings, measure, peak_operations, shares, table

EAGER = Settings(batches=(1, 2), dtype="float32", compile=False, steps=2, rounds=3)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "PEAK_SHAPE", (256, 128, 256))
    monkeypatch.setattr(roofline, "COPIED", 2 ** 20)


def test_a_row_for_each_batch_accounts_for_all_of_the_time(small: None, tiny_model: Path) -> None:
    rows = measure(str(tiny_model), EAGER)
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["products"] + row["attention"] + row["rest"] == pytest.approx(1)
        assert min(row["products"], row["attention"], row["rest"], row["of_peak"]) > 0
        assert row["roof"] > 0 and row["run_ms"] > row["forward_ms"] and row["in_model"] > 0
        parts = row["products_of_peak"] * row["products"] + row["attention_of_peak"] * row["attention"]
        assert parts == pytest.approx(row["of_peak"])  # nothing else multiplies


@pytest.mark.parametrize(("call", "part"), [
    (lambda x: torch.nn.functional.linear(x, x), "products"),
    (lambda x: x[None] @ x[None], "attention"),
    (lambda x: torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
     "attention"),
    (lambda x: torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, x.shape[-1:])), "rest")])
def test_time_is_put_where_it_was_spent(call, part: str) -> None:
    x = torch.randn(400, 400)
    spent = shares(lambda: call(x))
    assert spent[part] > 0.8 and sum(spent.values()) == pytest.approx(1)


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((2.0, 1.0))

    class Times:
        def __init__(self) -> None:
            self.variant_times = (5.0, next(seconds), 7.0)

    monkeypatch.setattr(roofline, "PEAK_SHAPE", (4, 8, 16))
    monkeypatch.setattr(roofline, "alone", lambda call, rounds: (call(), Times())[1])
    packs = torch.backends.mkldnn.is_available()
    assert peak_operations(DTYPES["float32"]) == 2 * 4 * 8 * 16 / (1.0 if packs else 2.0)


def test_presets_are_measured_without_files(small: None) -> None:
    pipeline = roofline.executed("XS/8", EAGER)
    assert pipeline.model.config == roofline.preset("XS/8") and not pipeline.runtime.compile
    assert all(parameter.std() > 0.01 for parameter in pipeline.model.parameters())


def test_the_command_measures_in_another_process_and_renders(tiny_model: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table:roofline -->\n<!-- /table -->\nafter\n")
    words = ["inspect", str(tiny_model), "--roofline", "--batch", "2", "--dtype", "float32", "--eager"]
    done = CliRunner().invoke(app, [*words, "--update", str(page), "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    row, = told["rows"]
    assert (row["batch"], row["dtype"], row["compiled"]) == (2, "float32", False) and row["peak_gflops"] > 1
    assert page.read_text().startswith("before") and f"| {tiny_model} | 2 |" in page.read_text()
    assert table(told["rows"], told["provenance"]) in page.read_text()


def test_what_cannot_be_measured_gets_a_sentence(tmp_path: Path) -> None:
    runner = CliRunner()
    failed = runner.invoke(app, ["inspect", str(tmp_path / "nothing"), "--roofline", "--eager"])
    assert failed.exit_code == 1 and "nothing does not exist" in " ".join(failed.stderr.split())
    assert "name a checkpoint" in runner.invoke(app, ["inspect"]).stderr
    wrong = runner.invoke(app, ["inspect", "S/2", "--roofline", "--dtype", "float8"])
    assert wrong.exit_code == 1 and "use one of" in wrong.stderr
    with pytest.raises(ValueError, match="above 0"):
        Settings(batches=(0,))
