"""How a model is sampled, as data: names and numbers alone, so that they can be read without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from ..strict import nearest

SOLVERS: Mapping[str, str] = {
    "ddpm": "ancestral sampling with the learned variance, as DiT publishes (250 steps, spacing respaced)",
    "ddim": "deterministic, first order (50 steps)",
    "dpmpp_2m": "DPM-Solver++ 2M: deterministic, second order, multistep (15 to 25 steps)",
    "unipc": "UniPC: DPM-Solver++ 2M with a corrector that costs nothing (8 to 20 steps)",
}
"""What there is in `solvers.SOLVE`, and what it is for."""

SPACINGS: Mapping[str, str] = {
    "leading": "every n-th timestep from 0 (arXiv 2305.08891, table 2)",
    "trailing": "every n-th timestep back from the last (arXiv 2305.08891, table 2)",
    "linspace": "evenly from the last timestep to 0 (arXiv 2305.08891, table 2)",
    "respaced": "the fractional stride of ADM and DiT",
    "uniform_lambda": "equal steps of the log signal-to-noise ratio",
}
"""What there is in `solvers.PLACES`. The first three count as diffusers' DDIMScheduler does, with no offset."""

STARTS_CLEAN = ("leading", "linspace", "respaced")  # their only timestep, when asked for one, is 0


@dataclass(frozen=True)
class Sampling:
    """How noise becomes an image, as data.

    Attributes:
        solver: a name in `SOLVERS`.
        steps: timesteps visited; with `timesteps`, their number.
        spacing: a name in `SPACINGS`: which timesteps are visited.
        guidance: scale of classifier-free guidance; 1 is none, and costs no second pass.
        guidance_channels: how many of the first predicted noise channels are guided; the others stay conditional.
            None guides all; DiT's published samples use 3 (of 4).
        guidance_interval: first and last timestep, both included, at which guidance acts.
        timesteps: the timesteps themselves, descending, instead of a spacing.

    Raises:
        ValueError: a value is refused; the sentence says which and why.
    """

    solver: str = "ddim"
    steps: int = 50
    spacing: str = "trailing"
    guidance: float = 1.0
    guidance_channels: int | None = None
    guidance_interval: tuple[int, int] = (0, 1000)
    timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _require_known("solver", self.solver, SOLVERS)
        _require_known("spacing", self.spacing, SPACINGS)
        if not _is_whole(self.steps, least=1):
            raise ValueError(f"sampling: steps must be a whole number above 0, not {self.steps!r}")
        if not _is_number(self.guidance) or not 1 <= self.guidance < math.inf:
            raise ValueError(f"sampling: guidance must be 1 (none) or more, not {self.guidance!r}")
        if self.guidance_channels is not None and not _is_whole(self.guidance_channels, least=1):
            raise ValueError(f"sampling: guidance_channels must be a whole number above 0, or left out to guide all "
                             f"channels, not {self.guidance_channels!r}")
        self._check_interval()
        if self.timesteps is not None:
            self._check_timesteps(self.timesteps)
        elif self.steps == 1 and self.spacing in STARTS_CLEAN:
            raise ValueError(f"sampling: spacing {self.spacing!r} with 1 step would visit timestep 0 only, where there "
                             f"is no noise left to remove; use spacing 'trailing'")

    def _check_interval(self) -> None:
        interval = self.guidance_interval
        if not (isinstance(interval, Sequence) and len(interval) == 2 and all(map(_is_number, interval))
                and interval[0] <= interval[1]):
            raise ValueError(f"sampling: guidance_interval must be two timesteps, the lower first, not {interval!r}")
        object.__setattr__(self, "guidance_interval", tuple(interval))

    def _check_timesteps(self, visited: Sequence[int]) -> None:
        if not isinstance(visited, Sequence) or isinstance(visited, str) or not all(map(_is_whole, visited)):
            raise ValueError(f"sampling: timesteps must be whole numbers of 0 or more, not {visited!r}")
        if any(earlier <= later for earlier, later in pairwise(visited)):
            raise ValueError(f"sampling: timesteps must descend without repeats, not {list(visited)}")
        if len(visited) != self.steps:
            raise ValueError(f"sampling: steps is {self.steps} but {len(visited)} timesteps are given: "
                             f"set steps to their number")
        object.__setattr__(self, "timesteps", tuple(visited))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description from which `from_dict` builds the same settings."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sampling:
        """The settings that `to_dict` described; what is left out takes its default.

        Raises:
            ValueError: a key is unknown, or a value is refused.
        """
        known = [field.name for field in fields(cls)]
        for name in data:
            if name not in known:
                raise ValueError(f"sampling: {name!r} is unknown; {nearest(name, known)}")
        return cls(**data)


def _require_known(what: str, name: Any, table: Mapping[str, Any]) -> None:
    if name not in table:
        raise ValueError(f"sampling: {what} {name!r} is unknown; {nearest(name, table)}")


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
