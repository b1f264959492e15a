"""What calibration sees: the deployed trajectory, both guidance halves, and images that nobody evaluates."""

import pytest
import torch

from slimdit.models.dit import DiT, uniform
from slimdit.pipeline import Pipeline
from slimdit.sampling.solvers import Sampling, timesteps
from slimdit.training.calibration import deployed_calls, layer_inputs, output_error, outputs

CONFIG = uniform(depth=2, width=16, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3)


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    model = DiT(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(model, Sampling(steps=6, guidance=1.5, guidance_interval=(0, 600)))


def test_every_deployed_timestep_is_seen_with_its_guidance_halves(pipeline):
    calls = deployed_calls(pipeline, images=6, batch=2)
    assert sorted({int(call.t[0]) for call in calls}, reverse=True) == timesteps(pipeline.process, pipeline.sampling)
    for call in calls:
        assert not call.x.requires_grad
        guided = call.t[0] <= 600
        assert len(call.x) == (4 if guided else 2)
        assert (call.y == CONFIG.classes).sum() == (2 if guided else 0)


def test_batches_share_the_timesteps_out(pipeline):
    assert len(deployed_calls(pipeline, images=6, batch=2)) == 6
    assert len(deployed_calls(pipeline, images=2, batch=2)) == 6


def test_another_seed_is_other_noise_and_the_same_seed_the_same(pipeline):
    one, again, other = (deployed_calls(pipeline, images=2, seed=seed)[0].x for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_layer_inputs_are_those_of_the_named_layers(pipeline):
    seen = {}
    calls = deployed_calls(pipeline, images=2, batch=2)
    layer_inputs(pipeline.model, calls, ["blocks.1.mlp.fc2"], lambda name, x: seen.setdefault(name, []).append(x))
    assert list(seen) == ["blocks.1.mlp.fc2"] and len(seen["blocks.1.mlp.fc2"]) == len(calls)
    assert seen["blocks.1.mlp.fc2"][0].shape == (2, 16, 64)
    assert not pipeline.model.blocks[1].mlp.fc2._forward_pre_hooks


def test_output_error_is_relative_and_zero_for_the_model_itself(pipeline):
    calls = deployed_calls(pipeline, images=2, batch=2)
    expected = outputs(pipeline.model, calls)
    assert output_error(pipeline.model, calls, expected) == 0
    with torch.no_grad():
        pipeline.model.final_layer.linear.weight.mul_(2)
        pipeline.model.final_layer.linear.bias.mul_(2)
    assert output_error(pipeline.model, calls, expected) == pytest.approx(1)


def test_counts_below_one_are_refused(pipeline):
    with pytest.raises(ValueError, match="at least 1, not 0 and 8"):
        deployed_calls(pipeline, images=0)
