"""Which timesteps to visit: those from which a short run ends where a long one does, found in minutes without data.

That a schedule should be fitted to its model is from "Align Your Steps" (arXiv 2404.14507), which minimises a bound on
a divergence. Here the distance between the ends of two runs from the same noise is minimised itself: every timestep in
turn is moved, by a stride that shrinks, and stays where the distance is less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..pipeline import Pipeline, Runtime
from ..sampling.seeds import ImageNoise, image_labels
from ..sampling.settings import SPACINGS, STARTS_CLEAN, Sampling
from ..sampling.solvers import evaluations, timesteps
from .calibration import FIRST_ID

STRIDES = (64, 32, 16, 8, 4, 2)
SWEEPS = 2  # over all timesteps, at one stride
BATCH = 32


@dataclass(frozen=True)
class Goal:
    """Where the long run from some noise ends.

    Attributes:
        ids: whose noise and labels.
        ends: (images, channels, height, width), float32.
    """

    pipeline: Pipeline
    seed: int
    ids: range
    ends: Tensor

    @classmethod
    def of(cls, pipeline: Pipeline, long: Sampling, ids: range, seed: int) -> Goal:
        """The ends of a pipeline's runs with the long run's settings, in float32."""
        plain = pipeline.replace(runtime=Runtime())
        return cls(plain, seed, ids, ends(plain, long, ids, seed))

    def missed(self, sampling: Sampling) -> Tensor:
        """By how much these settings end elsewhere than the long run: as `ends`."""
        return ends(self.pipeline, sampling, self.ids, self.seed) - self.ends

    def error(self, sampling: Sampling) -> float:
        """Mean squared distance between where these settings end and where the long run does."""
        return float(self.missed(sampling).square().mean())


def goals(pipeline: Pipeline, sampling: Sampling, images: int, long: int, seed: int) -> tuple[Goal, Goal]:
    """Where a run of `long` steps ends: for the images that a search is made with, and for as many others.

    Whatever the spacing was, it begins at the last timestep, where there is nothing but noise.
    """
    far = replace(sampling, steps=long, spacing="trailing", timesteps=None, coefficients=None)
    searched, others = (range(FIRST_ID + start, FIRST_ID + start + images) for start in (0, images))
    return Goal.of(pipeline, far, searched, seed), Goal.of(pipeline, far, others, seed)


def ends(pipeline: Pipeline, sampling: Sampling, ids: range, seed: int) -> Tensor:
    """Where runs from the noise of these ids end: latents, float32."""
    one, config = pipeline.replace(sampling=sampling), pipeline.model.config
    shape = (config.channels, *config.input_size)
    batches = [ids[start:start + BATCH] for start in range(0, len(ids), BATCH)]
    return torch.cat([one.latents(ImageNoise(seed, batch, shape), image_labels(seed, batch, config.classes))
                      for batch in batches]).float()


def place_steps(pipeline: Pipeline, sampling: Sampling, *, images: int, long: int, seed: int,
                strides: Sequence[int] = STRIDES,
                report: Callable[[str], None] = lambda line: None) -> tuple[Sampling, dict[str, Any]]:
    """The settings with better places for their steps, as many, and what is to be told of them.

    They stay where they were if what was found is no better for images that the search did not see: few images are
    easily served.

    Args:
        sampling: the settings to improve: their solver must be deterministic. The search begins at the best of all
            named spacings.
        images: whose ends are compared; as many others say what was gained.
        long: steps of the long run.
        report: told how far the search is.
    """
    goal, others = goals(pipeline, sampling, images, long, seed)
    known: dict[tuple[int, ...], float] = {}

    def error(visited: tuple[int, ...]) -> float:
        if visited not in known:
            known[visited] = goal.error(replace(sampling, timesteps=visited))
        return known[visited]

    begun = tuple(timesteps(pipeline.process, sampling))
    allowed = evaluations(pipeline.process, sampling)
    best = min((places for places in named_places(pipeline, sampling)
                if evaluations(pipeline.process, replace(sampling, timesteps=places)) <= allowed), key=error)
    for stride in strides:
        best = moved(best, stride, error, lambda places: places[0] < pipeline.process.steps and evaluations(
            pipeline.process, replace(sampling, timesteps=places)) <= allowed)
        report(f"steps moved by {stride}: error {error(best):.3g}, {len(known)} places tried")
    found = replace(sampling, timesteps=best)
    before, after = others.error(sampling), others.error(found)
    kept = best if after < before else begun
    return replace(sampling, timesteps=kept), {
        "timesteps": list(kept), "places_tried": len(known), "error_before": before, "error_found": after,
        "error_before_searched": error(begun), "error_found_searched": error(best)}


def named_places(pipeline: Pipeline, sampling: Sampling) -> list[tuple[int, ...]]:
    """The timesteps of the settings themselves, then of every named spacing."""
    spacings = [name for name in SPACINGS if sampling.steps > 1 or name not in STARTS_CLEAN]
    return list(dict.fromkeys(tuple(timesteps(pipeline.process, one)) for one in (
        sampling, *(replace(sampling, spacing=name, timesteps=None) for name in spacings))))


def moved(places: tuple[int, ...], stride: int, error: Callable[[tuple[int, ...]], float],
          allowed: Callable[[tuple[int, ...]], bool]) -> tuple[int, ...]:
    """The timesteps after each was moved by the stride, up or down, where that lessens the error."""
    for _ in range(SWEEPS):
        before = places
        for place in range(len(places)):
            for step in (stride, -stride):
                tried = (*places[:place], places[place] + step, *places[place + 1:])
                descends = tried[-1] >= 0 and all(a > b for a, b in pairwise(tried))
                if descends and allowed(tried) and error(tried) < error(places):
                    places = tried
        if places == before:
            break
    return places
