"""What a deployed model sees: the calls of its own sampling runs, spread over all timesteps, both guidance halves.

Statistics gathered on other inputs than the deployed ones miss their ranges (Q-Diffusion, arXiv 2302.04304; Q-DiT,
arXiv 2406.17343): a method calibrates on the solver, steps and guidance that the recipe has chosen by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..models.dit import DiT
from ..pipeline import Pipeline, Runtime
from ..sampling.seeds import ImageNoise, image_labels
from ..sampling.solvers import solve

FIRST_ID = 1 << 30  # images that nobody evaluates: nothing is tuned on what is reported


@dataclass(frozen=True)
class Call:
    """One call of the model while sampling: inputs of both guidance halves where the timestep is guided."""

    x: Tensor  # (batch, channels, height, width)
    t: Tensor  # (batch,)
    y: Tensor  # (batch,)


@torch.no_grad()  # or every kept input would hold on to the run before it
def deployed_calls(pipeline: Pipeline, *, images: int = 32, batch: int = 8, seed: int = 0) -> list[Call]:
    """Calls of the pipeline's own sampling runs in float32, every timestep it visits once or more.

    The images are made in batches, and the batches share the timesteps out between them: the first of four keeps the
    1st, 5th, 9th ... call. So the calls are few, of different images, and spread evenly over the trajectory.

    Args:
        images: images sampled; more images than `batch` spread the calls over more classes and noises.

    Raises:
        ValueError: images or batch is below 1, or the pipeline cannot sample.
    """
    if images < 1 or batch < 1:
        raise ValueError(f"calibration: images and batch must be at least 1, not {images} and {batch}")
    plain = pipeline.replace(runtime=Runtime())
    config, batches = plain.model.config, -(-images // batch)
    kept: list[Call] = []
    for turn in range(batches):
        ids = range(FIRST_ID + turn * batch, FIRST_ID + min(images, (turn + 1) * batch))
        numbers = count()

        def denoise(x: Tensor, t: Tensor, y: Tensor, turn: int = turn, numbers: Any = numbers) -> Tensor:
            if next(numbers) % batches == turn:
                kept.append(Call(x.clone(), t.clone(), y.clone()))
            return plain.denoise(x, t, y)

        solve(denoise, plain.process, plain.sampling, ImageNoise(seed, ids, (config.channels, *config.input_size)),
              image_labels(seed, ids, config.classes), null_class=config.classes, learn_sigma=config.learn_sigma,
              device=plain.device)
    return kept


Visit = Callable[[str, Tensor], None]
"""Told a layer's name and its input, (..., in_features)."""


@contextmanager
def watched(model: DiT, names: Iterable[str], visit: Visit) -> Any:
    """While inside, every call of the named modules tells `visit` its input first."""
    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for name in names:
            def told(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                visit(name, inputs[0].detach())

            hooks.callback(modules[name].register_forward_pre_hook(told).remove)
        yield


@torch.no_grad()
def layer_inputs(model: DiT, calls: Sequence[Call], names: Iterable[str], visit: Visit) -> None:
    """Run the model on calls and tell `visit` what the named modules are given, call after call."""
    with watched(model, names, visit):
        for call in calls:
            model(call.x, call.t, call.y)


@torch.no_grad()
def outputs(model: DiT, calls: Sequence[Call]) -> list[Tensor]:
    """What the model answers to each call."""
    return [model(call.x, call.t, call.y) for call in calls]


@torch.no_grad()
def output_error(model: DiT, calls: Sequence[Call], expected: Sequence[Tensor]) -> float:
    """Relative error of a model's answers: ||answer - expected||^2 / ||expected||^2 over all calls."""
    pairs = [(model(call.x, call.t, call.y), target) for call, target in zip(calls, expected, strict=True)]
    wrong = sum((answer - target).square().sum().item() for answer, target in pairs)
    return wrong / sum(target.square().sum().item() for target in expected)
