"""The routing report: its numbers are their definitions, and its counts those of the tokens."""

import math
from dataclasses import replace

import pytest
import torch

from slimdit.models.dit import DiT, uniform
from slimdit.models.experts_config import ExpertsConfig
from slimdit.training.calibration import Call
from slimdit.training.routing import Load, loads


def load(*rows, dropped=0, passed_on=0, tokens=100):
    return Load(torch.tensor(rows, dtype=torch.float64), dropped, passed_on, tokens).summary()


def test_equal_loads():
    told = load([5, 5, 5, 5], [0, 0, 0, 0])
    assert told["load"] == [[0.25] * 4, [0.0] * 4]
    assert (told["max_violation"], told["gini"], told["dropped"]) == (0, 0, 0)
    assert told["entropy"] == pytest.approx(math.log(4), abs=1e-4) and told["effective_experts"] == pytest.approx(4)


def test_one_expert_for_all():
    told = load([0, 8, 0, 0], dropped=25, passed_on=10)
    assert told["passed_on"] == 0.1
    assert (told["max_violation"], told["gini"], told["dropped"]) == (3, 0.75, 0.25)
    assert told["entropy"] == 0 and told["effective_experts"] == 1


def test_uneven_loads_by_hand():
    told = load([6, 0], [0, 2])  # each bin has its own expert, in all 3 to 1
    assert told["load"] == [[1, 0], [0, 1]] and told["max_violation"] == 0.5
    assert told["gini"] == pytest.approx(abs(0.75 - 0.25) * 2 / (2 * 2))
    assert told["entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-4)


def test_a_layer_that_nothing_uses():
    assert load([0, 0], tokens=0)["dropped"] == 0


def test_counts_are_of_deployed_tokens_by_timestep():
    config = uniform(depth=2, width=16, heads=2, patch=2, input_size=(8, 4), channels=1, classes=3)
    timed = replace(config.blocks[0], experts=ExpertsConfig(4, 16, "timestep", 1, bins=4))
    chosen = replace(config.blocks[1], experts=ExpertsConfig(4, 16, "token_choice", capacity=0.5))
    model = DiT(replace(config, blocks=(timed, chosen))).eval()
    calls = [Call(torch.randn(3, 1, 8, 4), torch.full((3,), t), torch.tensor([0, 1, 3])) for t in (10, 260, 990)]
    found = loads(model, calls)
    assert list(found) == [0, 1] and found[0].tokens == 9 * 8 == found[1].tokens
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[[0, 1, 3], [0, 1, 3]] = 24  # the first table: expert b at bin b, for both kinds of images
    assert torch.equal(found[0].by_bin, expected) and found[0].dropped == 0
    assert found[1].by_bin.sum(1).tolist() == [12, 12, 0, 12] and found[1].dropped == 36
    assert loads(DiT(config), calls) == {}


def test_tokens_passed_on_are_those_whose_first_choice_was_full():
    config = uniform(depth=1, width=16, heads=2, patch=2, input_size=(8, 4), channels=1, classes=3)
    chosen = replace(config.blocks[0], experts=ExpertsConfig(4, 16, "token_choice"))
    model = DiT(replace(config, blocks=(chosen,))).eval()
    with torch.no_grad():
        model.blocks[0].mlp.router.bias[0, 2] = 1e3  # every labelled token wants expert 2, which has room for 2 of 8
    calls = [Call(torch.randn(3, 1, 8, 4), torch.full((3,), 10), torch.tensor([0, 1, 2]))]
    found = loads(model, calls)[0]
    assert (found.passed_on, found.dropped, found.tokens) == (18, 0, 24)
    assert found.summary()["max_violation"] == 0
