"""Evaluate the blocks at some steps of a sampling run only, and foretell what they would change at the others.

What all blocks together add to the tokens is held and repeated, or continued as a polynomial in the timestep
(`sampling/caching.py`; "FORA", arXiv 2407.01425; "TaylorSeer", arXiv 2503.06923). It needs a run with steps to spare:
the control is a solver with as many steps as this has full ones, and below 15 steps that is the better choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..context import Context, require

if TYPE_CHECKING:
    from ..pipeline import Pipeline

FEWEST = 15  # steps below which neighbours differ too much
EVERY = 2


@dataclass(frozen=True)
class CacheBlocks:
    """Foretell what the blocks change at some steps.

    Attributes:
        every: evaluate the blocks at every so-manieth step, the first among them; 1 changes nothing. 2 where neither
            this nor a threshold is given.
        threshold: or at the steps where the forecast's relative error, measured on a few images, is above this. The
            steps are then the same for all images.
        order: of the forecast: 0 repeats the last evaluation, 1 continues the line through the last two, 2 the
            parabola through three.
        images: to measure the errors on.
        force: also with fewer than 15 steps.

    Raises:
        ValueError: an option is out of range, or every and threshold are both given.
    """

    every: int | None = None
    threshold: float | None = None
    order: int = 0
    images: int = 8
    force: bool = False

    def __post_init__(self) -> None:
        from ..sampling.settings import Caching

        Caching((0,), self.order)  # refuses an order
        if self.every is not None and self.threshold is not None:
            raise ValueError("cache_blocks: give every or threshold, not both")
        if self.every is not None and self.every < 1:
            raise ValueError(f"cache_blocks: every must be 1 (all steps) or more, not {self.every}")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"cache_blocks: threshold is a relative error, 0..1 (1 excluded), not {self.threshold}")
        if self.images < 1:
            raise ValueError(f"cache_blocks: images must be at least 1, not {self.images}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Choose the steps of the pipeline's sampling at which its blocks are evaluated."""
        from ..sampling.solvers import evaluations, skipped

        sampling = pipeline.sampling
        require(sampling.cache is None, "cache_blocks: this pipeline foretells steps already: choose them once")
        require(sampling.steps >= FEWEST or self.force,
                f"cache_blocks: of {sampling.steps} steps none is like its neighbours: leave it out, use {FEWEST} "
                "steps or more, or set force = true")
        full, found = self.full_steps(pipeline, context)
        if len(full) < sampling.steps:
            sampling = sampling.with_cache(full, self.order)
        config, passes = pipeline.model.config, 1 if sampling.guidance == 1 else 2
        held = 4 * config.tokens * config.width * passes * (self.order + 1)
        context.witness(steps=sampling.steps, full_steps=list(full), order=self.order,
                        evaluations=evaluations(pipeline.process, sampling),
                        evaluations_foretold=skipped(pipeline.process, sampling),
                        float32_bytes_held_per_image=held if sampling.cache else 0, **found)
        return pipeline.replace(sampling=sampling)

    def full_steps(self, pipeline: Pipeline, context: Context) -> tuple[tuple[int, ...], dict[str, Any]]:
        """The steps at which the blocks are evaluated, and what was measured to choose them."""
        if self.threshold is None:
            return tuple(range(0, pipeline.sampling.steps, self.every or EVERY)), {}
        from ..training.foretelling import steps_to_evaluate

        context.report(f"cache_blocks: sampling {self.images} images to measure forecasts on")
        images = 1 if context.rehearsal else self.images
        chooser = steps_to_evaluate(pipeline, self.threshold, self.order, images=images, seed=context.seed)
        mean = sum(chooser.errors) / len(chooser.errors) if chooser.errors else 0.0
        return tuple(chooser.full), {"forecast_error": float(f"{mean:.3g}")}
