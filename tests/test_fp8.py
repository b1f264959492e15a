"""Eight-bit float layers: what they store and mean, away from the GPUs they are for."""

import copy

import pytest
import torch
from torch import nn

from slimdit import formats
from slimdit.models.dit import DiT, uniform
from slimdit.models.fp8 import Fp8Dynamic, float8_rows, multiplies_float8
from slimdit.models.surgery import pack_linears, weight_bytes
from slimdit.pipeline import Pipeline
from slimdit.recipe import config_mismatch, fingerprint

SMALL = uniform(depth=1, width=32, heads=2, patch=2, input_size=(4, 4), channels=1, classes=3)


def float_layer(inside=48, outside=32, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(inside, outside, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-4, 2, outside)[:, None])
    return layer


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_rows_use_the_whole_range_and_keep_three_bits():
    rows = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    rounded, scale = float8_rows(rows)
    assert rounded.dtype == torch.float8_e4m3fn and (rounded.float().abs().amax(1) == 448).all()
    large = rows.abs() > 0.01 * rows.abs().amax(1, keepdim=True)
    relative = ((rounded.float() * scale - rows) / rows).abs()
    assert relative[large].max() <= 1 / 16 * 1.001
    assert (float8_rows(torch.zeros(2, 4))[0].float() == 0).all()


def test_is_a_quarter_of_the_bytes_and_near_the_float_layer():
    layer, x = float_layer(256, 256), torch.randn(3, 7, 256)
    packed = Fp8Dynamic.of(layer)
    assert weight_bytes(packed) < 0.27 * weight_bytes(layer)
    assert packed(x).shape == (3, 7, 256) and packed(x).dtype == x.dtype
    error = (packed(x) - layer(x)).norm(dim=(0, 1)) / layer(x).norm(dim=(0, 1))
    assert error.mean() < 0.05 and error.max() < 0.1  # in every channel, large or small
    assert packed(torch.zeros(0, 256)).shape == (0, 256)


def test_is_the_arithmetic_of_its_definition():
    layer, x = float_layer(), torch.randn(5, 48)
    packed = Fp8Dynamic.of(layer)
    tokens, scale = float8_rows(x)
    expected = (tokens.double() * scale.double()) @ (packed.weight.double() * packed.scale.double()[:, None]).t()
    torch.testing.assert_close(packed(x).double(), expected + layer.bias.double(), rtol=1e-5, atol=1e-5)


def test_the_devices_product_is_called_with_the_layout_it_takes(monkeypatch):
    """PyTorch's reference kernel stands in for the GPU's: same arguments, another machine."""
    layer, x = float_layer(bias=False), torch.randn(5, 48)
    packed = Fp8Dynamic.of(layer)
    expected = packed(x)
    assert not multiplies_float8(*(float8_rows(torch.zeros(4, 16))[0],) * 2)  # not on a CPU
    monkeypatch.setattr("slimdit.models.fp8.multiplies_float8", lambda a, b: True)
    product = packed(x)
    assert product.dtype == torch.float32
    assert ((product - expected).norm() / expected.norm()) < 0.01  # its output is bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_keeps_what_is_packed(dtype):
    packed = Fp8Dynamic.of(float_layer())
    cast = copy.deepcopy(packed).to(dtype)
    assert same_bits(cast.weight, packed.weight) and torch.equal(cast.scale, packed.scale)
    assert cast.scale.dtype == torch.float32 and cast.bias.dtype == dtype
    assert cast(torch.randn(2, 48, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_survives_a_native_folder(dtype, tmp_path):
    model = DiT(SMALL).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    pack_linears(model, {f"blocks.0.{name}": "fp8_dynamic" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")})
    assert config_mismatch(model) == ""
    formats.save(Pipeline(model), tmp_path / "model", **({"dtype": dtype} if dtype else {}))
    again = formats.load(tmp_path / "model").model
    for name in ("attn.qkv", "mlp.fc2"):
        was, now = model.blocks[0].get_submodule(name), again.blocks[0].get_submodule(name)
        assert same_bits(now.weight, was.weight) and torch.equal(now.scale, was.scale)
    if dtype is None:
        x, t, y = torch.randn(2, 1, 4, 4), torch.tensor([5, 900]), torch.tensor([0, 3])
        assert torch.equal(again(x, t, y), model(x, t, y))
        assert fingerprint(Pipeline(again)) == fingerprint(Pipeline(model))


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_does():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device does not multiply 8-bit floats")
    packed, x = Fp8Dynamic.of(float_layer()), torch.randn(17, 48)
    moved = copy.deepcopy(packed).to("cuda")
    assert multiplies_float8(float8_rows(x.cuda())[0], moved.weight)
    assert ((moved(x.cuda()).cpu() - packed(x)).norm() / packed(x).norm()) < 0.01
