"""Which layers matter, and when: what the model's answers lose when one layer alone is perturbed.

Layers differ by orders of magnitude, and differ along the timesteps ("Q-Diffusion", arXiv 2302.04304; "Q-DiT", arXiv
2406.17343), so what is cut or rounded everywhere alike is cut too much somewhere. The error of a layer in a bin of
timesteps is

    ||eps' - eps||^2 / ||eps||^2

over calls of the pipeline's own sampling, both guidance halves in them; eps' is the noise that the perturbed model
predicts. The learned variance is left out: of all solvers only DDPM uses it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .allocation import FILE, Sensitivity, open_sensitivity
from .context import require
from .files import write_text
from .models.dit import DiT
from .models.linear import LINEARS
from .models.surgery import other_weight, packable_linears, without_block
from .pipeline import Pipeline, Runtime
from .recipe import fingerprint
from .report.charts import heat_map_svg
from .report.record import provenance
from .sampling.solvers import evaluations, timesteps
from .strict import nearest
from .training.calibration import Call, deployed_calls, outputs

if TYPE_CHECKING:
    from rich.table import Table

WEIGHT_ONLY = "_weight_only"
PRUNED = 0.25  # of a layer's weights
BATCH = 8  # images at a time
HEAT_MAP = "sensitivity.svg"

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what, total) to a progress bar."""


@dataclass(frozen=True)
class Settings:
    """How sensitivity is measured.

    Attributes:
        perturb: what happens to a layer, one of `perturbations()`.
        bins: of the visited timesteps, as many in each; no more than there are timesteps.
        images: sampled to gather the calls.
        calls: of each bin that are measured, evenly spread; each is a batch of up to 8 images, guided ones twice.
        seed: of those images.

    Raises:
        ValueError: the perturbation is unknown, or a number is below 1.
    """

    perturb: str = "int8"
    bins: int = 5
    images: int = 16
    calls: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.perturb not in perturbations():
            raise ValueError(f"sensitivity: perturbation {self.perturb!r} is unknown; "
                             f"{nearest(self.perturb, perturbations())}")
        for name in ("bins", "images", "calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"sensitivity: {name} must be at least 1, not {getattr(self, name)}")


def perturbations() -> list[str]:
    """What can happen to a layer: every weight-only rounding there is, `prune` and `drop`."""
    return [kind.removesuffix(WEIGHT_ONLY) for kind in LINEARS if kind.endswith(WEIGHT_ONLY)] + ["prune", "drop"]


def plan(pipeline: Pipeline, settings: Settings, minutes: float) -> dict[str, Any]:
    """What `measure` would do, JSON-ready."""
    names = layer_names(pipeline.model, settings.perturb)
    bins = timestep_bins(pipeline, settings.bins)
    calls = sum(min(settings.calls, len(visited)) for visited in bins)
    return {**asdict(settings), "sampling": pipeline.sampling.to_dict(), "layers": len(names),
            "bins": [label(visited[0], visited[-1]) for visited in bins],
            "model evaluations to begin with": settings.images * evaluations(pipeline.process, pipeline.sampling),
            "model calls per layer": calls, "images per call": min(BATCH, settings.images),
            "minutes at most": minutes, "bytes of memory for weights": 4 * sum(
                tensor.numel() for tensor in pipeline.model.state_dict().values()), "room on disk": "below 1 MB"}


def measure(pipeline: Pipeline, settings: Settings, folder: Path, *, source: str = "", minutes: float = 5.0,
            resume: bool = False, bar: Bar, clock: Callable[[], float] = time.monotonic) -> Sensitivity:
    """Measure layer after layer until all are done or the time is up, and write each to `folder` as it is.

    The order is bit-reversed, so that what the time allows is spread over the depth. One layer at least is measured.

    Args:
        source: what to call the model in the file.
        minutes: after which no further layer is begun.
        resume: go on with what the folder holds; the calls are gathered anew, no layer is.

    Raises:
        Refused: the perturbation needs float weights, and layers are packed.
        ValueError: the folder holds another model's or other settings' measurement, or the model's output is all
            zeros or not finite.
        FileExistsError: the folder holds a measurement and `resume` is False.
        KeyboardInterrupt: passed on; what was measured is kept, and the message says how to go on.
    """
    deadline = clock() + 60 * minutes
    path = folder / FILE
    found = begin(pipeline, settings, path, source, resume)
    if found.missing:
        plain = in_float32(pipeline)
        with bar("gathering calls", 1) as show:
            probe = Probe.of(plain, settings)
            show(1)
        with bar("layers", len(found.layers)) as show:
            show(len(found.totals))
            try:
                for name in spread(found.layers, found.missing):
                    found = with_layer(found, name, *probe.errors(plain.model, name, settings.perturb))
                    found.write(path)
                    show(len(found.totals))
                    if clock() >= deadline:
                        break
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped after {len(found.totals)} of {len(found.layers)} layers: add "
                                        f"--resume to go on from {path}") from None
    write_text(folder / HEAT_MAP, heat_map(found))
    return found


def begin(pipeline: Pipeline, settings: Settings, path: Path, source: str, resume: bool) -> Sensitivity:
    """An empty measurement, or the one to go on with."""
    bins = tuple((visited[0], visited[-1]) for visited in timestep_bins(pipeline, settings.bins))
    fresh = Sensitivity(model=source or pipeline.name, fingerprint=fingerprint(pipeline), settings=asdict(settings),
                        bins=bins, layers=tuple(layer_names(pipeline.model, settings.perturb)), errors={}, totals={},
                        provenance=provenance(seeds={"images": settings.seed}, device=str(pipeline.device),
                                              threads=torch.get_num_threads()))
    if not path.exists():
        return fresh
    if not resume:
        raise FileExistsError(f"{path.parent} holds a measurement: add --resume to go on with it, or name another "
                              "folder with --out")
    before = open_sensitivity(path)
    if before.fingerprint != fresh.fingerprint:
        raise ValueError(f"{path} is of another model or sampling ({before.model}): name another folder with --out")
    if changed := [name for name, value in fresh.settings.items() if before.settings.get(name) != value]:
        raise ValueError(f"{path} was begun with another {' and '.join(changed)}: use the same settings, or another "
                         "folder with --out")
    return before


def layer_names(model: DiT, perturb: str) -> list[str]:
    """What is perturbed, first to last: every block for `drop`, else every linear layer of a block."""
    if perturb == "drop":
        return [f"blocks.{number}" for number in range(len(model.blocks))]
    require(not model.config.linears, f"sensitivity needs float weights for {perturb!r}, and "
                                      f"{len(model.config.linears)} layers are packed: measure the float model")
    return [name for name in packable_linears(model) if name.startswith("blocks.")]


def timestep_bins(pipeline: Pipeline, bins: int) -> list[list[int]]:
    """The timesteps that sampling visits, in that order, cut into bins of as equal a number as can be."""
    visited = timesteps(pipeline.process, pipeline.sampling)
    bins = min(bins, len(visited))
    edges = [len(visited) * number // bins for number in range(bins + 1)]
    return [visited[start:stop] for start, stop in pairwise(edges)]


def in_float32(pipeline: Pipeline) -> Pipeline:
    """The pipeline with a model of its own in float32, so that no rounding but the perturbation's is measured."""
    return pipeline.replace(model=copy.deepcopy(pipeline.model).float().eval(), runtime=Runtime())


def spread(layers: Sequence[str], missing: Sequence[str]) -> list[str]:
    """The missing layers in bit-reversed order of all: the 1st, one half down, a quarter, three quarters ..."""
    bits = (len(layers) - 1).bit_length()
    order = sorted(range(len(layers)), key=lambda number: int(f"{number:0{bits}b}"[::-1] or "0", 2))
    return [layers[number] for number in order if layers[number] in set(missing)]


def with_layer(found: Sensitivity, name: str, errors: Sequence[float], total: float) -> Sensitivity:
    """The measurement with one more layer, kept in the model's order."""
    def added(values: Mapping[str, Any], value: Any) -> dict[str, Any]:
        values = {**values, name: value}
        return {layer: values[layer] for layer in found.layers if layer in values}

    return Sensitivity(**{**vars(found), "errors": added(found.errors, tuple(errors)),
                          "totals": added(found.totals, total)})


@dataclass(frozen=True)
class Probe:
    """The calls that are answered again and again, the bin of each and the right answers."""

    calls: Sequence[Call]
    bins: Sequence[int]
    expected: Sequence[Tensor]  # (batch, channels, height, width) each

    @classmethod
    def of(cls, pipeline: Pipeline, settings: Settings) -> Probe:
        """The probe of an unperturbed float32 pipeline."""
        bins = timestep_bins(pipeline, settings.bins)
        number = {t: place for place, visited in enumerate(bins) for t in visited}
        gathered = deployed_calls(pipeline, images=settings.images, batch=BATCH, seed=settings.seed)
        chosen = [(place, call) for place in range(len(bins))
                  for call in evenly([call for call in gathered if number[int(call.t[0])] == place], settings.calls)]
        calls = [call for _, call in chosen]
        expected = noise_predicted(pipeline.model, calls)
        if not all(answer.square().sum() > 0 for answer in expected):
            raise ValueError("sensitivity: the model predicts no noise at all, as before training, so that no error "
                             "can be related to it: give a trained model")
        return cls(calls, [place for place, _ in chosen], expected)

    def errors(self, model: DiT, name: str, perturb: str) -> tuple[list[float], float]:
        """The relative squared error per bin and over all, of a model whose layer `name` is perturbed."""
        with perturbed(model, name, perturb):
            answers = noise_predicted(model, self.calls)
        wrong, right = [0.0] * (max(self.bins) + 1), [0.0] * (max(self.bins) + 1)
        for place, answer, target in zip(self.bins, answers, self.expected):
            wrong[place] += (answer - target).square().sum().item()
            right[place] += target.square().sum().item()
        return [a / b for a, b in zip(wrong, right)], sum(wrong) / sum(right)


def evenly(calls: Sequence[Call], count: int) -> list[Call]:
    """At most `count` of the calls, evenly spread, each from the middle of its stretch."""
    count = min(count, len(calls))
    return [calls[(2 * number + 1) * len(calls) // (2 * count)] for number in range(count)]


def noise_predicted(model: DiT, calls: Sequence[Call]) -> list[Tensor]:
    """What the model answers to each call, without the variance."""
    return [answer[:, :model.config.channels] for answer in outputs(model, calls)]


def perturbed(model: DiT, name: str, perturb: str) -> AbstractContextManager[None]:
    """While inside, one layer of the model is perturbed; afterwards it is what it was, to the bit."""
    if perturb == "drop":
        return without_block(model, name)
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return other_weight(model, name, pruned(linear) if perturb == "prune" else rounded(linear, perturb))


@torch.no_grad()
def pruned(linear: nn.Linear) -> Tensor:
    """The weight with the quarter of smallest magnitude at zero."""
    weight = linear.weight.detach().clone()
    smallest = weight.abs().flatten().argsort()[:int(PRUNED * weight.numel())]
    weight.view(-1)[smallest] = 0
    return weight


@torch.no_grad()
def rounded(linear: nn.Linear, numbers: str) -> Tensor:
    """The weight as a packed layer of these numbers would mean it."""
    return LINEARS[numbers + WEIGHT_ONLY].of(linear).dequantize()  # type: ignore[attr-defined]  # each kind has it


def plain(found: Sensitivity) -> dict[str, Any]:
    """A measurement JSON-ready, the most sensitive layer first."""
    return {"model": found.model, "settings": dict(found.settings), "bins": [label(*ends) for ends in found.bins],
            "measured": len(found.totals), "of": len(found.layers),
            "layers": [{"rank": rank, "layer": name, "total": found.totals[name], "bins": list(found.errors[name])}
                       for rank, name in enumerate(found.ranking(), 1)],
            "provenance": dict(found.provenance)}


def table(found: Sensitivity) -> Table:
    """A measurement as a table for a terminal, in the order of the model."""
    from rich import box
    from rich.table import Table

    drawn = Table(title=f"{found.model}: error when one layer is perturbed ({found.settings['perturb']}), by timestep",
                  caption="Relative squared error in decibels: 0 is as large as the output, -10 a tenth of it.",
                  box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("layer", no_wrap=True)
    for ends in found.bins:
        drawn.add_column(label(*ends).replace("-", "-\n"), justify="right", no_wrap=True)
    drawn.add_column("total", justify="right", style="bold", no_wrap=True)
    drawn.add_column("rank", justify="right", no_wrap=True)
    rank = {name: str(place) for place, name in enumerate(found.ranking(), 1)}
    for name in found.totals:
        drawn.add_row(name, *map(decibels, (*found.errors[name], found.totals[name])), rank[name])
    return drawn


def decibels(error: float) -> str:
    """10 log10 of an error."""
    return f"{10 * math.log10(error):.0f}" if error > 0 else "none"


def heat_map(found: Sensitivity) -> str:
    """A measurement as an SVG document."""
    return heat_map_svg(list(found.totals), [*(label(*ends) for ends in found.bins), "total"],
                        [[*found.errors[name], found.totals[name]] for name in found.totals],
                        title=f"{found.model}: error when one layer is perturbed ({found.settings['perturb']})")


def label(first: int, last: int) -> str:
    """A bin's name: its first and last timestep."""
    return f"{first}-{last}" if first != last else str(first)
