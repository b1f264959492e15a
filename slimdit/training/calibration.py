"""What a deployed model sees: the calls of its own sampling runs, spread over all timesteps, both guidance halves.

Statistics gathered on other inputs than the deployed ones miss their ranges (Q-Diffusion, arXiv 2302.04304; Q-DiT,
arXiv 2406.17343): a method calibrates on the solver, steps and guidance that the recipe has chosen by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, product
from typing import Any

import torch
from torch import Tensor, nn

from ..models.dit import DiT
from ..pipeline import Pipeline, Runtime
from ..sampling.caching import Evaluator
from ..sampling.process import Denoise
from ..sampling.seeds import ImageNoise, image_labels
from ..sampling.solvers import is_guided, solve, timesteps

FIRST_ID = 1 << 30  # images that nobody evaluates: nothing is tuned on what is reported


@dataclass(frozen=True)
class Call:
    """One call of the model while sampling: inputs of both guidance halves where the timestep is guided."""

    x: Tensor  # (batch, channels, height, width)
    t: Tensor  # (batch,)
    y: Tensor  # (batch,)


@torch.no_grad()  # or every kept input would hold on to the run before it
def deployed_calls(pipeline: Pipeline, *, images: int = 32, batch: int = 8, seed: int = 0) -> list[Call]:
    """Whole calls of the pipeline's own sampling runs in float32, every timestep it visits with them once or more.

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
        numbers, evaluator = count(), plain.evaluator()

        def denoise(x: Tensor, t: Tensor, y: Tensor, turn: int = turn, numbers: Any = numbers,
                    evaluator: Evaluator = evaluator) -> Tensor:
            if evaluator.is_whole and next(numbers) % batches == turn:
                kept.append(Call(x.clone(), t.clone(), y.clone()))
            return evaluator(x, t, y)

        solve(denoise, plain.process, plain.sampling, ImageNoise(seed, ids, (config.channels, *config.input_size)),
              image_labels(seed, ids, config.classes), null_class=config.classes, learn_sigma=config.learn_sigma,
              device=plain.device, progress=evaluator.seek)
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


BINS = 4  # of 250 timesteps: ranges change along the trajectory


def absolute_maxima(model: DiT, calls: Sequence[Call], names: Iterable[str]) -> dict[str, Tensor]:
    """The largest magnitude of every input channel of layers, by name: (BINS, in_features), by the calls' timesteps.

    Bin 0 holds timesteps 0..249; a bin that no call visits holds zeros.
    """
    largest: dict[str, Tensor] = {}
    for call in calls:
        bin = min(int(call.t[0]) * BINS // 1000, BINS - 1)

        def visit(name: str, x: Tensor, bin: int = bin) -> None:
            seen = largest.setdefault(name, x.new_zeros(BINS, x.shape[-1]))
            seen[bin] = torch.maximum(seen[bin], x.abs().flatten(0, -2).amax(0))

        layer_inputs(model, [call], names, visit)
    return largest


SAMPLED = 2**16  # numbers of a layer's inputs that its range is chosen by
SHARES = 16  # of a range that are tried, from each end


def input_grids(model: DiT, calls: Sequence[Call], names: Iterable[str], seed: int = 0) -> dict[str, tuple[float, int]]:
    """The grid of 256 levels for all of a layer's inputs, by name: step and zero, as `fitted_grid` finds them."""
    seen: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)

    def visit(name: str, x: Tensor) -> None:
        flat = x.flatten().float().cpu()
        some = flat[torch.randint(flat.numel(), (-(-SAMPLED // len(calls)),), generator=generator)]
        seen.setdefault(name, []).append(torch.cat([some, flat.min()[None], flat.max()[None]]))

    layer_inputs(model, calls, names, visit)
    return {name: fitted_grid(torch.cat(parts)) for name, parts in seen.items()}


def fitted_grid(x: Tensor) -> tuple[float, int]:
    """The step and zero whose levels, round(x / step) + zero in 0..255, lie closest to numbers (n,) in mean square.

    The range may be smaller than that of the numbers: what lies beyond is cut off, and the rest gains by finer steps.
    """
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    if low == high:
        return 1.0, 0
    best = (float("inf"), 1.0, 0)
    for below, above in product(range(1, SHARES + 1), repeat=2):
        step = (high * above - low * below) / SHARES / 255
        zero = min(max(round(-low * below / SHARES / step), 0), 255)
        levels = torch.fake_quantize_per_tensor_affine(x, step, zero, 0, 255)
        best = min(best, ((levels - x).square().mean().item(), step, zero))
    return best[1:]


def hessians(model: DiT, calls: Sequence[Call], names: Iterable[str]) -> dict[str, Tensor]:
    """Sum of x x^T over the inputs x of layers, by name: float64, (in_features, in_features)."""
    sums: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        product = (rows.t() @ rows).double()
        sums[name] = sums[name] + product if name in sums else product

    layer_inputs(model, calls, names, visit)
    return sums


def described(pipeline: Pipeline, calls: Sequence[Call], maxima: Mapping[str, Tensor], seed: int) -> dict[str, Any]:
    """What was calibrated on, JSON-ready: the sampling, the calls, and each layer's largest input in every bin."""
    sampling = pipeline.sampling
    return {"solver": sampling.solver, "steps": sampling.steps, "guidance": sampling.guidance, "seed": seed,
            "calls": len(calls), "timesteps": sorted({round(float(call.t[0]), 3) for call in calls}, reverse=True),
            "largest_inputs": {name: [float(f"{value:.3g}") for value in bins.amax(1).tolist()]
                               for name, bins in maxima.items()}}


@torch.no_grad()
def outputs(model: Denoise, calls: Sequence[Call]) -> list[Tensor]:
    """What the model answers to each call."""
    return [model(call.x, call.t, call.y) for call in calls]


@torch.no_grad()
def output_error(model: Denoise, calls: Sequence[Call], expected: Sequence[Tensor]) -> float:
    """Relative error of a model's answers: ||answer - expected||^2 / ||expected||^2 over all calls."""
    pairs = [(model(call.x, call.t, call.y), target) for call, target in zip(calls, expected, strict=True)]
    wrong = sum((answer - target).square().sum().item() for answer, target in pairs)
    return wrong / sum(target.square().sum().item() for target in expected)


def conditions(pipeline: Pipeline, labels: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """What adaLN is given while sampling, a finite set: the visited timesteps times the labels, the null class too.

    Args:
        labels: how many of the classes to go through, evenly chosen; None is all of them.

    Yields:
        For each timestep the conditions, (rows, width), and how often each is asked for, (rows,), which sum to 1. At a
        guided timestep the null class is asked for as often as all classes together, at another it counts as one.
    """
    model, config = pipeline.model, pipeline.model.config
    count = min(labels or config.classes, config.classes)
    rows = torch.linspace(0, config.classes - 1, count).round().long()
    if config.label_dropout:
        rows = torch.cat([rows, torch.tensor([config.classes])])
    with torch.no_grad():
        table = model.y_embedder(rows.to(pipeline.device))
        for t in timesteps(pipeline.process, pipeline.sampling):
            weights = torch.ones(len(rows), device=pipeline.device)
            if config.label_dropout and is_guided(pipeline.sampling, t):
                weights[-1] = count
            yield model.t_embedder(torch.tensor([t], device=pipeline.device)) + table, weights / weights.sum()


def gate_sizes(pipeline: Pipeline, labels: int = 32) -> list[dict[str, float]]:
    """Mean |gate| of each block's branches, "attn" and "mlp", while sampling: how loudly each speaks."""
    blocks: list[Any] = [*pipeline.model.blocks]
    sums, visited = torch.zeros(len(blocks), 2, dtype=torch.float64), 0
    with torch.no_grad():
        for condition, weights in conditions(pipeline, labels):
            visited += 1
            for number, block in enumerate(blocks):
                gates = torch.stack(block.adaLN_modulation(condition).chunk(6, dim=-1)[2::3])  # (2, rows, width)
                sums[number] += (gates.abs().mean(-1) @ weights).double().cpu()
    return [{"attn": attention, "mlp": mlp} for attention, mlp in (sums / visited).tolist()]
