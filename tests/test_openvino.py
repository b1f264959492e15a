"""OpenVINO as an engine: the answers of PyTorch, for every structure, and nothing sent anywhere."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slimdit import formats
from slimdit.context import Context, Refused
from slimdit.methods.compile import Compile
from slimdit.models.dit import DiT, uniform
from slimdit.models.experts_config import ExpertsConfig
from slimdit.models.openvino import INPUTS, InOpenVino, Simulated, converted, core, library, prepared
from slimdit.models.surgery import pack_linears
from slimdit.pipeline import Pipeline, Runtime
from slimdit.sampling.settings import Caching, Sampling

IN_OPENVINO = Runtime(compile=True, engine="openvino")
CONFIG = uniform(depth=2, width=32, heads=2, patch=2, input_size=(10, 6), channels=2, classes=3)
IN_BLOCKS = tuple(f"blocks.{block}.{name}" for block in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1",
                                                                              "mlp.fc2"))


def random_model(config=CONFIG, kind=None):
    torch.manual_seed(0)
    made = DiT(config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    if kind:
        pack_linears(made, dict.fromkeys(IN_BLOCKS, kind))
    return made


def inputs(rows=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 2, 10, 6, generator=generator), torch.arange(rows) * 90, torch.arange(rows) % 4


def blocks(**changes):
    return replace(CONFIG, blocks=tuple(replace(block, **changes) for block in CONFIG.blocks))


STRUCTURES = {
    "as published": CONFIG, "shared keys": blocks(kv_heads=1), "convolution": blocks(conv=3),
    "focused": blocks(attention="focused"), "mediated": blocks(attention="mediated", mediators=(2, 1)),
    "low rank": replace(blocks(adaln_rank=4), final_adaln_rank=4),
    "experts choose": blocks(experts=ExpertsConfig(count=2, router="expert_choice", active=1)),
    "tokens choose": blocks(experts=ExpertsConfig(count=2, router="token_choice", active=1)),
    "timesteps choose": blocks(experts=ExpertsConfig(count=2, router="timestep", active=1, bins=4))}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_answers_are_those_of_pytorch(structure):
    model = random_model(STRUCTURES[structure])
    plain, ours = Pipeline(model), Pipeline(model, runtime=IN_OPENVINO)
    for rows in (3, 1):
        x, t, y = inputs(rows)
        ahead = model.modulations(t, y).detach()
        with torch.no_grad():
            expected = plain.denoise(x, t, y)
            for given in ((x, t, y), (x, t, y, ahead)):
                torch.testing.assert_close(ours.denoise(*given), expected, rtol=1e-4, atol=1e-4)
            answer, change = ours.denoise.with_change(x, t, y, ahead)
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(change, plain.denoise.with_change(x, t, y)[1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.denoise.without_blocks(x, t, y, ahead, change), expected, rtol=1e-4,
                                       atol=1e-4)


@pytest.mark.parametrize("kind", ["int8_static", "int8_dynamic", "int8_weight_only", "int4_weight_only:16"])
def test_packed_layers_mean_what_they_meant(kind):
    model = random_model(kind=kind)
    x, t, y = inputs()
    with torch.no_grad():
        expected, actual = model(x, t, y), Pipeline(model, runtime=IN_OPENVINO).denoise(x, t, y)
    assert (actual - expected).norm() < (0.02 if "dynamic" in kind else 0.004) * expected.norm()
    layers = {type(layer) for name, layer in prepared(model).named_modules() if name in IN_BLOCKS}
    assert layers == ({Simulated} if kind == "int8_static" else {nn.Linear})
    assert type(model.blocks[0].attn.qkv) is not Simulated  # a copy was changed


def test_static_layers_multiply_integers():
    x, t, y = inputs()
    prepared_model = prepared(random_model(kind="int8_static"))
    run = InOpenVino(prepared_model, prepared_model.forward, "float32", 1)
    run(x, t, y)
    (request, taken), = run.requests.values()
    assert taken == ["x", "t", "y"]
    products = [node for node in request.get_compiled_model().get_runtime_model().get_ops()
                if node.get_rt_info()["layerType"].astype(str) in ("FullyConnected", "MatMul")]
    in_integers = [node for node in products if node.get_rt_info()["primitiveType"].astype(str).lower().endswith("i8")]
    assert len(in_integers) == len(IN_BLOCKS)


def test_bfloat16_is_close_and_is_not_float32():
    model = random_model()
    x, t, y = inputs()
    with torch.no_grad():
        expected = model(x, t, y)
    error = (Pipeline(model, runtime=replace(IN_OPENVINO, dtype="bfloat16")).denoise(x, t, y) - expected).norm()
    assert error < 0.05 * expected.norm()


@pytest.mark.parametrize("sampling", [
    Sampling("ddim", 5, guidance=2.0), Sampling("dpmpp_2m", 4, guidance=2.0, guidance_interval=(300, 700)),
    Sampling("ddim", 15, cache=Caching((0, 1, 2, 5, 9, 12), order=1))])
def test_whole_runs_give_the_same_images(sampling):
    plain = Pipeline(random_model(), sampling=sampling)
    ours = plain.replace(runtime=IN_OPENVINO)
    images = ours.sample(range(3), batch=2)
    assert np.abs(images.astype(int) - plain.sample(range(3), batch=2)).max() <= 1
    assert np.array_equal(images, ours.sample(range(3), batch=2))  # no answer is overwritten by the next


def test_adaln_goes_through_it_too_for_any_number_of_rows():
    model = random_model()
    denoise = Pipeline(model, runtime=IN_OPENVINO).denoise
    for rows in (3, 8):
        _, t, y = inputs(rows)
        with torch.no_grad():
            torch.testing.assert_close(denoise.modulations(t, y), model.modulations(t, y), rtol=1e-4, atol=1e-5)
    assert list(denoise._functions["modulations"].requests) == [False]  # compiled once


def test_a_converted_function_takes_any_number_of_images():
    x, t, y = inputs(2)
    made = converted(prepared(random_model()), "forward", dict(zip(INPUTS, (x, t, y))))
    assert [given.get_any_name() for given in made.inputs] == ["x", "t", "y"]
    assert [str(given.get_partial_shape()) for given in made.inputs] == ["[?,2,10,6]", "[?]", "[?]"]
    assert [answer.get_any_name() for answer in made.outputs] == ["noise"]


def test_the_engine_is_saved_and_belongs_to_the_fingerprint(tmp_path):
    plain = Pipeline(random_model(), runtime=Runtime(compile=True))
    ours = plain.replace(runtime=IN_OPENVINO)
    formats.save(ours, tmp_path / "model")
    again = formats.load(tmp_path / "model")
    assert again.runtime == IN_OPENVINO and again.fingerprint() == ours.fingerprint() != plain.fingerprint()
    assert ours.replace(runtime=replace(IN_OPENVINO, compile=False)).denoise.compiler is None  # PyTorch, uncompiled


@pytest.mark.parametrize("values, sentence", [
    ({"engine": "onnx"}, "engine 'onnx' is unknown; use torch or openvino"),
    ({"engine": "openvino", "compile": True, "dtype": "float16"}, "OpenVINO runs float32 or bfloat16"),
    ({"engine": "openvino", "compile": True, "attention": "native"}, "attention of its own")])
def test_what_it_has_not_is_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Runtime(**values)


def test_compile_asks_for_it(tmp_path, monkeypatch):
    pipeline = Pipeline(random_model())
    context = Context(pipeline, tmp_path)
    made = Compile(dtype="float32", engine="openvino").apply(pipeline, context)
    assert made.runtime == IN_OPENVINO and context.witnesses[-1]["engine"] == "openvino"
    with pytest.raises(Refused, match="OpenVINO runs on a CPU here, and this is cuda"):
        Compile(engine="openvino").apply(pipeline, Context(pipeline, tmp_path, device="cuda"))
    with pytest.raises(ValueError, match="engine 'tvm' is unknown; use one of torch, openvino"):
        Compile(engine="tvm")
    library.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(Refused, match=r"not installed: pip install 'slimdit\[openvino\]', or use the engine torch"):
        Compile(engine="openvino").apply(pipeline, context)
    library.cache_clear()


def test_an_interruption_is_one_afterwards():
    program = ("import gc, signal\n"
               "from tests.test_openvino import IN_OPENVINO, Pipeline, inputs, random_model\n"
               "denoise = Pipeline(random_model(), runtime=IN_OPENVINO).denoise\n"
               "denoise(*inputs(1)), denoise(*inputs(2))\n"
               "del denoise\ngc.collect()\n"
               "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background ignores it
               "try:\n    signal.raise_signal(signal.SIGINT)\n"
               "except KeyboardInterrupt:\n    print('interrupted')\n")
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout == b"interrupted\n"


def test_nothing_is_sent_over_the_network():
    program = ("import socket, sys\n"
               "def refuse(*a, **k): raise AssertionError('a connection')\n"
               "socket.socket.connect = refuse\n"
               "from slimdit.models.openvino import library\nlibrary()\n"
               "assert sys.modules['openvino_telemetry'] is None\n"
               "assert 'openvino.tools.ovc.telemetry_stub' in sys.modules\n")
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("kind", [None, "int8_static"])
def test_an_export_runs_as_its_page_says_and_is_the_model(kind, tmp_path, monkeypatch):
    model = random_model(kind=kind)
    formats.save(Pipeline(model, sampling=Sampling("ddim", 4), name="tiny"), tmp_path / "out", format="openvino")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.bin",
                                                                          "model.xml"]
    page = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "out")
    told: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], told)
    assert told["noise"].shape == (1, 4, 10, 6) and "classes in 0..2; 3 is the null class" in page
    x, t, y = inputs()
    run = core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = model(x, t, y).numpy()
    answer = run({"x": x.numpy(), "t": t.numpy(), "y": y.numpy()})["noise"]
    assert np.linalg.norm(answer - expected) < (1e-5 if kind is None else 0.01) * np.linalg.norm(expected)
    assert json.loads(Path("config.json").read_text())["timesteps"] == [999, 749, 499, 249]


def test_an_export_of_integers_is_a_quarter(tmp_path):
    config = uniform(depth=2, width=128, heads=2, patch=2, input_size=(10, 6), channels=2, classes=3)
    for kind in (None, "int8_static"):
        formats.save(Pipeline(random_model(config, kind)), tmp_path / str(kind), format="openvino")
    size = {kind: (tmp_path / str(kind) / "model.bin").stat().st_size for kind in (None, "int8_static")}
    in_blocks = 4 * 2 * 12 * 128 * 128  # bytes of the float weights that were packed
    assert size["int8_static"] < size[None] - 0.7 * in_blocks


def test_an_export_is_not_read_back(tmp_path):
    formats.save(Pipeline(random_model()), tmp_path / "out", format="openvino")
    with pytest.raises(formats.FormatError, match="cannot be turned back into a model: give the folder that it was"):
        formats.load(tmp_path / "out")
    formats.save(Pipeline(random_model()), tmp_path / "out", format="openvino")  # in the place of one that was there
    (tmp_path / "out" / "other").touch()
    with pytest.raises(formats.FormatError, match="holds other files"):
        formats.save(Pipeline(random_model()), tmp_path / "out", format="openvino")
