"""adaLN computed ahead: the numbers of the plain path, each layer called once a schedule, no more held than allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimdit.models.dit import DiT, DiTConfig, uniform
from slimdit.models.experts_config import ExpertsConfig
from slimdit.models.modulation import Modulations
from slimdit.pipeline import Pipeline
from slimdit.sampling.seeds import ImageNoise, image_labels
from slimdit.sampling.settings import SOLVERS
from slimdit.sampling.solvers import Sampling, solve, timesteps

CONFIG = uniform(depth=2, width=16, heads=2, patch=2, input_size=(4, 8), channels=3, classes=5)


def model_of(config: DiTConfig = CONFIG) -> DiT:
    torch.manual_seed(0)
    model = DiT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def by_timestep() -> DiTConfig:
    experts = ExpertsConfig(count=4, active=1, router="timestep", shared=16)
    return replace(CONFIG, blocks=tuple(replace(block, experts=experts) for block in CONFIG.blocks))


@contextmanager
def calls_of_adaln(model: DiT) -> Iterator[list[int]]:
    """The rows of every product of an adaLN layer, while inside."""
    rows: list[int] = []
    layers = [branch.adaLN_modulation for branch in (*model.blocks, model.final_layer)]
    hooks = [layer.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))  # type: ignore[operator,union-attr]
             for layer in layers]
    yield rows
    for hook in hooks:
        hook.remove()


def latents(pipeline: Pipeline, ahead: int | None) -> Tensor:
    """Of three images: step by step, or with so many bytes of modulations computed ahead."""
    config, process, sampling = pipeline.model.config, pipeline.process, pipeline.sampling
    labels = image_labels(0, range(3), config.classes)
    table = None if ahead is None else Modulations(
        pipeline.model, timesteps(process, sampling), torch.cat([labels, torch.tensor([config.classes])]), ahead)
    return solve(lambda x, t, y: pipeline.denoise(x, t, y, None if table is None else table(y)), process, sampling,
                 ImageNoise(0, range(3), (3, 4, 8)), labels, null_class=config.classes, learn_sigma=config.learn_sigma,
                 device=pipeline.device, progress=None if table is None else table.seek)


@pytest.mark.parametrize("bytes_ahead", [1, 4000, 2**20])
@pytest.mark.parametrize("config", [CONFIG, by_timestep()], ids=["dense", "experts"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_latents_are_those_of_the_plain_path(solver: str, config: DiTConfig, bytes_ahead: int) -> None:
    pipeline = Pipeline(model_of(config), Sampling(solver, 7, guidance=2.0, guidance_interval=(300, 1000)))
    plain, ahead = latents(pipeline, None), latents(pipeline, bytes_ahead)
    assert plain.std() > 0.1
    # Products of other numbers of rows round otherwise, and every step builds on the last: relative to all latents.
    assert (ahead - plain).norm() <= 1e-6 * plain.norm()


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=7), st.integers(0, 4), st.sampled_from([1, 3000, 2**20]))
def test_a_row_is_what_the_model_says_of_its_timestep_and_label(labels: list[int], step: int, limit: int) -> None:
    model, visited, y = model_of(), [999, 700, 444, 3, 0], torch.tensor(labels)
    with torch.no_grad():
        ahead = Modulations(model, visited, y, limit)
        for done in range(1, step + 1):
            ahead.seek(done)
        expected = model.modulations(torch.full_like(y, visited[step]), y)
        torch.testing.assert_close(ahead(y), expected, atol=1e-6, rtol=1e-6)


def test_a_sampling_run_calls_each_adaln_layer_once() -> None:
    pipeline = Pipeline(model_of(), Sampling(steps=6, guidance=2.0))
    with calls_of_adaln(pipeline.model) as rows:
        pipeline.sample(range(4), labels=[1, 3, 3, 1])
    assert rows == [6 * 3] * 3  # steps times two labels and the null class, for two blocks and the final layer


def test_no_more_is_held_than_allowed() -> None:
    model = model_of()
    step = 2 * sum(model.modulation_sizes) * 4  # bytes of one step of two labels
    with calls_of_adaln(model) as rows, torch.no_grad():
        ahead = Modulations(model, range(7, 0, -1), torch.tensor([0, 1]), limit=3 * step)
        for done in range(1, 8):
            assert ahead.rows.nbytes <= 3 * step
            ahead.seek(done)
    assert rows == [6] * 6 + [2] * 3  # three steps, three, and the one that is left
