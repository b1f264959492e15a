"""What calibration sees: the deployed trajectory, both guidance halves, and images that nobody evaluates."""

import pytest
import torch

from slimdit.models.dit import DiT, uniform
from slimdit.pipeline import Pipeline
from slimdit.sampling.solvers import Sampling, timesteps
from slimdit.training.calibration import (
    absolute_maxima,
    conditions,
    deployed_calls,
    described,
    fitted_grid,
    gate_sizes,
    hessians,
    input_grids,
    layer_inputs,
    output_error,
    outputs,
)

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


def test_maxima_and_hessians_are_those_of_the_inputs(pipeline):
    name, seen = "blocks.1.attn.qkv", []
    calls = deployed_calls(pipeline, images=2, batch=2)
    layer_inputs(pipeline.model, calls, [name], lambda _, x: seen.append(x))
    largest = absolute_maxima(pipeline.model, calls, [name])[name]
    assert largest.shape == (4, 16)
    for bin in range(4):
        inputs = [x for x, call in zip(seen, calls, strict=True) if 250 * bin <= call.t[0] < 250 * (bin + 1)]
        assert torch.equal(largest[bin], torch.cat([x.abs().flatten(0, 1) for x in inputs]).amax(0))
    rows = torch.cat([x.flatten(0, 1) for x in seen]).double()
    torch.testing.assert_close(hessians(pipeline.model, calls, [name])[name], rows.t() @ rows, rtol=1e-5, atol=1e-4)
    told = described(pipeline, calls, {name: largest}, seed=0)
    assert told["calls"] == 6 and told["largest_inputs"][name] == pytest.approx(largest.amax(1).tolist(), rel=0.01)


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


def test_gate_sizes_are_the_means_that_adaln_gives(pipeline):
    with torch.no_grad():
        for block, size in zip(pipeline.model.blocks, (0.5, 2.0)):
            layer = block.adaLN_modulation[1]
            layer.weight.zero_()
            layer.bias[2 * 16:3 * 16], layer.bias[5 * 16:] = size, -3 * size
    assert gate_sizes(pipeline) == [{"attn": pytest.approx(0.5), "mlp": pytest.approx(1.5)},
                                    {"attn": pytest.approx(2.0), "mlp": pytest.approx(6.0)}]


def test_conditions_are_weighted_to_one_at_every_timestep(pipeline):
    found = list(conditions(pipeline))
    assert len(found) == 6
    for t, (condition, weights) in zip(timesteps(pipeline.process, pipeline.sampling), found):
        assert condition.shape == (4, 16) and weights.sum() == pytest.approx(1)
        assert weights[-1] == pytest.approx(0.5 if t <= 600 else 0.25)


def grid_error(x, step, zero):
    return (torch.fake_quantize_per_tensor_affine(x, step, zero, 0, 255) - x).square().mean().item()


def test_a_grid_is_no_worse_than_the_whole_range_and_knows_zero():
    torch.manual_seed(0)
    for x in (torch.randn(5000), torch.nn.functional.gelu(torch.randn(5000)), torch.rand(5000) + 3,
              torch.cat([torch.randn(2**19), torch.tensor([60.0])])):
        step, zero = fitted_grid(x)
        low, high = min(x.min().item(), 0), max(x.max().item(), 0)
        whole = (high - low) / 255
        assert grid_error(x, step, zero) <= grid_error(x, whole, round(-low / whole)) and 0 <= zero <= 255
    assert 10 < step * 255 < 40  # of 64: a lone outlier is cut off
    assert fitted_grid(torch.zeros(5)) == (1.0, 0)
    step, zero = fitted_grid(torch.rand(5000) + 3)
    assert zero == 0  # what is never below zero needs no levels there


def test_grids_are_of_all_calls_and_the_same_again(pipeline):
    calls = deployed_calls(pipeline, images=4, batch=2)
    names = ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"]
    grids = input_grids(pipeline.model, calls, names)
    assert grids == input_grids(pipeline.model, calls, names) and list(grids) == names
    assert grids["blocks.1.mlp.fc2"][1] < 128  # a GELU is hardly below zero
    seen = []
    layer_inputs(pipeline.model, calls, names[1:], lambda name, x: seen.append(x.flatten()))
    assert grid_error(torch.cat(seen), *grids[names[1]]) < 1e-4 * torch.cat(seen).square().mean()
