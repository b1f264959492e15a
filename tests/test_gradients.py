"""The diffusion loss at the deployed timesteps: its batches, its gradients, and blocks turned down in it."""

import pytest
import torch

from slimdit.models.dit import DiT, uniform
from slimdit.models.surgery import keep_blocks
from slimdit.pipeline import Pipeline
from slimdit.sampling.solvers import Sampling, timesteps
from slimdit.training.calibration import deployed_calls
from slimdit.training.gradients import gated, loss_batches, loss_gradients, noise_loss

CONFIG = uniform(depth=2, width=16, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3)


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    model = DiT(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(model, Sampling(steps=6, guidance=1.5, guidance_interval=(0, 600)))


def test_loss_batches_are_of_deployed_timesteps_spread_over_each_images_draws(pipeline):
    batches = loss_batches(pipeline, images=3, batch=2, draws=3, seed=1)
    visited = timesteps(pipeline.process, pipeline.sampling)
    assert [len(batch.clean) for batch in batches] == [2, 2, 2, 1, 1, 1]
    for draw, batch in enumerate(batches[:3]):
        assert set(batch.t.tolist()) <= set(visited[2 * draw:2 * draw + 2])  # 6 timesteps, 3 draws
    again = loss_batches(pipeline, images=3, batch=2, draws=3, seed=1)
    assert all(torch.equal(one.clean, other.clean) and torch.equal(one.noise, other.noise)
               for one, other in zip(batches, again))
    assert not torch.equal(batches[0].clean, loss_batches(pipeline, images=3, batch=2, draws=3, seed=2)[0].clean)


def test_gates_of_one_are_the_model_and_of_zero_leave_the_block_out(pipeline):
    (call, *_), model = deployed_calls(pipeline, images=2, batch=2), pipeline.model
    with gated(model, torch.ones(2)):
        torch.testing.assert_close(model(call.x, call.t, call.y), pipeline.model(call.x, call.t, call.y))
    with gated(model, torch.tensor([1.0, 0.0])):
        without = model(call.x, call.t, call.y)
    keep_blocks(model, [0])
    torch.testing.assert_close(without, model(call.x, call.t, call.y))


def test_gradients_are_the_losss_slope_and_leave_the_model_as_it_was(pipeline):
    weight = pipeline.model.get_parameter("blocks.0.mlp.fc2.weight")
    (batch, *_), before = loss_batches(pipeline, images=2, draws=2), weight.detach().clone()
    (gradient,), = loss_gradients(pipeline.model, pipeline.process, [batch], [weight])
    assert weight.grad is None and torch.equal(weight, before)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight.copy_(before + sign * step)
            ends.append(noise_loss(pipeline.model, pipeline.process, batch).item())
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(gradient.norm().item(), rel=0.02)
