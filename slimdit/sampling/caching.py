"""A sampling run's calls of the model, some of them without its blocks: what those change is foretold.

From one step to the next the blocks add nearly the same to the tokens ("FORA", arXiv 2407.01425, for each block), or
something that continues as it went ("TaylorSeer", arXiv 2503.06923, with finite differences). Here it is the sum of all
blocks, so that one tensor an image is held for every evaluation that the forecast looks at, and a foretold step costs
the embedding and the final layer. Which steps are whole is fixed beforehand and the same for all images: no image
depends on the batch it is made in.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol

from torch import Tensor

from .process import NoiseProcess
from .settings import Sampling
from .solvers import full_steps, timesteps


class Executed(Protocol):
    """A model as it is executed: float32 in and out, whole, whole with what its blocks changed, or without them."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None = None) -> Tensor:
        """As `DiT.forward`."""

    def with_change(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `DiT.with_change`."""

    def without_blocks(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None, change: Tensor) -> Tensor:
        """As `DiT.without_blocks`."""


class Evaluator:
    """The model as one sampling run calls it, step after step.

    Args:
        denoiser: the model as it is executed.
    """

    def __init__(self, denoiser: Executed, process: NoiseProcess, sampling: Sampling) -> None:
        self.denoiser, self.cache = denoiser, sampling.cache
        self.visited, self.full = timesteps(process, sampling), full_steps(process, sampling)
        self.kept: list[tuple[int, Tensor]] = []
        self.step = 0

    def seek(self, step: int) -> None:
        """Be ready for a step of the run."""
        self.step = step

    @property
    def is_whole(self) -> bool:
        """Whether this step evaluates the whole model."""
        return self.full[self.step]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None = None) -> Tensor:
        """As `DiT.forward`, in float32."""
        if self.cache is None:
            return self.denoiser(x, t, y, modulations)
        if not self.is_whole:
            return self.denoiser.without_blocks(x, t, y, modulations, foretold(self.kept, self.visited[self.step]))
        output, change = self.denoiser.with_change(x, t, y, modulations)
        if self.kept and len(self.kept[-1][1]) != len(change):  # guidance began or ended
            self.kept = []
        self.kept = [*self.kept, (self.visited[self.step], change)][-(self.cache.order + 1):]
        return output


def foretold(known: Sequence[tuple[int, Tensor]], timestep: int) -> Tensor:
    """The polynomial through what is known at some timesteps, at another one (Lagrange)."""
    if len(known) == 1:
        return known[0][1]
    parts = [change.float() * weight for (_, change), weight in zip(known, shares([at for at, _ in known], timestep))]
    return sum(parts[1:], parts[0]).to(known[0][1].dtype)


def shares(known: Sequence[int], timestep: int) -> list[float]:
    """How much each of the known timesteps counts at another one; together 1."""
    return [prod((timestep - other) / (at - other) for other in known if other != at) for at in known]
