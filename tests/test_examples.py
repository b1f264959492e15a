"""The examples and the benchmarks run as their pages say, on tiny models."""

from __future__ import annotations

import importlib
import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slimdit import Pipeline, Sampling
from slimdit.context import Context, Refused
from slimdit.models.dit import DiT, uniform

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def method_example():
    return importlib.import_module("examples.add_a_method")


@pytest.fixture
def tiny():
    return uniform(depth=4, width=16, heads=2, patch=4, input_size=(16, 16), channels=1, classes=3)


def test_quickstart_compares_a_pipeline_with_its_cheaper_self(tmp_path, tiny, method_example):
    quickstart = importlib.import_module("examples.quickstart")
    pipeline = Pipeline(method_example.random_twin(tiny), Sampling(steps=8))

    facts = quickstart.compare(pipeline, images=3, steps=2, folder=tmp_path)

    assert facts["MACs per image, ratio"] == pytest.approx(4)
    assert facts["size ratio"] > 1
    assert 0 < facts["PSNR, dB"] < 100  # alike, not the same to the bit
    assert -1 <= facts["SSIM"] <= 1


def test_quickstart_runs_as_a_script_on_a_saved_model(tmp_path, tiny, method_example, monkeypatch, capsys):
    import slimdit

    slimdit.save(Pipeline(method_example.random_twin(tiny), Sampling(steps=4)), tmp_path / "model")
    out = run_script("examples/quickstart.py", ["--model", str(tmp_path / "model"), "--images", "2", "--steps", "2"],
                     monkeypatch, capsys)
    assert [line.split()[0] for line in out.splitlines()] == ["PSNR,", "SSIM", "size", "MACs"]


def test_a_method_keeps_the_blocks_it_was_told_to(tiny, method_example):
    before, after, witness = method_example.rehearse(method_example.KeepBlocks((0, 3)), tiny)

    assert witness == {"blocks_before": 4, "blocks_after": 2}
    assert len(before.model.blocks) == 4
    for old, new in ((0, 0), (3, 1)):
        for name, tensor in before.model.blocks[old].state_dict().items():
            assert torch.equal(tensor, after.model.blocks[new].state_dict()[name])


def test_a_method_that_keeps_everything_changes_nothing(tiny, method_example):
    before, after, _ = method_example.rehearse(method_example.KeepBlocks((0, 1, 2, 3)), tiny)
    assert (before.sample([0, 1], batch=2) == after.sample([0, 1], batch=2)).all()


def test_a_method_refuses_what_it_cannot_do(tiny, method_example, tmp_path):
    pipeline = Pipeline(method_example.random_twin(tiny))
    context = Context(teacher=pipeline, folder=tmp_path)
    with pytest.raises(Refused, match="no block 4; its last is 3"):
        method_example.KeepBlocks((0, 4)).apply(pipeline, context)
    for wrong in ((), (2, 1), (1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="ascending order"):
            method_example.KeepBlocks(wrong)


def test_the_method_example_runs_as_a_script(monkeypatch, capsys):
    out = run_script("examples/add_a_method.py", ["--keep", "0", "5"], monkeypatch, capsys)
    assert "'blocks_before': 6, 'blocks_after': 2" in out
    assert "two images: (2, 32, 32, 1)" in out


@pytest.mark.parametrize(("name", "arguments"), [
    ("gelu", ["--batch", "2", "--width", "16", "--depth", "1", "--rounds", "2", "--eager"]),
    ("attention", ["--tokens", "16", "--modes", "eager", "--dtypes", "float32", "--batch", "1", "--rounds", "2"]),
    ("startup", ["--programs", "help", "--rounds", "2"]),
])
def test_a_benchmark_ends_with_one_line_of_json(name, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    importlib.import_module(f"benchmarks.{name}").main()

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    row, = result["rows"]
    assert result["benchmark"] == name
    assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert row["rounds"] == 2
    assert result["provenance"]["command"] == f"python -m benchmarks.{name} {' '.join(arguments)}"


def test_whole_sampling_runs_are_timed_ahead_and_step_by_step(monkeypatch, capsys):
    room = importlib.import_module("benchmarks.sampling_run")
    monkeypatch.setattr("benchmarks.int8.random_model", lambda name: DiT(uniform(
        depth=1, width=32, heads=2, patch=2, input_size=(4, 4), channels=1, classes=3)).eval())
    monkeypatch.setattr("benchmarks.sampling_run.openvino", lambda pipeline, inputs: {"other": pipeline.denoise})
    monkeypatch.setattr(sys, "argv", ["sampling_run", *shlex.split("--presets tiny --images 1 --steps 2 --rounds 1")])
    room.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["a"].partition(" ")[0] for row in rows] == ["compiled", "compiled", "slimdit", "other"]
    assert all(row["ratio"] > 0 and row["b"] == "slimdit int8, ahead" for row in rows)


def test_surroundings_are_those_of_two_processes(monkeypatch, capsys):
    room = importlib.import_module("benchmarks.surroundings")
    monkeypatch.setattr(sys, "argv", ["surroundings", "--models", "bundled", "--images", "1", "--steps", "1",
                                      "--rounds", "1", "--others", "one thread"])
    room.main()
    row, = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["a"] == "one thread" and row["ratio"] > 0


def test_surroundings_that_end_are_told_of():
    room = importlib.import_module("benchmarks.surroundings")
    with room.process("no such preset", 1, 1, {}) as run, pytest.raises(RuntimeError, match="no such preset ended"):
        run()


def test_launches_are_timed_from_python_and_from_c(monkeypatch, capsys):
    room = importlib.import_module("benchmarks.launches")
    monkeypatch.setattr("benchmarks.int8.random_model", lambda name, device: DiT(uniform(
        depth=1, width=32, heads=2, patch=2, input_size=(4, 4), channels=1, classes=3)).eval())
    asked = "--models tiny --images 1 --weights bfloat16 --steps 2 --rounds 1"
    monkeypatch.setattr(sys, "argv", ["launches", *shlex.split(asked)])
    room.main()
    row, = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (row["a"], row["b"], row["weights"]) == ("Python", "C++", "bfloat16")
    assert row["ratio"] > 0


def test_steps_that_were_not_timed_are_reckoned_and_only_on_the_published_side():
    reckoned = importlib.import_module("benchmarks.historical").reckoned
    times = {"ratio": 2.0, "low": 1.5, "high": 2.5, "a_seconds": 4.0, "b_seconds": 2.0, "rounds": 3}
    assert reckoned(times, 5) == {"ratio": 100.0, "low": 75.0, "high": 125.0, "a_seconds": 200.0, "b_seconds": 2.0,
                                  "rounds": 3, "steps_timed": 5}


def test_kinds_of_attention_are_timed_against_both_forms_of_softmax(monkeypatch, capsys):
    room = importlib.import_module("benchmarks.attention_kinds")
    sizes = "--tokens 12 16 --heads 4 --head-dim 8 --mediators 4 --rounds 2"
    monkeypatch.setattr(sys, "argv", ["attention_kinds", *f"--modes eager --dtypes float32 {sizes}".split()])
    room.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["kind"], row["tokens"], row["against"]) for row in rows] == [
        (kind, tokens, form) for kind in room.KINDS for tokens in (12, 16) for form in ("fused", "explicit")]
    assert all(0 < row["low"] <= row["high"] and row["slope"] is not None for row in rows)


def test_slope_and_crossover_of_attention_are_said_of_the_whole_series():
    room = importlib.import_module("benchmarks.attention_kinds")

    def rows(seconds, lows):
        return [{"tokens": tokens, "against": form, "b_seconds": second, "low": low - (form == "explicit") * 0.01}
                for tokens, second, low in zip((64, 256, 1024), seconds, lows) for form in ("fused", "explicit")]

    assert room.slope(rows((1, 3, 12), (1, 1, 1))) == 1.0 and room.slope(rows((1, 1, 16), (1, 1, 1))) == 2.0
    assert room.slope(rows((1, 3, 12), (1, 1, 1))[:2]) is None
    assert room.crossover(rows((1, 1, 1), (0.5, 1.2, 1.5))) == 256
    assert room.crossover(rows((1, 1, 1), (1.2, 1.005, 1.5))) == 1024  # not faster than the explicit form in between
    assert room.crossover(rows((1, 1, 1), (1.2, 1.5, 0.9))) is None


def test_growth_is_timed_in_turn_and_drawn(monkeypatch, capsys, tmp_path):
    room = importlib.import_module("benchmarks.growth")
    held = {64: {"peak": 3000, "weights": 1000}, 256: {"peak": 9000, "weights": 1000}}
    monkeypatch.setattr(room, "forward", lambda config, images: lambda: None)
    monkeypatch.setattr(room, "in_turn", lambda calls, rounds: np.array([[1.0, 4.0], [1.0, 8.0], [1.0, 4.0]]))
    monkeypatch.setattr(room, "in_fresh_process", lambda axis, size: held[size])
    monkeypatch.setattr(sys, "argv", shlex.split("growth --axes tokens --sizes 64 256 --rounds 3"))
    room.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, second = document["rows"]
    assert (first["seconds"], second["seconds"]) == (1.0, 4.0)
    assert second["slope"] == 1.0 and second["memory_slope"] == 1.0 and "slope" not in first
    assert first["all"] == "1.00 [1.00, 1.50]"
    written, = room.draw(document, tmp_path)
    assert written.name == "growth-tokens.svg" and "peak memory" in written.read_text()


def test_what_grows_is_only_what_its_axis_says():
    room = importlib.import_module("benchmarks.growth")
    for axis, (sizes, model) in room.AXES.items():
        assert len(sizes) >= 4
        small, large = model(sizes[0]), model(sizes[1])
        assert (small[1] != large[1]) == (axis == "batch")
        assert (small[0].tokens != large[0].tokens) == (axis == "tokens")
        assert (len(small[0].blocks) != len(large[0].blocks)) == (axis == "depth")
        assert (small[0].width != large[0].width) == (axis == "width")
        if axis == "tokens":
            assert (small[0].tokens, large[0].tokens) == sizes[:2]


def test_a_pass_is_measured_in_turn():
    room = importlib.import_module("benchmarks.growth")
    called = []
    times = room.in_turn([lambda: called.append(0), lambda: called.append(1)], 3)
    assert times.shape == (3, 2) and called == [0, 1] * 5


def test_peers_make_the_same_latents(monkeypatch):
    room = importlib.import_module("benchmarks.peers")
    for name in ("with_torchao", "with_onnx_runtime", "with_openvino"):
        monkeypatch.setattr(room, name, lambda *_: [])
    monkeypatch.setattr(room, "compiled", lambda function: function)
    config = uniform(depth=1, width=32, heads=2, patch=2, input_size=(4, 4), channels=4, classes=1000,
                     frequency_shift=1)
    rows = {row["a"]: row for row in room.measure(config, "tiny", images=2, steps=2, rounds=1)}
    assert list(rows) == ["eager float32", "diffusers eager float32", "diffusers eager bfloat16",
                          "diffusers compiled bfloat16"]
    assert rows["eager float32"]["a_error"] < 1e-5 and rows["diffusers eager float32"]["a_error"] < 0.01
    assert all(0 < row["low"] <= row["high"] for row in rows.values())


def test_a_compiled_step_makes_the_same_latents(monkeypatch, capsys):
    room = importlib.import_module("benchmarks.step")
    monkeypatch.setattr("slimdit.pipeline.compiled", lambda function: function)
    monkeypatch.setattr(sys, "argv", shlex.split("step --models bundled --images 2 --steps 3 --rounds 1 --solvers "
                                                 "ddim unipc"))
    with torch.no_grad():
        room.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["solver"] for row in rows] == ["ddim", "ddim", "unipc", "unipc"]
    assert all(row["error"] < 1e-3 for row in rows)


def test_compiling_is_timed_apart_and_pays_from_where_it_saves_what_it_took(monkeypatch, capsys):
    room = importlib.import_module("benchmarks.compiling")
    told = iter([{"load": 0.1, "compile": 9.0}, {"load": 0.1, "compile": 3.0}] * 6)
    monkeypatch.setattr(room, "in_fresh_process", lambda model, images, cache: next(told))
    monkeypatch.setattr(room, "call", lambda *_: None)
    monkeypatch.setattr(room, "compare", lambda a, b, rounds, settle: {
        "ratio": 1.5, "low": 1.4, "high": 1.6, "a_seconds": 0.75, "b_seconds": 0.5, "rounds": rounds})
    monkeypatch.setattr(sys, "argv", shlex.split("compiling --models bundled --images 1 --repeats 2 --rounds 1"))
    room.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    floats = rows[0]["weights"]
    assert [row["weights"] for row in rows] == [floats, "int8", f"{floats}, OpenVINO"]
    assert floats in ("bfloat16", "float32")
    assert all((row["cold"], row["warm"], row["load"]) == (9.0, 3.0, 0.1) for row in rows)
    assert all((row["pays_from_cold"], row["pays_from_warm"]) == (36, 12) for row in rows)


def test_the_memory_benchmark_compares_every_form_with_float32(monkeypatch, capsys):
    room = importlib.import_module("benchmarks.load_memory")

    def here(model, tiny, what):  # a process for each would take a minute
        measured = room.measure(model, tiny, "forward" in what)
        return {**measured, "peak": measured["peak"] + 1}

    monkeypatch.setattr(room, "fresh", here)
    monkeypatch.setattr(sys, "argv", ["load_memory", "--presets", "XS/8", "--repeats", "1"])
    room.main()

    rows = {row["weights"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert list(rows) == list(room.MODELS)
    # Float embedders weigh more in so narrow a model than in S/2.
    assert rows["float32"]["file_ratio"] == 1 and 0.5 < rows["half"]["file_ratio"] < 0.51
    assert rows["int4, adaLN too"]["file_ratio"] < 0.25 < rows["int8"]["file_ratio"] < 0.35
    assert rows["checkpoint"]["file_ratio"] > 3.9
    floats = {rows[name]["weights_bytes"] for name in ("float32", "half", "diffusers", "checkpoint")}
    assert len(floats) == 1 and rows["int8"]["weights_bytes"] < 0.4 * floats.pop()
    assert all(row["load_bytes"] > 0 and row["load_and_forward_bytes"] > 0 for row in rows.values())


@pytest.mark.parametrize("form", ["half", "checkpoint"])
def test_loading_holds_the_weights_once(form, tmp_path):
    room = importlib.import_module("benchmarks.load_memory")
    suffix = ".pt" if form == "checkpoint" else ""
    for config, name in ((room.TINY, "tiny"), (room.preset("S/2"), "model")):
        room.MODELS[form](config, tmp_path / name)
    measured = room.fresh(tmp_path / f"model{suffix}", tmp_path / f"tiny{suffix}", "load")
    assert measured["weights"] > 100e6
    assert 1 <= measured["peak"] / measured["weights"] < 1.15


def test_the_benchmarked_forms_compute_the_same():
    gelu = importlib.import_module("benchmarks.gelu")
    attention = importlib.import_module("benchmarks.attention")
    model = uniform(depth=1, width=16, heads=2, patch=4, input_size=(8, 8), channels=1, classes=3)
    block = gelu.DiT(model).blocks[0].mlp
    plain = gelu.TanhMLP(block.fc1.in_features, block.fc1.out_features)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(block(x), plain(x), atol=1e-6)

    outputs = []
    for form in ("fused", "explicit"):
        torch.manual_seed(0)
        outputs.append(attention.attention(form, x, 2, 8, compiled=False)())
    assert torch.allclose(*outputs, atol=1e-6)


def run_script(path: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch,
               capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(str(ROOT / path), run_name="__main__")
    return capsys.readouterr().out
