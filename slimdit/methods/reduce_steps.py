"""Sample with fewer, better placed evaluations of the model: the largest lever there is, and free of training.

A second-order solver at 10 to 20 timesteps does what the original sampler does at 250 ("DPM-Solver++", arXiv
2211.01095; "UniPC", arXiv 2302.04867); guidance outside an interval of timesteps costs a pass and gains nothing (arXiv
2404.07724).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..context import Context, require

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling.settings import Sampling


@dataclass(frozen=True)
class ReduceSteps:
    """Visit fewer timesteps. What is left out stays as the pipeline has it.

    Attributes:
        steps: timesteps visited.
        solver: a name in `SOLVERS`.
        spacing: a name in `SPACINGS`: which timesteps are visited.
        guidance_interval: first and last timestep at which guidance acts; outside it one pass is saved.
        timesteps: the timesteps themselves, descending, instead of a spacing.
        search: images with which better timesteps than the spacing's are searched, without data: those from which as
            many steps end nearest to where `long` steps do (`training/placement.py`). For the solver `multistep` its
            numbers are then fitted to the same end (`training/fitting.py`). 0 searches none. Takes minutes.
        long: steps of the run that the search imitates.

    Raises:
        ValueError: a value is refused; the sentence says which and why.
    """

    steps: int = 20
    solver: str | None = None
    spacing: str | None = None
    guidance_interval: tuple[int, int] | None = None
    timesteps: tuple[int, ...] | None = None
    search: int = 0
    long: int = 100

    def __post_init__(self) -> None:
        from ..sampling.settings import Sampling

        Sampling(**self.named())
        if self.search < 0:
            raise ValueError(f"reduce_steps: search must be 0 or a number of images, not {self.search}")
        if self.search and self.long <= self.steps:
            raise ValueError(f"reduce_steps: the search needs a run of more than the {self.steps} steps to imitate, "
                             f"not of {self.long}: raise long")
        if self.search and self.timesteps is not None:
            raise ValueError("reduce_steps: give timesteps or a search for them, not both")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Change how the pipeline samples."""
        from ..sampling.solvers import evaluations

        require(pipeline.sampling.cache is None, "reduce_steps would set aside the cache, which was chosen for the "
                                                 "steps as they are: put reduce_steps before cache_blocks")
        sampling = self.sampling(pipeline.sampling)
        before, after = (evaluations(pipeline.process, one) for one in (pipeline.sampling, sampling))
        require(after < before or sampling == pipeline.sampling or (self.search and after == before),
                f"reduce_steps would reduce nothing: the model is evaluated {before} times per image before and "
                f"{after} times after; ask for fewer steps or a narrower guidance_interval")
        found: dict[str, Any] = {}
        if self.search:
            sampling, found = self.placed(pipeline, sampling, context)
        context.witness(evaluations_before=before, evaluations_after=evaluations(pipeline.process, sampling), **found)
        return pipeline.replace(sampling=sampling)

    def placed(self, pipeline: Pipeline, sampling: Sampling, context: Context) -> tuple[Sampling, dict[str, Any]]:
        """The settings with their timesteps, and a fitted solver's numbers, as serves the model; what was gained."""
        from ..training.fitting import ROUNDS, fit_coefficients
        from ..training.placement import STRIDES, place_steps

        require(sampling.solver != "ddpm", "reduce_steps: a search needs runs that end alike from the same noise, and "
                                           "ddpm draws more of it on the way: use another solver, or no search")
        images, long, strides, rounds = ((1, self.steps + 1, STRIDES[:1], 1) if context.rehearsal else
                                         (self.search, self.long, STRIDES, ROUNDS))
        sampling, found = place_steps(pipeline, replace(sampling, coefficients=None), images=images, long=long,
                                      seed=context.seed, strides=strides, report=context.report)
        if sampling.solver == "multistep":
            sampling, found["fit"] = fit_coefficients(pipeline, sampling, images=images, long=long, seed=context.seed,
                                                      rounds=rounds, report=context.report)
        return sampling, found

    def sampling(self, before: Sampling) -> Sampling:
        """The settings with this method's changes."""
        return before.revised(**self.named())

    def named(self) -> dict[str, Any]:
        """The options that sampling has, as far as they were given."""
        return {name: value for name, value in vars(self).items()
                if value is not None and name not in ("search", "long")}
