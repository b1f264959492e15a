"""What a mixture of experts promises: it is its naive definition, in fixed shapes, at the cost that the config says."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from slimdit.metrics.cost import macs, parameters
from slimdit.models.dit import BlockConfig, DiT, DiTConfig, twin, uniform
from slimdit.models.experts import Experts, TokenExperts, by_experts, by_tokens, feed_forward, timestep_bin
from slimdit.models.experts_config import ExpertsConfig
from slimdit.models.feedforward import MLP
from slimdit.models.surgery import pack_linears, packable_linears, put_experts
from slimdit.recipe import config_mismatch

WIDE = uniform(depth=2, width=16, heads=2, patch=2, input_size=(8, 4), channels=1, classes=3)  # 8 tokens, 4 x 2
KINDS = [ExpertsConfig(4, 16, "expert_choice", 2), ExpertsConfig(4, 16, "token_choice"),
         ExpertsConfig(4, 16, "timestep", 2, bins=3), ExpertsConfig(2, router="token_choice", capacity=0.5)]


def asked(tokens=8):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, tokens, 16, generator=generator)
    return x, torch.tensor([5.0, 500.0, 999.0]), torch.tensor([False, True, False])


def layer_of(config, mlp_width=64) -> Experts:
    torch.manual_seed(0)
    layer = feed_forward(16, mlp_width, config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def with_experts(config, shape=WIDE) -> DiTConfig:
    return replace(shape, blocks=(replace(shape.blocks[0], experts=config), *shape.blocks[1:]))


def random_model(config):
    torch.manual_seed(0)
    model = DiT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def answer(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(2, 1, 8, 4, generator=generator), torch.tensor([3, 900]), torch.tensor([0, 3]))


# Who takes what


def naive_by_tokens(scores, slots):
    """The same rule for one image, token by token: who an expert takes, expert after expert."""
    tokens, experts = scores.shape
    free, taken = set(range(tokens)), []
    for expert in range(experts):
        rivals = [max(scores[token, later].item() for later in range(expert + 1, experts))
                  if expert + 1 < experts else scores[:, expert].min().item() for token in range(tokens)]
        margin = {token: scores[token, expert].item() - rivals[token] for token in free}
        order = sorted(free, key=lambda token: -margin[token])
        must = len(free) - slots * (experts - 1 - expert)
        chosen = [token for rank, token in enumerate(order[:slots]) if margin[token] >= 0 or rank < must]
        taken.append(set(chosen))
        free -= set(chosen)
    return taken


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_tokens_are_seated_by_the_rule_and_only_too_few_seats_leave_one_out(tokens, experts, slots, seed):
    slots = min(slots, tokens)
    scores = torch.randn(2, tokens, experts, generator=torch.Generator().manual_seed(seed)).double()
    index, filled = by_tokens(scores, slots)
    assert index.shape == filled.shape == (2, experts, slots)
    for image in range(2):
        taken = [set(row[seat].tolist()) for row, seat in zip(index[image], filled[image])]
        assert taken == naive_by_tokens(scores[image], slots)
        seated = [token for some in taken for token in some]
        assert len(seated) == len(set(seated)) == min(tokens, experts * slots)  # nobody twice


def test_where_there_is_room_everyone_gets_the_first_choice():
    scores = torch.randn(3, 8, 4)
    index, filled = by_tokens(scores, 8)
    for image in range(3):
        for expert in range(4):
            first = (scores[image].argmax(1) == expert).nonzero()[:, 0].tolist()
            assert sorted(index[image, expert][filled[image, expert]].tolist()) == first


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_experts_take_the_tokens_they_score_highest(tokens, experts, slots, seed):
    slots = min(slots, tokens)
    scores = torch.randn(2, tokens, experts, generator=torch.Generator().manual_seed(seed))
    index, filled = by_experts(scores, slots)
    assert index.shape == (2, experts, slots) and filled.all()
    for image in range(2):
        for expert in range(experts):
            best = sorted(range(tokens), key=lambda token: -scores[image, token, expert].item())[:slots]
            assert sorted(index[image, expert].tolist()) == sorted(best)


# Layers


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.router)
def test_the_layer_is_the_sum_of_the_experts_each_token_uses(config):
    layer, (x, t, unlabelled) = layer_of(config), asked()
    used = layer.uses(x, t, unlabelled)
    assert used.shape == (3, 8, config.count) and used.dtype == torch.bool

    def expert(number, token):
        if isinstance(layer, TokenExperts):
            return layer.experts[number](token)
        stack = layer.experts
        hidden = torch.nn.functional.gelu(stack.fc1[number] @ token + stack.fc1_bias[number], approximate="tanh")
        return hidden @ stack.fc2[number] + stack.fc2_bias[number]

    with torch.no_grad():
        expected = torch.zeros_like(x)
        for image in range(3):
            for place in range(8):
                token = x[image, place]
                expected[image, place] = sum(expert(number, token) for number in used[image, place].nonzero()[:, 0])
                if layer.shared is not None:
                    expected[image, place] += layer.shared(token)
        torch.testing.assert_close(layer(x, t, unlabelled), expected, rtol=1e-4, atol=1e-5)
    if config.router == "expert_choice":
        assert (used.sum(1) == config.slots(8)).all()
    elif config.router == "timestep":
        assert (used.sum(2) == config.active).all()
    else:
        assert (used.sum(2) <= 1).all() and used.sum() == 3 * min(8, config.count * config.slots(8))


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.router)
def test_an_image_is_answered_alike_in_any_batch_and_any_order_of_tokens(config):
    layer, (x, t, unlabelled) = layer_of(config), asked()
    shuffled = torch.randperm(8)
    with torch.no_grad():
        together = layer(x, t, unlabelled)
        for image in range(3):
            alone = layer(x[image:image + 1], t[image:image + 1], unlabelled[image:image + 1])
            torch.testing.assert_close(alone[0], together[image], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x[:, shuffled], t, unlabelled), together[:, shuffled], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.router)
def test_unlabelled_images_are_routed_by_weights_of_their_own(config):
    layer, (x, t, unlabelled) = layer_of(config), asked()
    before = layer.uses(x, t, unlabelled)
    with torch.no_grad():
        if isinstance(layer, TokenExperts):
            layer.router.weight[1] *= -1
            layer.router.bias[1] *= -1
        else:
            layer.table[1] = (layer.table[1] + 1) % config.count
    after = layer.uses(x, t, unlabelled)
    assert torch.equal(after[~unlabelled], before[~unlabelled])
    assert not torch.equal(after[unlabelled], before[unlabelled])


def test_an_experts_answer_counts_in_full_and_the_router_learns_from_it():
    layer, (x, t, unlabelled) = layer_of(KINDS[0]), asked()
    _, gate = layer.route(1e4 * x, unlabelled)  # scores of any size
    assert torch.equal(gate, torch.ones_like(gate))
    layer(x, t, unlabelled).square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0 and layer.router.bias.grad is None


def test_bias_shifts_who_is_chosen_and_nothing_else():
    layer, (x, t, unlabelled) = layer_of(ExpertsConfig(4, 16, "token_choice", capacity=4.0)), asked()
    with torch.no_grad():
        layer.router.bias[:, 2] = 1e3
    assert layer.uses(x, t, unlabelled)[..., 2].all()
    assert (layer.route(x, unlabelled)[1][:, 2] == 1).all()


@pytest.mark.parametrize("bins, t, expected", [(4, [0, 249, 249.9, 250, 999], [0, 0, 0, 1, 3]), (1, [0, 999], [0, 0]),
                                               (3, [333, 334, 999.9, 1000], [0, 1, 2, 2])])
def test_bins_are_equal_parts_of_the_timesteps(bins, t, expected):
    assert timestep_bin(torch.tensor(t), bins).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.router)
def test_compiles_whole_and_answers_alike(config):
    layer, (x, t, unlabelled) = layer_of(config), asked()
    with torch.no_grad():
        compiled = torch.compile(layer, dynamic=False, fullgraph=True)
        torch.testing.assert_close(compiled(x, t, unlabelled), layer(x, t, unlabelled), rtol=1e-4, atol=1e-5)


# What they cost


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.router)
def test_macs_are_what_pytorch_counts_and_parameters_the_models(config):
    whole = with_experts(config)
    with torch.device("meta"):
        model = DiT(whole)
        x = torch.empty(2, whole.channels, *whole.input_size)
        with FlopCounterMode(display=False) as counter:
            model(x, torch.empty(2), torch.zeros(2, dtype=torch.int64))
    assert counter.get_total_flops() == 2 * macs(whole).flops
    assert parameters(whole) == sum(p.numel() for p in model.parameters()) + whole.tokens * whole.width


@pytest.mark.parametrize("capacity, slots", [(0.5, 2), (1.0, 4), (2.0, 8), (9.0, 8)])
def test_macs_by_hand(capacity, slots):
    config = ExpertsConfig(4, 16, "expert_choice", 2, capacity)
    assert config.slots(8) == slots and config.units(64) == 12
    counted = macs(with_experts(config))
    assert counted.routing == 8 * 16 * 4
    assert counted.mlp == 2 * 16 * (8 * 16 + 4 * slots * 12) + 2 * 16 * 8 * 64
    steady = with_experts(ExpertsConfig(4, 16, "timestep", 3, bins=2))
    assert macs(steady).routing == 0 and macs(steady).mlp == 2 * 16 * 8 * (16 + 3 * 12) + 2 * 16 * 8 * 64


# In a model


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.router)
def test_a_models_config_describes_its_experts(config):
    whole = with_experts(config)
    assert DiTConfig.from_dict(whole.to_dict()) == whole
    small = twin(replace(whole, width=64, blocks=tuple(replace(block, head_dim=32) for block in whole.blocks)))
    assert small.blocks[0].experts.count == config.count and bool(small.blocks[0].experts.shared) == bool(config.shared)
    assert config_mismatch(DiT(small)) == ""
    old = whole.to_dict()
    assert DiT(DiTConfig.from_dict(json.loads(json.dumps(old)))).config == whole
    for block in old["blocks"]:
        del block["experts"]
    assert DiTConfig.from_dict(old).blocks[0].experts is None


@pytest.mark.parametrize("config", [ExpertsConfig(4, 16, active=4), ExpertsConfig(4, 16, "expert_choice", 2, 2.0),
                                    ExpertsConfig(4, 16, "timestep", 4)], ids=lambda config: config.router)
@pytest.mark.parametrize("compensated", [False, True])
def test_a_partition_with_all_experts_on_is_the_dense_model(config, compensated):
    model = random_model(WIDE)
    before, order = answer(model), torch.randperm(64).tolist()
    groups = [sorted(order[16 + 12 * number:28 + 12 * number]) for number in range(4)]
    put_experts(model, 1, config, sorted(order[:16]), groups, torch.randn(4, 16) if compensated else None)
    torch.testing.assert_close(answer(model), before, rtol=1e-5, atol=1e-5)
    assert config_mismatch(model) == "" and model.config.blocks[1] == replace(WIDE.blocks[1], experts=config)


@pytest.mark.parametrize("config", [ExpertsConfig(4, 0, "token_choice"), ExpertsConfig(4, 16, "timestep", bins=4),
                                    ExpertsConfig(2, 16, "token_choice", capacity=2.0)])
def test_copies_each_used_once_are_the_dense_model(config):
    model = random_model(WIDE)
    before, routed = answer(model), list(range(config.shared, 64))
    put_experts(model, 0, config, list(range(config.shared)), [routed] * config.count)
    torch.testing.assert_close(answer(model), before, rtol=1e-5, atol=1e-5)
    assert model.config.blocks[0].mlp_width == config.shared + config.count * len(routed)
    assert config_mismatch(model) == ""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert len(own) == len(list(model.parameters()))  # copies that can learn apart


def test_an_absent_experts_stand_in_is_given_to_who_does_not_use_it():
    model, config = random_model(WIDE), ExpertsConfig(2, 32, "timestep", 1)
    mlp, absent = model.blocks[0].mlp, torch.randn(2, 16)
    x = torch.randn(1, 8, 16)
    with torch.no_grad():
        kept = mlp.fc1(x)
        kept[..., 48:] = -1e4  # what expert 1 would be
        expected = mlp.fc2(torch.nn.functional.gelu(kept, approximate="tanh")) + absent[1]
        put_experts(model, 0, config, list(range(32)), [list(range(32, 48)), list(range(48, 64))], absent)
        answered = model.blocks[0].mlp(x, torch.tensor([5]), torch.tensor([False]))  # expert 0, by the first table
    torch.testing.assert_close(answered, expected, rtol=1e-4, atol=1e-4)


def test_experts_of_tokens_can_be_packed_and_those_of_timesteps_are_no_linear_layers():
    model = random_model(with_experts(KINDS[0]))
    names = [name for name in packable_linears(model) if name.startswith("blocks.0.mlp.")]
    assert len(names) == 2 * 5 and "blocks.0.mlp.experts.3.fc2" in names
    before = answer(model)
    pack_linears(model, dict.fromkeys(names, "int8_weight_only"))
    assert 0 < (answer(model) - before).abs().max() < 0.1 * before.abs().max() and config_mismatch(model) == ""
    steady = packable_linears(random_model(with_experts(KINDS[2])))
    assert [name for name in steady if ".0.mlp." in name] == ["blocks.0.mlp.shared.fc1", "blocks.0.mlp.shared.fc2"]


@pytest.mark.parametrize("options, sentence", [
    ({"count": 1}, "count must be a whole number from 2 on up to 256, not 1"), ({"count": 2.0}, "count"),
    ({"shared": -1}, "shared must be a whole number from 0 on, not -1"), ({"active": 5}, "active .* up to 4, not 5"),
    ({"active": 0}, "active"), ({"capacity": 0}, "capacity must be a number above 0"),
    ({"capacity": float("inf")}, "capacity"),
    ({"router": "random"}, "router 'random' is unknown; use one of expert_choice"),
    ({"router": "token_choice", "active": 2}, "every token uses one expert, not 2"),
    ({"router": "timestep", "capacity": 0.5}, "leave capacity at 1"),
    ({"balance": "luck"}, "balance 'luck' is unknown; use one of none, bias, loss"),
    ({"balance": "bias"}, "only token_choice has first choices to balance, not expert_choice"),
    ({"bins": 2}, "only the timestep router has bins"),
    ({"router": "timestep", "bins": 0}, "bins must be a whole number from 1 on up to 1000")])
def test_bad_experts_are_refused_with_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=f"experts: .*{sentence}|experts: {sentence}"):
        ExpertsConfig(**{"count": 4, **options})


@pytest.mark.parametrize("mlp_width, shared", [(64, 2), (64, 62), (3, 0), (8, 8)])
def test_units_that_cannot_be_shared_out_are_refused(mlp_width, shared):
    with pytest.raises(ValueError, match="cannot be shared out equally among 4 experts"):
        BlockConfig(2, 8, mlp_width, experts=ExpertsConfig(4, shared))


def test_surgery_refuses_what_does_not_fit():
    model, config = random_model(WIDE), ExpertsConfig(2, 32)
    halves = [list(range(32, 48)), list(range(48, 64))]
    with pytest.raises(ValueError, match="block 0: 31 shared units and experts of"):
        put_experts(model, 0, config, list(range(31)), halves)
    with pytest.raises(ValueError, match="needs shared units to give it"):
        put_experts(model, 0, ExpertsConfig(2), [], [list(range(32)), list(range(32, 64))], torch.zeros(2, 16))
    put_experts(model, 0, config, list(range(32)), halves)
    assert type(model.blocks[1].mlp) is MLP
    with pytest.raises(ValueError, match="only an MLP can become experts, and this is TokenExperts"):
        put_experts(model, 0, config, list(range(32)), halves)
    pack_linears(model, {"blocks.1.mlp.fc1": "int8_weight_only"})
    with pytest.raises(ValueError, match="1 layers are packed integers"):
        put_experts(model, 1, config, list(range(32)), halves)
