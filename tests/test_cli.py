"""The command line: one JSON document on stdout, one sentence and an exit code on failure, quick help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from slimdit.catalogue import CATALOGUE, FORMATS
from slimdit.cli import app
from slimdit.formats import load
from slimdit.methods.quantize import PROTECTED

VERBS = ("bench", "run", "sample", "evaluate", "train", "encode", "inspect", "check", "sensitivity", "report",
         "compare", "verify", "list")


def call(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.stderr or result.output
    return result


def answer(*words: str | Path) -> dict:
    return json.loads(call(*words, "--json").stdout)


def sentence(*words: str | Path, code: int = 1) -> str:
    """The one line on stderr of a call that fails."""
    result = call(*words, code=code)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("slimdit: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    assert "Usage" in call(verb, "--help").stdout


def test_help_and_lists_do_not_import_pytorch() -> None:
    code = ("import sys; from slimdit.cli import app; from typer.testing import CliRunner\n"
            "for words in (['--help'], ['bench', '--help'], *([['list', what] for what in "
            f"{list(CATALOGUE)!r}])):\n"
            "    result = CliRunner().invoke(app, words); assert result.exit_code == 0, result.output\n"
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", CATALOGUE)
def test_lists_have_a_line_for_each(what: str) -> None:
    rows = answer("list", what)
    assert rows and all(row["name"] and row["about"] for row in rows)
    assert all(row["name"] in call("list", what).stdout for row in rows)


def test_the_list_of_formats_is_what_there_is() -> None:
    from slimdit import formats

    assert list(FORMATS) == list(formats.FORMATS)


def test_an_unknown_list_names_the_nearest() -> None:
    assert "did you mean 'solvers'?" in sentence("list", "solver")


def test_sample_writes_what_was_asked_for_and_resumes(tiny_model: Path, tmp_path: Path) -> None:
    words = ("sample", tiny_model, "--images", "6", "--batch", "4", "--steps", "2", "--out", tmp_path)
    told = answer(*words, "--form", "npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (6, 12, 12, 1) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].shape == (6,)
    assert "add --resume" in sentence("sample", tiny_model, "--images", "6", "--out", tmp_path)
    again = answer(*words, "--form", "grid", "--resume")
    assert again["sha256"] == told["sha256"] and (tmp_path / "grid.png").stat().st_size > 0


def test_sample_png_writes_a_file_per_image_of_one_class(tiny_model: Path, tmp_path: Path) -> None:
    answer("sample", tiny_model, "--images", "3", "--form", "png", "--label", "2", "--steps", "2", "--out", tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_inspect_tells_structure_cost_and_what_applies(tiny_model: Path) -> None:
    told = answer("inspect", tiny_model)
    assert told["format"] == "native" and told["model"]["width"] == 32
    assert told["cost"]["flops"] == 2 * told["cost"]["macs"]
    assert told["methods"]["quantize"] == "yes"


def test_check_run_and_reload(tiny_model: Path, tmp_path: Path) -> None:
    checked = answer("check", "int8-weight-only", "--model", tiny_model)
    assert checked["witness"][0]["method"] == "quantize"
    answer("run", "int8-weight-only", "--model", tiny_model, "--out", tmp_path / "int8")
    told = answer("inspect", tmp_path / "int8")
    assert told["history"] == [{"quantize": {"weights": "int8", "rounding": "nearest", "protect": list(PROTECTED),
                                             "images": 32, "spare": 0.3}}]
    assert (tmp_path / "int8" / "recipe.toml").exists()
    assert told["methods"]["quantize"] != "yes"
    assert "quantize" in sentence("run", "int8-dynamic", "--model", tmp_path / "int8", "--out", tmp_path / "x", code=3)


def test_run_also_writes_what_plain_diffusers_loads(tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    recipe = tmp_path / "fewer.toml"
    recipe.write_text('name = "fewer"\nmethods = [{reduce_steps = {steps = 3}}]')
    answer("run", recipe, "--model", tiny_model, "--out", tmp_path / "out", "--diffusers")
    plain = DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "diffusers", subfolder="transformer").eval()
    ours = load(tmp_path / "out")
    x, t, y = torch.randn(2, 1, 12, 12), torch.tensor([999, 666]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.allclose(plain(x, t, y).sample, ours.denoise(x, t, y), atol=1e-5)
    said = sentence("run", "int8-dynamic", "--model", tiny_model, "--out", tmp_path / "int8", "--diffusers", code=3)
    assert "diffusers" in said and inspectable(tmp_path / "int8")


def inspectable(folder: Path) -> bool:
    """Whether the native model was saved all the same."""
    return answer("inspect", folder)["format"] == "native"


def test_evaluate_against_another_and_of_npz(tiny_model: Path, tmp_path: Path) -> None:
    told = answer("evaluate", tiny_model, "--against", tiny_model, "--images", "16", "--batch", "16", "--out",
                  tmp_path / "a")
    assert told["comparison"]["fd_lite0_difference"]["value"] == 0
    assert told["metrics"]["fd_lite0"]["n"] == 16 and "Not FID" in told["definition"]
    call("sample", tiny_model, "--images", "16", "--form", "npz", "--out", tmp_path / "s")
    again = answer("evaluate", tmp_path / "s" / "samples.npz")
    assert again["metrics"]["fd_lite0"]["value"] == pytest.approx(told["metrics"]["fd_lite0"]["value"], rel=0.05)
    short = answer("sample", tiny_model, "--images", "8", "--form", "npz", "--out", tmp_path / "t")["files"][0]
    whole = tmp_path / "s" / "samples.npz"
    assert "compare equal numbers only" in sentence("evaluate", whole, "--against", short, code=3)
    with np.load(whole) as file:
        np.savez(tmp_path / "labels.npz", arr_0=file["arr_0"], arr_1=file["arr_1"][::-1])
    assert "different labels" in sentence("evaluate", whole, "--against", tmp_path / "labels.npz", code=3)


def test_sensitivity_in_time_and_resumed(tiny_model: Path, tmp_path: Path) -> None:
    words = ("sensitivity", tiny_model, "--images", "2", "--bins", "2", "--out", tmp_path / "s")
    dry = answer(*words, "--dry-run")
    assert dry["layers"] == 10 and dry["model calls per layer"] == 6 and not (tmp_path / "s").exists()
    assert answer(*words, "--minutes", "0")["measured"] == 1
    assert "--resume" in sentence(*words)
    told = answer(*words, "--resume")
    assert told["measured"] == told["of"] == 10 and len(told["bins"]) == 2
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"sensitivity.json", "sensitivity.svg"}
    assert "blocks.1.mlp.fc2" in call(*words, "--resume").stdout
    assert "another perturb" in sentence(*words, "--resume", "--perturb", "prune")
    assert "did you mean 'drop'" in sentence("sensitivity", tiny_model, "--perturb", "dropp", "--out", tmp_path / "x")


def test_sensitivity_interrupted_can_be_resumed(tiny_model: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    from slimdit.sensitivity import Probe

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Probe, "errors", interrupt)
    assert "--resume" in sentence("sensitivity", tiny_model, "--images", "2", "--out", tmp_path / "s", code=5)


def test_train_from_a_plan_and_from_a_preset(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=images, arr_1=np.arange(24) % 3)
    (tmp_path / "plan.toml").write_text(f"""
name = "tiny"
model = {{depth = 1, width = 16, heads = 2, patch = 4}}
data = {{source = "{tmp_path / 'data.npz'}"}}
training = {{steps = 3, batch = 4, log_every = 1}}
""")
    told = answer("train", tmp_path / "plan.toml", "--out", tmp_path / "run")
    assert told["images seen"] == 12
    assert {"record.json", "curve.svg", "curve.jsonl", "checkpoint.safetensors"} <= {
        path.name for path in (tmp_path / "run").iterdir()}
    assert answer("inspect", tmp_path / "run" / "model")["model"]["classes"] == 3
    assert "--resume" in sentence("train", tmp_path / "plan.toml", "--out", tmp_path / "run")
    start = f'"on"\nstart_from = "{tmp_path / "run" / "model"}"'
    going_on = (tmp_path / "plan.toml").read_text().replace('"tiny"', start)
    (tmp_path / "on.toml").write_text(going_on.replace("steps = 3", "steps = 1, learning_rate = 1e-9"))
    answer("train", tmp_path / "on.toml", "--out", tmp_path / "on")
    before, after = (load(tmp_path / name / "model").model.state_dict() for name in ("run", "on"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    (tmp_path / "on.toml").write_text(going_on.replace("width = 16", "width = 32"))
    assert "differ in width" in sentence("train", tmp_path / "on.toml", "--out", tmp_path / "other")
    dry = answer("train", "--preset", "XS/4", "--data", tmp_path / "data.npz", "--steps", "1", "--dry-run")
    assert dry["parameters"] > 7e6
    assert "give a plan" in sentence("train", "--preset", "XS/4")


def test_encode_pixels_to_latents(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                  up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4).save_pretrained(tmp_path / "vae")
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=images, arr_1=np.arange(6) % 3)
    told = answer("encode", tmp_path / "data.npz", "--autoencoder", tmp_path / "vae", "--out", tmp_path / "latents")
    assert told["whole"] is True
    trained = answer("train", "--preset", "XS/8", "--data", tmp_path / "latents", "--steps", "1", "--dry-run")
    assert trained["images in data"] == 6


@pytest.mark.parametrize(("words", "code", "said"), [
    (("inspect", "no/such/place"), 1, "no/such/place"),
    (("sample", "bundled", "--device", "cuda:7"), 1, "--device cpu"),
    (("check", "int8-dynamik"), 1, "did you mean 'int8-dynamic'"),
    (("bench", "--protocol", "quik"), 1, "did you mean 'quick'"),
    (("report", "nowhere"), 1, "nowhere"),
])
def test_bad_input_gets_one_sentence(words: tuple[str, ...], code: int, said: str) -> None:
    assert said in sentence(*words, code=code)


def test_usage_errors_exit_with_2() -> None:
    assert call("sample", code=2)
    assert call("bench", "--no-such-option", code=2)


def test_bench_dry_run_says_what_it_will_do(tiny_model: Path, tiny_protocol: Path) -> None:
    told = answer("bench", "--model", tiny_model, "--protocol", tiny_protocol, "--dry-run")
    assert told["rows"][:2] == ["baseline", "A/A"] and told["images per row"] == 16


@pytest.mark.parametrize(("gate", "code"), [((), 0), (("--fail-if", "failed"), 4), (("--fail-if", "loss"), 0)])
def test_a_bench_with_a_crashed_row_exits_as_asked(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path,
                                                   gate: tuple[str, ...], code: int) -> None:
    from slimdit import bench
    from slimdit.report.record import BASELINE, Record

    rows = [Record(name=BASELINE), Record(name="dead", status="crashed", reason="prepare died of SIGSEGV")]
    monkeypatch.setattr(bench, "run", lambda plan, **options: rows)
    result = call("bench", "--model", tiny_model, "--out", tmp_path, "--json", *gate, code=code)
    assert [row["status"] for row in json.loads(result.stdout)["rows"]] == ["done", "crashed"]
    assert ("dead ended as 'failed'" in result.stderr) == (code == 4)
