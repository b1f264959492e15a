"""Packed linear layers: what they store, what they compute, and that casts and devices leave them whole."""

import copy

import pytest
import torch
from torch import nn

from slimdit.models.dit import DiT, uniform
from slimdit.models.linear import (
    FEW_ROWS,
    LINEARS,
    READS_INTEGERS,
    Int8Dynamic,
    Int8Static,
    Int8WeightOnly,
    integer_matmul,
    reads_integers,
    replace_linear,
)
from slimdit.models.surgery import pack_linears, packable_linears, weight_bytes

KINDS = ["int8_weight_only", "int8_dynamic"]


def float_layer(inside=48, outside=40, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(inside, outside, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-2, 2, outside)[:, None])  # channels of very different size
    return layer


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_stores_int8_of_255_levels_per_channel_and_is_a_quarter_of_the_bytes(kind):
    layer = float_layer(256, 256)
    packed = LINEARS[kind].of(layer)
    stored = packed.state_dict()
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "weight": torch.int8, "scale": torch.float32, "bias": torch.float32}
    assert stored["weight"].min() >= -127
    assert (stored["weight"].abs().amax(1) == 127).all()  # every channel uses its whole range
    assert (packed.dequantize() - layer.weight).abs().amax(1).le(packed.scale / 2 * 1.0001).all()
    assert weight_bytes(packed) < 0.27 * weight_bytes(layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48,), (1, 48), (7, 48), (2, 33, 48)])
def test_output_is_near_the_float_layers_in_every_channel(kind, shape):
    layer = float_layer()
    x = torch.randn(shape)
    actual, expected = LINEARS[kind].of(layer)(x), layer(x)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert relative_error(actual, expected) < 0.02


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (FEW_ROWS, 48), (FEW_ROWS + 1, 48), (2, 2, 48)])
def test_few_rows_in_bfloat16_are_multiplied_by_the_integers_themselves(shape, bias):
    packed, x = Int8WeightOnly.of(float_layer(bias=bias)).bfloat16(), torch.randn(shape).bfloat16()
    rows = x.reshape(-1, 48)
    assert reads_integers(rows) == (len(rows) <= FEW_ROWS and READS_INTEGERS)
    expected = rows.double() @ packed.dequantize().double().t()
    expected = (expected if packed.bias is None else expected + packed.bias.double()).view(*shape[:-1], 40)
    torch._dynamo.reset()  # it counts the layers compiled before
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True, dynamic=False)
    for layer in (packed, compiled):  # which turn many rows' weights to floats at different places
        actual = layer(x)
        assert actual.dtype == torch.bfloat16
        assert (actual.double() - expected).norm(dim=-1).le(0.01 * expected.norm(dim=-1)).all()


def test_half_precision_does_not_overflow_on_the_integers():
    layer = nn.Linear(48, 40)
    nn.init.constant_(layer.weight, 0.01)
    packed = Int8WeightOnly.of(layer).half()
    assert packed(torch.full((8, 48), 100.0).half()).isfinite().all()  # 127 * 100 * 48 is beyond float16


@pytest.mark.parametrize("inside", [1, 8, 17, 24, 40])
def test_rows_of_no_whole_vectors_turn_the_weights_to_floats(inside):
    packed, x = Int8WeightOnly.of(float_layer(inside)).bfloat16(), torch.randn(4, inside).bfloat16()
    assert not reads_integers(x) and torch.isfinite(packed(x)).all()  # PyTorch's product would read past the weights


def test_other_precisions_and_no_rows_turn_the_weights_to_floats():
    assert not reads_integers(torch.zeros(1, 48))
    assert not reads_integers(torch.zeros(1, 48).half())
    assert not reads_integers(torch.zeros(0, 48).bfloat16())


def test_dynamic_is_the_integer_arithmetic_of_its_definition():
    layer, x = float_layer(), torch.randn(5, 48)
    packed = Int8Dynamic.of(layer)
    scale = x.abs().amax(1, keepdim=True) / 127
    integers = (x / scale).round().to(torch.int64) @ packed.weight.to(torch.int64).t()
    expected = integers.double() * scale.double() * packed.scale.double() + layer.bias.double()
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-5, atol=1e-6)


def static_layer(step=0.03, zero=100, bias=True):
    packed = Int8Static.of(float_layer(bias=bias))
    packed.step.fill_(step)
    packed.zero.fill_(zero)
    return packed


def test_static_is_the_integer_arithmetic_of_its_definition():
    packed, x = static_layer(), 3 * torch.randn(5, 48)
    levels = ((x / packed.step).round() + 100).clamp(0, 255).to(torch.int64)
    assert levels.min() == 0 and levels.max() == 255  # both ends are cut off
    integers = (levels - 100) @ packed.weight.to(torch.int64).t()
    expected = integers.double() * packed.step.double() * packed.scale.double() + packed.bias.double()
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_static_layer_keeps_its_grid_in_a_cast_and_when_saved():
    packed = static_layer(step=0.0301)
    cast = copy.deepcopy(packed).to(torch.bfloat16)
    assert cast.step.dtype == torch.float32 and torch.equal(cast.step, packed.step)
    assert set(packed.state_dict()) == {"weight", "scale", "bias", "step", "zero"}
    x = torch.randn(7, 48)
    assert cast(x.bfloat16()).dtype == torch.bfloat16 and relative_error(cast(x.bfloat16()).float(), packed(x)) < 0.02
    with torch.device("meta"):
        empty = Int8Static(48, 40)
    empty.load_state_dict(packed.state_dict(), strict=True, assign=True)
    assert torch.equal(empty(x), packed(x)) and (Int8Static(48, 40)(x) == 0).all()


@pytest.mark.parametrize("rows, inside, outside", [(1, 8, 8), (17, 24, 16), (3, 5, 7), (64, 4608, 8)])
def test_integer_matmul_and_its_fallback_are_exact(rows, inside, outside, monkeypatch):
    a = torch.randint(-127, 128, (rows, inside), dtype=torch.int8)
    b = torch.randint(-127, 128, (outside, inside), dtype=torch.int8)
    a[0], b[0] = 127, 127  # the largest sum
    expected = a.to(torch.int64) @ b.to(torch.int64).t()
    assert integer_matmul(a, b).dtype == torch.int32
    assert torch.equal(integer_matmul(a, b).to(torch.int64), expected)
    monkeypatch.setattr("slimdit.models.linear.multiplies_integers", lambda a, b: False)
    assert torch.equal(integer_matmul(a, b).to(torch.int64), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_tokens_of_zeros_stay_zeros(kind):
    layer = float_layer(bias=False)
    with torch.no_grad():
        layer.weight[3] = 0
    packed = LINEARS[kind].of(layer)
    output = packed(torch.cat([torch.zeros(2, 48), torch.randn(2, 48)]))
    assert output.isfinite().all()
    assert (output[:2] == 0).all() and (output[:, 3] == 0).all() and (output[2:, :3] != 0).all()
    assert packed(torch.zeros(0, 48)).shape == (0, 40)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_keeps_weights_and_scales_and_changes_the_arithmetic(kind, dtype):
    layer = float_layer()
    packed = LINEARS[kind].of(layer)
    cast = copy.deepcopy(packed).to(dtype)
    assert torch.equal(cast.weight, packed.weight) and cast.weight.dtype == torch.int8
    assert torch.equal(cast.scale, packed.scale) and cast.scale.dtype == torch.float32
    assert cast.bias.dtype == dtype
    x = torch.randn(9, 48)
    assert cast(x.to(dtype)).dtype == dtype
    assert relative_error(cast(x.to(dtype)).float(), layer(x)) < 0.03
    there_and_back = copy.deepcopy(packed).to(torch.bfloat16).float()
    assert torch.equal(there_and_back.scale, packed.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_layer_on_meta_takes_the_tensors_of_a_packed_one(kind):
    packed = LINEARS[kind].of(float_layer())
    with torch.device("meta"):
        empty = LINEARS[kind](48, 40)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    empty.to(torch.bfloat16)
    assert empty.scale.dtype == torch.float32
    empty.load_state_dict(packed.state_dict(), strict=True, assign=True)
    x = torch.randn(4, 48)
    assert torch.equal(empty(x), packed(x))


def test_without_bias():
    layer = float_layer(bias=False)
    for kind in KINDS:
        assert set(LINEARS[kind].of(layer).state_dict()) == {"weight", "scale"}


def test_config_with_linears_builds_the_names_and_shapes_of_a_packed_model():
    config = uniform(depth=2, width=16, heads=2, patch=2, input_size=(4, 4), channels=1, classes=3)
    model = DiT(config)
    kinds = dict.fromkeys(packable_linears(model), "int8_dynamic")
    assert {"blocks.1.mlp.fc2", "t_embedder.mlp.2", "final_layer.linear"} < set(kinds)
    pack_linears(model, kinds)
    assert model.config.linears == kinds
    assert isinstance(model.blocks[0].attn.qkv, Int8Dynamic)
    with torch.device("meta"):
        empty = DiT(model.config)
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    x, t, y = torch.randn(2, 1, 4, 4), torch.tensor([0, 9]), torch.tensor([0, 3])
    assert torch.equal(empty(x, t, y), model(x, t, y))


def test_what_is_not_a_float_linear_or_a_known_kind_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
    with pytest.raises(ValueError, match="'int3' is unknown; use one of int8_weight_only, int8_dynamic, int8_static"):
        replace_linear(model, "0", "int3")
    for name in ("1", "2", "0.weight"):
        with pytest.raises(ValueError, match=f"no float linear layer called '{name}'"):
            replace_linear(model, name, "int8_dynamic")
    replace_linear(model, "0", "int8_weight_only")
    assert isinstance(model[0], Int8WeightOnly)
    with pytest.raises(ValueError, match="no float linear layer"):
        replace_linear(model, "0", "int8_dynamic")  # already packed


def test_compiled_is_the_eager_layer():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Int8Dynamic.of(float_layer(48, 48)), Int8WeightOnly.of(float_layer())

        def forward(self, x):
            return self.second(self.first(x))

    model, x = Both().eval(), torch.randn(2, 20, 48)
    with torch.inference_mode():
        compiled = torch.compile(model, dynamic=False, fullgraph=True)(x)
        assert relative_error(compiled, model(x)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rows, inside, outside", [(64, 48, 40), (2, 48, 40), (64, 50, 44)])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_computes_what_the_cpu_does(kind, rows, inside, outside):
    packed, x = LINEARS[kind].of(float_layer(inside, outside)), torch.randn(rows, inside)
    expected = packed(x)
    moved = copy.deepcopy(packed).to("cuda", torch.float32)
    assert moved.scale.device.type == "cuda"
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    both = copy.deepcopy(packed).to("cuda", torch.bfloat16)
    assert both.scale.device.type == "cuda" and torch.equal(both.scale.cpu(), packed.scale)
    assert relative_error(torch.compile(both, dynamic=False)(x.cuda().bfloat16()).float().cpu(), expected) < 0.03
