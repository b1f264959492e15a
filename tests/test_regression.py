"""What regression promises: the block's own inputs and answers, an error that says what is added, zeros that stay."""

import copy

import pytest
import torch

from slimdit.models.dit import BlockConfig
from slimdit.models.inherited import inherited
from slimdit.models.surgery import put_attention
from slimdit.training.calibration import deployed_calls
from slimdit.training.regression import Answers, attention_answers, gated_error, mean_error, regress

from .test_methods import small_pipeline


@pytest.fixture
def pipeline():
    return small_pipeline()


@torch.no_grad()
def test_answers_are_what_a_block_adds_before_its_gate(pipeline):
    calls = deployed_calls(pipeline, images=2)[:3]
    answers = attention_answers(pipeline.model, calls, 1)
    assert answers.x.shape == answers.y.shape == (sum(len(call.x) for call in calls), 16, 16)
    assert answers.gate.shape == (len(answers.x), 1, 16)
    block, given = pipeline.model.blocks[1], []
    torch.testing.assert_close(block.attn(answers.x), answers.y)
    hook = block.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    for call in calls:
        pipeline.model(call.x, call.t, call.y)
    hook.remove()
    between = []
    hook = block.norm2.register_forward_pre_hook(lambda module, inputs: between.append(inputs[0]))
    for call in calls:
        pipeline.model(call.x, call.t, call.y)
    hook.remove()
    torch.testing.assert_close(torch.cat(between), torch.cat(given) + answers.gate * answers.y)


@torch.no_grad()
def test_the_error_is_relative_and_weighed_by_the_gate():
    x, y, gate = torch.randn(70, 3, 4), torch.randn(70, 3, 4), torch.rand(70, 1, 4)
    answers = Answers(x, y, gate)
    assert gated_error(torch.nn.Identity(), Answers(y, y, gate)) == 0
    silent = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(silent.weight)
    torch.nn.init.zeros_(silent.bias)
    assert gated_error(silent, answers).item() == pytest.approx(1) and mean_error(silent, answers) == pytest.approx(1)
    closed = Answers(x, y, gate.clone())
    closed.gate[..., 1:] = 0  # the other channels are not heard
    expected = (gate * (x - y))[..., 0].square().sum() / (gate * y)[..., 0].square().sum()
    assert gated_error(torch.nn.Identity(), closed).item() == pytest.approx(expected.item(), rel=1e-5)
    assert mean_error(torch.nn.Identity(), closed) == pytest.approx(expected.item(), rel=1e-5)  # in three parts
    assert mean_error(silent, Answers(x, y, torch.zeros_like(gate))) == 0


@pytest.mark.parametrize("options", [{"attention": "focused", "conv": 3}, {"kv_heads": 1},
                                     {"attention": "mediated", "mediators": (2, 2)}], ids=str)
def test_regression_comes_nearer_on_images_it_has_not_seen_and_repeats_to_the_bit(pipeline, options):
    model = pipeline.model
    answers, unseen = (attention_answers(model, deployed_calls(pipeline, images=4, seed=seed), 0) for seed in (0, 1))
    begun = inherited(model.blocks[0].attn, BlockConfig(2, 8, 64, **options), model.config.grid)
    first, second = copy.deepcopy(begun), copy.deepcopy(begun)
    for attention in (first, second):
        regress(attention, answers, steps=40)
    assert mean_error(first, unseen) < 0.8 * mean_error(begun, unseen)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    put_attention(model, 0, BlockConfig(2, 8, 64, **options), first)


def test_no_step_changes_nothing_and_pruned_weights_stay_zero(pipeline):
    answers = attention_answers(pipeline.model, deployed_calls(pipeline, images=2), 0)
    attention = inherited(pipeline.model.blocks[0].attn, BlockConfig(2, 8, 64, "focused"), (4, 4))
    with torch.no_grad():
        attention.qkv.weight[:, ::2] = 0
    before = copy.deepcopy(attention.state_dict())
    regress(attention, answers, steps=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in attention.state_dict().items())
    regress(attention, answers, steps=3)
    assert (attention.qkv.weight[:, ::2] == 0).all() and not torch.equal(attention.qkv.weight, before["qkv.weight"])
