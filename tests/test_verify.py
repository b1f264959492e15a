"""Verifying: what a bench left holds as it is, and no longer once a number, a weight or the structure is another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from slimdit import bench
from slimdit.cli import app


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tiny_protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a bench of the baseline and its other seeds, moved to another place."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "fewer.toml").write_text(f'name = "fewer"\nmodel = "{tiny_model}"\n'
                                       "methods = [{reduce_steps = {steps = 3}}]\n")
    bench.run(bench.plan([str(folder / "fewer.toml")], model=str(tiny_model), protocol=str(tiny_protocol),
                         folder=folder / "out", device="cpu"))
    return shutil.copytree(folder / "out" / "rows" / "fewer" / "model", folder / "model")


@pytest.fixture
def model(measured: Path, tmp_path: Path) -> Path:
    return shutil.copytree(measured, tmp_path / "model")


def verify(model: Path, *words: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["verify", str(model), "--device", "cpu", "--json", *words])
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout) if result.stdout else {"said": result.stderr}


def edit(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    records = json.loads((model / "evidence.json").read_text())
    change(records[-1])
    (model / "evidence.json").write_text(json.dumps(records))


def test_evidence_holds_to_the_bit(model: Path) -> None:
    told = verify(model)
    assert told["holds"] and told["row"] == "fewer" and told["images"] == "16 of 16"
    assert {"size", "macs", "run_macs", "parameters", "weights", "images"} <= told["findings"].keys()
    assert "throughput" in told["not measured again"] and "fd_lite0" in told["not measured again"]


def test_fewer_images_are_compared_where_their_number_does_not_matter(model: Path) -> None:
    told = verify(model, "--images", "8")
    assert told["holds"] and told["images"] == "8 of 16"
    assert {"kid_lite0", "precision_lite0", "class_accuracy"} <= told["findings"].keys()
    assert "fd_lite0" not in told["findings"] and told["findings"]["kid_lite0"]["found"]["n"] == 8


def test_a_prettier_number_does_not_hold(model: Path) -> None:
    def flatter(record: dict[str, Any]) -> None:
        record["metrics"]["kid_lite0"] = {"value": 1e-4, "low": 0.0, "high": 2e-4, "n": 16, "unit": ""}

    edit(model, flatter)
    told = verify(model, "--images", "8", code=4)
    assert not told["holds"] and not told["findings"]["kid_lite0"]["holds"]
    edit(model, lambda record: record["metrics"]["macs"].update(value=1.0))
    assert not verify(model, code=4)["findings"]["macs"]["holds"]


def test_other_images_of_as_many_are_compared_by_every_distance(model: Path) -> None:
    edit(model, lambda record: record["images"].update(sha256="0" * 64))
    told = verify(model)  # as on a machine that rounds otherwise: all numbers are met again
    assert told["holds"] and {"fd_lite0", "kid_lite0", "recall_lite0"} <= told["findings"].keys()


def test_other_weights_do_not_hold(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * 3 if name.endswith("linear.weight") else tensor for name, tensor in tensors.items()},
              model / "model.safetensors", {"format": "pt"})
    told = verify(model, code=4)
    assert not told["findings"]["weights"]["holds"] and told["findings"]["macs"]["holds"]


def test_another_reference_is_refused(model: Path) -> None:
    edit(model, lambda record: record["protocol"]["conditions"].update(reference="another"))
    assert "other conditions (reference (" in verify(model, code=3)["said"]


@pytest.mark.parametrize(("content", "said"), [
    (None, "has no evidence.json"), ("[", "not whole JSON"), ("[]", "not a list of records"),
    ("[3]", "not a valid record"),
    ('[{"name": "x"}]', "not the evidence of a row"),
])
def test_what_is_no_evidence_is_a_sentence(model: Path, content: str | None, said: str) -> None:
    (model / "evidence.json").unlink()
    if content is not None:
        (model / "evidence.json").write_text(content)
    assert said in verify(model, code=1)["said"]
