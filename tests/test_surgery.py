"""Changes of a model's layers that must not change its answers, or say why they cannot be made."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from slimdit.models.dit import BlockConfig, DiT, DiTConfig, attention_of
from slimdit.models.rounding import INT4, INT8
from slimdit.models.surgery import (
    SMOOTHABLE,
    integer_grid,
    keep_heads,
    pack_linears,
    packable_linears,
    put_attention,
    smooth_inputs,
    unsmoothable,
)
from slimdit.recipe import config_mismatch
from slimdit.training.calibration import Call, absolute_maxima

# Blocks that differ: heads that are wider and narrower than the model.
CONFIG = DiTConfig((8, 8), 1, 3, 2, 24, (BlockConfig(2, 8, 40), BlockConfig(4, 12, 96)))
CALL = Call(torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 400, 999]),
            torch.tensor([0, 2, 3]))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DiT(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def answer(model):
    with torch.no_grad():
        return model(CALL.x, CALL.t, CALL.y)


def factors(model, block, layer):
    """Divisors over two orders of magnitude, a different one per channel."""
    inside = model.blocks[block].get_submodule(layer).in_features
    return torch.logspace(-1, 1, inside)[torch.randperm(inside, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("layer", SMOOTHABLE)
@pytest.mark.parametrize("block", [0, 1])
def test_smoothing_divides_a_layers_inputs_and_leaves_its_outputs(model, block, layer):
    name, divisor = f"blocks.{block}.{layer}", factors(model, block, layer)
    before = answer(model), absolute_maxima(model, [CALL], [name])[name].amax(0)
    smooth_inputs(model, block, layer, divisor)
    after = answer(model), absolute_maxima(model, [CALL], [name])[name].amax(0)
    assert (after[0] - before[0]).norm() < 1e-5 * before[0].norm()
    torch.testing.assert_close(after[1] * divisor, before[1], rtol=1e-3, atol=1e-5)


def test_smoothing_everything_leaves_the_models_answers(model):
    before = answer(model)
    for block in (0, 1):
        for layer in SMOOTHABLE:
            smooth_inputs(model, block, layer, factors(model, block, layer))
    assert (answer(model) - before).norm() < 1e-5 * before.norm()
    assert config_mismatch(model) == ""


def test_dividing_by_one_changes_no_bit(model):
    before = copy.deepcopy(model.state_dict())
    for layer in SMOOTHABLE:
        smooth_inputs(model, 0, layer, torch.ones_like(factors(model, 0, layer)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_smoothed_is_said(model):
    with pytest.raises(ValueError, match=r"no division of the inputs of blocks\.0\.mlp\.fc2 can be folded: use one of"):
        smooth_inputs(model, 0, "mlp.fc2", torch.ones(40))
    assert unsmoothable(model, 1, "mlp.fc1") == ""
    pack_linears(model, {"blocks.1.adaLN_modulation.1": "int8_weight_only"})
    assert "blocks.1.adaLN_modulation.1 to be a plain float" in unsmoothable(model, 1, "mlp.fc1")
    model.blocks[0].attn = nn.Sequential()
    assert "softmax attention alone: protect blocks.0.attn.qkv" in unsmoothable(model, 0, "attn.qkv")
    assert unsmoothable(model, 0, "mlp.fc1") == ""


OTHERS = (BlockConfig(4, 6, 40, conv=3), BlockConfig(4, 6, 40, "focused", conv=3),
          BlockConfig(4, 6, 40, "mediated", mediators=(1, 2)), BlockConfig(4, 6, 40, kv_heads=2))


def other_model(block):
    torch.manual_seed(0)
    model = DiT(DiTConfig((8, 8), 1, 3, 2, 24, (block,))).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("block", OTHERS, ids=str)
def test_smoothing_leaves_the_answers_of_every_attention(block):
    model = other_model(block)
    before = answer(model)
    for layer in SMOOTHABLE:
        if layer == "attn.proj" and block.kv_heads:
            assert "share their values between heads: protect it" in unsmoothable(model, 0, layer)
        else:
            smooth_inputs(model, 0, layer, factors(model, 0, layer))
    assert (answer(model) - before).norm() < 1e-5 * before.norm()


def test_an_attention_is_put_where_its_config_describes_it(model):
    block = replace(CONFIG.blocks[1], kv_heads=2, conv=3)
    attention = attention_of(24, block, CONFIG.grid)
    put_attention(model, 1, block, attention)
    assert model.blocks[1].attn is attention and model.config.blocks[1] == block and config_mismatch(model) == ""
    with pytest.raises(ValueError, match="block 0: the attention is not the one that"):
        put_attention(model, 0, CONFIG.blocks[0], attention)
    with pytest.raises(ValueError, match="block 1: only heads of plain softmax attention can be cut"):
        keep_heads(model, 1, [0])
    pack_linears(model, {"blocks.0.mlp.fc1": "int8_weight_only"})
    with pytest.raises(ValueError, match="1 layers are packed integers"):
        put_attention(model, 1, block, attention)


def test_every_linear_layer_can_be_packed_and_kinds_say_their_grids(model):
    names = packable_linears(model)
    assert len(names) == 14 and names[0] == "t_embedder.mlp.0" and names[-2] == "final_layer.linear"
    assert integer_grid(model, "blocks.0.mlp.fc2", "int4_weight_only:16") == (INT4, 10)
    assert integer_grid(model, "blocks.0.mlp.fc2", "int8_dynamic") == (INT8, 40)
    assert integer_grid(model, "blocks.0.mlp.fc2", "fp8_dynamic") is None
    pack_linears(model, dict.fromkeys(names, "int8_dynamic"))
    assert config_mismatch(model) == "" and packable_linears(model) == []
    assert answer(model).isfinite().all()
