"""Kernels of our own: functions equal to their definitions, and models that run as before without them."""

import copy
import gc
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.metrics.speed import resident_bytes
from slimdit.models import kernels
from slimdit.models.dit import DiT, PatchEmbedder, uniform
from slimdit.models.execution import prepack
from slimdit.models.linear import FAST_PRODUCT, Int8Static, Prepacked, PrepackedInt8, int8_product
from slimdit.models.surgery import pack_linears
from slimdit.pipeline import Pipeline, Runtime

native = pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing())
CPU = torch.device("cpu")


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def random_model(depth=2, heads=2, width=96):
    torch.manual_seed(0)
    config = uniform(depth=depth, width=width, heads=heads, patch=2, input_size=(10, 6), channels=2, classes=3)
    model = DiT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 2, 10, 6, generator=generator), torch.arange(batch) * 90, torch.arange(batch) % 4)


@native
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 3), st.integers(1, 80), st.booleans(), st.booleans())
def test_attention_is_its_definition_for_any_size(images, tokens, heads, size, stepped, biased):
    torch.manual_seed(tokens)
    inner = heads * size
    qkv = torch.randn(images * tokens, 3 * inner).bfloat16()
    steps = torch.rand(images * tokens, 1) + 0.5 if stepped else None
    bias = torch.randn(3 * inner).bfloat16() if biased else None
    meant = qkv.float() * (1 if steps is None else steps) + (0 if bias is None else bias)
    q, k, v = meant.view(images, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
    q, k, v = (part.bfloat16().double() for part in (q / math.sqrt(size), k, v))  # what the CPU multiplies
    mixed = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
    actual = torch.ops.slimdit.attend(qkv, steps, bias, images, heads)
    assert actual.dtype == torch.bfloat16
    error = actual.double() - mixed.transpose(1, 2).reshape(images * tokens, inner)
    assert error.abs().max() < 0.01 * v.abs().max()  # means of v: small ones have cancelled
    alone = torch.ops.slimdit.attend(qkv[:tokens], None if steps is None else steps[:tokens], bias, 1, heads)
    assert torch.equal(alone, actual[:tokens])


@native
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.floats(0.01, 20), st.booleans())
def test_levels_are_gelu_within_a_step(rows, width, size, biased):
    torch.manual_seed(rows)
    x, steps = torch.randn(rows, width).bfloat16(), size * (torch.rand(rows, 1) + 0.1)
    bias = torch.randn(width).bfloat16() if biased else None
    levels, level_steps = torch.ops.slimdit.gelu_levels(x, steps, bias)
    meant = x.float() * steps + (0 if bias is None else bias.float())
    expected = torch.nn.functional.gelu(meant, approximate="tanh")
    assert levels.dtype == torch.uint8 and level_steps.shape == (rows, 1)
    error = ((levels.float() - 128) * level_steps - expected).abs()
    assert (error <= 0.502 * level_steps + 0.001 + 0.0003 * meant.abs()).all()
    assert (level_steps * 127 <= expected.abs().amax(1, keepdim=True) * 1.001 + 0.001
            + 0.0003 * meant.abs().amax(1, keepdim=True)).all()  # no coarser than needed


@native
def test_what_is_no_number_is_not_hidden():
    qkv = torch.randn(20, 3 * 32).bfloat16()
    qkv[3] = torch.nan
    assert torch.ops.slimdit.attend(qkv, None, None, 1, 2).isnan().all()
    _, steps = torch.ops.slimdit.gelu_levels(torch.ones(2, 16).bfloat16(), torch.tensor([[torch.nan], [1.0]]), None)
    assert steps[0].isnan() and steps[1] > 0


def static_layer(inside, outside, biased, step=0.02, zero=120):
    layer = Int8Static.of(torch.nn.Linear(inside, outside, biased))
    layer.step.fill_(step)
    layer.zero.fill_(zero)
    return layer.bfloat16()


@native
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 90), st.booleans(), st.integers(0, 255))
def test_a_prepacked_static_layer_is_its_definition_for_any_size(rows, inside, outside, biased, zero):
    torch.manual_seed(rows)
    layer, x = static_layer(inside, outside, biased, zero=zero), torch.randn(2, rows, inside).bfloat16()
    with torch.no_grad():
        actual, expected = PrepackedInt8(layer)(x), layer(x.float())
    assert actual.dtype == torch.bfloat16 and actual.shape == expected.shape
    torch.testing.assert_close(actual.float(), expected, rtol=0.008, atol=1e-5)  # bfloat16's own rounding


@native
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 90), st.booleans(), st.integers(0, 40))
def test_its_gelu_is_what_the_next_layer_rounds_to(rows, inside, hidden, biased, zero):
    torch.manual_seed(rows)
    first, second = static_layer(inside, hidden, biased), static_layer(hidden, 8, True, 0.01, zero)
    x = torch.randn(rows, inside).bfloat16()
    with torch.no_grad():
        expected = torch.nn.functional.gelu(first(x.float()), approximate="tanh")
        levels = PrepackedInt8(first).gelu_levels(x, PrepackedInt8(second))
    wanted = (expected / second.step + zero).clamp(0, 255)
    assert levels.dtype == torch.uint8 and (levels - wanted).abs().max() <= 0.51


@native
@pytest.mark.parametrize("kind", [None, "int8_dynamic", "int8_static"])
def test_a_model_gives_with_them_what_it_gives_without(kind):
    model = random_model()
    if kind:
        pack_linears(model, {f"blocks.{block}.{name}": kind for block in range(2)
                             for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}, {})
    expected = Pipeline(model).denoise(*inputs(3))
    native, plain = (Pipeline(model, runtime=Runtime("bfloat16", attention=form)).denoise
                     for form in ("native", "explicit"))
    with torch.no_grad():
        assert relative(native(*inputs(3)), expected) < 1.5 * relative(plain(*inputs(3)), expected) < 0.05
    fused = model.to(torch.float32)  # the form that bfloat16 left on the model is not for other types
    torch.testing.assert_close(fused(*inputs(3)), expected)


@native
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 90), st.booleans(), st.booleans())
def test_a_prepacked_layer_is_the_float_layer_for_any_size(rows, inside, outside, biased, gelu):
    torch.manual_seed(rows)
    layer = torch.nn.Linear(inside, outside, biased).bfloat16()
    x = torch.randn(2, rows, inside).bfloat16()
    expected = torch.nn.functional.linear(x.double(), layer.weight.double(),
                                          layer.bias.double() if biased else None)
    if gelu:
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    with torch.no_grad():
        actual = Prepacked(layer.weight, layer.bias)(x, gelu)
    assert actual.dtype == torch.bfloat16 and actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= 0.006 * expected.abs() + 0.01).all()  # bfloat16's steps: 2^-8


@native
def test_weights_are_in_the_packed_layout_alone_and_go_with_their_layer():
    layer = torch.nn.Linear(1024, 8192).bfloat16()
    packed = Prepacked(layer.weight, layer.bias)
    assert sum(tensor.numel() for tensor in packed.state_dict().values()) <= 8192
    with torch.no_grad(), pytest.raises(RuntimeError, match="packed for another layer, or for a copy"):
        copy.deepcopy(packed)(torch.ones(1, 1024).bfloat16())
    before = resident_bytes()
    for _ in range(40):  # 16 MB each
        Prepacked(layer.weight, layer.bias)
    gc.collect()
    assert resident_bytes() - before < 200e6


@native
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_patches_are_embedded_by_a_product_as_by_their_convolution(batch, channels, patch, rows, columns):
    torch.manual_seed(patch)
    embedder = PatchEmbedder(channels, 12, patch).bfloat16()
    x = torch.randn(batch, channels, rows * patch, columns * patch).bfloat16()
    with torch.no_grad():
        expected = copy.deepcopy(embedder).double()(x.double())
        prepack(embedder)
        assert isinstance(embedder.proj, Prepacked)
        assert ((embedder(x).double() - expected).abs() <= 0.006 * expected.abs() + 0.01).all()


@native
def test_running_a_model_leaves_its_weights_as_they_are():
    model = random_model().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pipeline = Pipeline(model, runtime=Runtime("bfloat16"))
    with torch.no_grad():
        pipeline.denoise(*inputs(2))
    assert any(isinstance(layer, Prepacked) for layer in pipeline.denoise.model.modules())
    assert not any(isinstance(layer, Prepacked) for layer in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@native
@pytest.mark.skipif(not FAST_PRODUCT, reason="needs VNNI")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_integer_product_is_the_same_with_and_without_python(dtype):
    torch.manual_seed(0)
    levels = torch.randint(0, 255, (9, 40), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (24, 40)).to(torch.int8)
    scale = torch.rand(24)
    exact = (levels.double() - 128) @ weight.double().t() * scale.double()
    for _ in range(2):  # packed, and found packed
        actual = torch.ops.slimdit.int8_product(levels, weight, scale, dtype)
        assert actual.dtype == dtype and torch.equal(actual, int8_product(levels, weight, scale, dtype))
    assert relative(actual, exact) < 0.005


@pytest.mark.skipif(not FAST_PRODUCT, reason="needs VNNI")
def test_without_a_compiler_integers_are_multiplied_by_way_of_python(tmp_path):
    program = ("import torch\nfrom slimdit.models.linear import Int8Dynamic\nfrom slimdit.models import kernels\n"
               "assert kernels.missing()\nlayer = Int8Dynamic.of(torch.nn.Linear(32, 24))\nx = torch.randn(5, 32)\n"
               "expected = x @ layer.dequantize().t() + layer.bias\n"
               "assert (layer(x) - expected).norm() < 0.02 * expected.norm()\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr


@native
def test_they_run_inside_a_compiled_model():
    model = random_model(depth=1)
    pack_linears(model, {"blocks.0.mlp.fc1": "int8_dynamic", "blocks.0.mlp.fc2": "int8_dynamic"}, {})
    with torch.no_grad():
        plain, compiled = (Pipeline(model, runtime=Runtime("bfloat16", compiled, "native")).denoise(*inputs(2))
                           for compiled in (False, True))
    assert relative(compiled, plain.double()) < 0.02


@native
def test_gradients_pass_where_they_are_asked_for():
    model = random_model(depth=1).bfloat16()
    model.use_attention("native")
    x, t, y = inputs(2)
    model(x.bfloat16(), t, y).float().square().sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.norm() > 0


def test_auto_is_native_for_bfloat16_on_a_cpu_that_has_them(monkeypatch):
    monkeypatch.setattr(kernels, "missing", str)
    assert Runtime("bfloat16", compile=True).attention_form(64, CPU) == "native"
    assert Runtime("bfloat16").attention_form(2048, CPU) == "native"
    assert Runtime("float32", compile=True).attention_form(64, CPU) == "explicit"
    assert Runtime("bfloat16", compile=True).attention_form(64, torch.device("cuda")) == "fused"


def test_without_them_models_run_as_before_and_asking_for_them_says_why(monkeypatch):
    monkeypatch.setattr(kernels, "missing", lambda: "no C++ compiler was found")
    assert Runtime("bfloat16", compile=True).attention_form(64, CPU) == "explicit"
    with pytest.raises(ValueError, match="native attention cannot be had: no C\\+\\+ compiler was found; use auto"):
        Runtime("bfloat16", attention="native").attention_form(64, CPU)
    with pytest.raises(ValueError, match="cannot be had: it is for bfloat16 on a CPU"):
        Runtime(attention="native").attention_form(64, CPU)


@pytest.mark.skipif("they are for" in kernels.unsuitable(), reason="another system")
def test_a_compiler_that_fails_is_told_once_and_leaves_nothing(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "unsuitable", str)
    monkeypatch.setattr(kernels, "compiler", lambda: "false")
    kernels.loaded.cache_clear()
    try:
        assert "kernels.cpp was not compiled" in kernels.missing() == kernels.missing()
        assert len(caplog.records) == 1 and "slower than they could" in caplog.text
        assert list((tmp_path / "slimdit").iterdir()) == []
    finally:
        kernels.loaded.cache_clear()


@native
def test_they_are_compiled_once_into_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kernels.compiled()
    written = path.stat().st_mtime_ns
    assert path.parent == tmp_path / "slimdit" and kernels.compiled().stat().st_mtime_ns == written
