"""Four-bit layers: two weights a byte and back, groups that fit every row, a kind whose name is its structure."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimdit import formats
from slimdit.formats import FormatError
from slimdit.models.dit import DiT, uniform
from slimdit.models.int4 import Int4WeightOnly, fitting_group, pack, unpack
from slimdit.models.linear import linear_kind, replace_linear
from slimdit.models.rounding import INT4
from slimdit.models.surgery import pack_linears, weight_bytes
from slimdit.pipeline import Pipeline

SMALL = uniform(depth=1, width=24, heads=2, patch=2, input_size=(4, 4), channels=1, classes=3)


def float_layer(inside=48, outside=40, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(inside, outside, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-4, 2, outside)[:, None])  # channels of very different size
    return layer


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 13), st.randoms(use_true_random=False))
def test_packing_is_undone_by_unpacking(rows, columns, random):
    codes = torch.tensor([[random.randrange(16) for _ in range(columns)] for _ in range(rows)], dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (rows, (columns + 1) // 2) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, columns), codes)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 300))
def test_groups_are_the_largest_equal_parts_that_are_not_longer(row, most):
    group = fitting_group(row, most)
    assert row % group == 0 and group <= most
    assert not any(row % size == 0 for size in range(group + 1, min(most, row) + 1))


def test_is_an_eighth_of_the_bytes_and_a_little():
    layer = float_layer(1024, 512)
    packed = Int4WeightOnly.of(layer)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.state_dict().items()} == {
        "bias": ((512,), torch.float32), "weight": ((512, 512), torch.uint8),
        "scale": ((512, 8), torch.bfloat16), "zero": ((512, 8), torch.float16)}
    assert weight_bytes(packed) < 0.135 * weight_bytes(layer)


def test_every_weight_is_within_half_a_step_and_what_the_scale_loses():
    layer = float_layer(96, 40)
    packed = Int4WeightOnly.of(layer, group=32)
    step = packed.scale.float().repeat_interleave(32, dim=1)
    assert ((packed.dequantize() - layer.weight).abs() <= step * 0.57).all()
    codes = unpack(packed.weight, 96)
    assert codes.min() == 0 and codes.max() == 15


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 33, 48), (0, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_that_of_the_weights_it_means_in_the_inputs_precision(shape, dtype):
    packed, x = Int4WeightOnly.of(float_layer()).to(dtype), torch.randn(shape, dtype=dtype)
    assert packed(x).dtype == dtype and packed(x).shape == (*shape[:-1], 40)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, packed.dequantize().to(dtype), packed.bias))


def test_a_cast_keeps_what_is_packed():
    packed = Int4WeightOnly.of(float_layer())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = copy.deepcopy(packed).to(dtype)
        assert cast.bias.dtype == dtype
        for name in ("weight", "scale", "zero"):
            assert torch.equal(getattr(cast, name), getattr(packed, name)), name
            assert getattr(cast, name).dtype == getattr(packed, name).dtype


def test_odd_rows_and_rows_of_zeros():
    layer = float_layer(45, 6)
    with torch.no_grad():
        layer.weight[2] = 0
    packed = Int4WeightOnly.of(layer, group=16)
    assert packed.group == 15 and packed.weight.shape == (6, 23)
    assert (packed.dequantize()[2] == 0).all() and packed.dequantize().isfinite().all()
    assert torch.equal(packed(torch.zeros(1, 45))[0], layer.bias)


def test_empty_is_zero_and_takes_a_packed_ones_tensors():
    packed = Int4WeightOnly.of(float_layer(), group=16)
    empty = Int4WeightOnly(48, 40, group=16)
    assert (empty(torch.randn(3, 48)) == 0).all()
    empty.load_state_dict(packed.state_dict(), strict=True)
    x = torch.randn(4, 48)
    assert torch.equal(empty(x), packed(x))


def test_the_kind_carries_the_group():
    assert linear_kind("a", "int4_weight_only:64") == (Int4WeightOnly, {"group": 64})
    model = nn.Sequential(nn.Linear(96, 4))
    replace_linear(model, "0", "int4_weight_only:40")
    assert model[0].group == 32 and model[0].scale.shape == (4, 3)


@pytest.mark.parametrize("kind", ["int4_weight_only", "int4_weight_only:", "int4_weight_only:0", "int4_weight_only:064",
                                  "int4_weight_only:-8", "int4_weight_only:1e3", "int4_weight_only:99999999",
                                  "int4_weight_only:64:64", "int8_dynamic:64", "int4_weight_only:64\n"])
def test_other_spellings_are_refused_in_config_and_file(kind, tmp_path):
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1: linear kind .* is unknown; .*int4_weight_only:GROUP"):
        DiT(replace(SMALL, linears={"blocks.0.mlp.fc1": kind}))
    formats.save(Pipeline(DiT(SMALL)), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"linears": {}', f'"linears": {{"blocks.0.mlp.fc1": {kind!r}}}'
                                                 .replace("'", '"')))
    with pytest.raises(FormatError, match="is unknown"):
        formats.load(tmp_path / "model")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_survives_a_native_folder(dtype, tmp_path):
    model = DiT(SMALL).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    pack_linears(model, {"blocks.0.mlp.fc1": "int4_weight_only:128", "blocks.0.mlp.fc2": "int4_weight_only:16"})
    formats.save(Pipeline(model), tmp_path / "model", **({"dtype": dtype} if dtype else {}))
    again = formats.load(tmp_path / "model").model
    assert again.config == model.config
    for name, tensor in again.blocks[0].mlp.state_dict().items():
        assert tensor.dtype == model.blocks[0].mlp.state_dict()[name].dtype
        if "bias" not in name or dtype is None:
            assert torch.equal(tensor, model.blocks[0].mlp.state_dict()[name])


@pytest.mark.parametrize(("kind", "word"), [("int4_weight_only:8", "shape"), ("int8_weight_only", "unexpected")])
def test_a_file_of_another_kind_is_refused(kind, word, tmp_path):
    model = DiT(SMALL)
    pack_linears(model, {"blocks.0.mlp.fc1": "int4_weight_only:24"})
    formats.save(Pipeline(model), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("int4_weight_only:24", kind))
    with pytest.raises(FormatError, match=word):
        formats.load(tmp_path / "model")


def test_a_scale_of_another_type_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = DiT(SMALL)
    pack_linears(model, {"blocks.0.mlp.fc1": "int4_weight_only:24"})
    formats.save(Pipeline(model), tmp_path / "model")
    path, name = tmp_path / "model" / "model.safetensors", "blocks.0.mlp.fc1.scale"
    save_file({**(tensors := load_file(path)), name: tensors[name].float()}, path)
    with pytest.raises(FormatError, match=r"scale is torch\.float32 where the structure says torch.bfloat16"):
        formats.load(tmp_path / "model")
    assert INT4.scale == torch.bfloat16
