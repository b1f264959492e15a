"""How a model is sampled, as data: names and numbers alone, so that they can be read without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from ..strict import nearest

SOLVERS: Mapping[str, str] = {
    "ddpm": "ancestral sampling with the learned variance, as DiT publishes (250 steps, spacing respaced)",
    "ddim": "deterministic, first order (50 steps)",
    "dpmpp_2m": "DPM-Solver++ 2M: deterministic, second order, multistep (15 to 25 steps)",
    "unipc": "UniPC: DPM-Solver++ 2M with a corrector that costs nothing (8 to 20 steps)",
    "multistep": "linear, third order, its numbers fitted by a search; until then DPM-Solver++ 2M (5 to 10 steps)",
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


LARGEST_ORDER = 2  # of a forecast; higher ones follow noise
FITTED = 4  # numbers a step that `multistep` has: of x, of the clean image as predicted now, before, and before that


@dataclass(frozen=True)
class Caching:
    """At which steps of a run the whole model is evaluated; at the others what its blocks change is foretold.

    Attributes:
        full: those steps, counted from 0, ascending and with the first among them.
        order: of the polynomial in the timestep that foretells from the last full evaluations; 0 repeats the last.

    Raises:
        ValueError: a value is refused.
    """

    full: tuple[int, ...]
    order: int = 0

    def __post_init__(self) -> None:
        full = self.full
        if not isinstance(full, Sequence) or isinstance(full, str) or not full or not all(map(_is_whole, full)):
            raise ValueError(f"caching: full must be steps, whole numbers from 0 on, not {full!r}")
        if full[0] != 0 or any(earlier >= later for earlier, later in pairwise(full)):
            raise ValueError(f"caching: full steps must ascend from 0, not {list(full)}")
        if not _is_whole(self.order) or self.order > LARGEST_ORDER:
            raise ValueError(f"caching: order must be 0, 1 or {LARGEST_ORDER}, not {self.order!r}")
        object.__setattr__(self, "full", tuple(full))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {"full": list(self.full), "order": self.order}

    @classmethod
    def from_dict(cls, data: Any) -> Caching:
        """The settings that `to_dict` described.

        Raises:
            ValueError: it describes none.
        """
        if not isinstance(data, Mapping) or "full" not in data or set(data) - {"full", "order"}:
            raise ValueError(f"caching: {data!r} is not an object of full and order")
        return cls(**data)


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
        coefficients: `FITTED` numbers for every step, by which `multistep` solves, instead of DPM-Solver++ 2M's.
        cache: at which steps the whole model is evaluated; None is all.

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
    # Not in the text, so that what is known by its text stays known.
    coefficients: tuple[tuple[float, ...], ...] | None = field(default=None, repr=False)
    cache: Caching | None = field(default=None, repr=False)

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
        if self.coefficients is not None:
            self._check_coefficients(self.coefficients)
        if self.cache is not None and self.cache.full[-1] >= self.steps:
            raise ValueError(f"sampling: the cache has a full evaluation at step {self.cache.full[-1]}, and the last "
                             f"of {self.steps} is {self.steps - 1}")

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

    def _check_coefficients(self, rows: Any) -> None:
        if self.solver != "multistep":
            raise ValueError(f"sampling: coefficients are for the solver 'multistep', not for {self.solver!r}")
        if not (_is_list(rows) and all(_is_list(row) and len(row) == FITTED and all(map(_is_finite, row))
                                       for row in rows) and len(rows) == self.steps):
            raise ValueError(f"sampling: coefficients must be {FITTED} finite numbers for each of the {self.steps} "
                             f"steps, not {rows!r}")
        object.__setattr__(self, "coefficients", tuple(tuple(map(float, row)) for row in rows))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description from which `from_dict` builds the same settings."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.repr}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        fitted = {"coefficients": [list(row) for row in self.coefficients]} if self.coefficients else {}
        return {**plain, **fitted, **({"cache": self.cache.to_dict()} if self.cache else {})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sampling:
        """The settings that `to_dict` described; what is left out takes its default.

        Raises:
            ValueError: a key is unknown, or a value is refused.
        """
        known = [one.name for one in fields(cls)]
        for name in data:
            if name not in known:
                raise ValueError(f"sampling: {name!r} is unknown; {nearest(name, known)}")
        cache = data.get("cache")
        return cls(**{**data, "cache": None if cache is None else Caching.from_dict(cache)})

    def with_cache(self, full: Sequence[int], order: int = 0) -> Sampling:
        """The settings with whole evaluations at these steps only.

        Raises:
            ValueError: as `Caching`, or a step is beyond the last.
        """
        return replace(self, cache=Caching(tuple(full), order))

    def revised(self, **changes: Any) -> Sampling:
        """The settings with changes; what was chosen for other steps (timesteps, coefficients, a cache) is set aside.

        Raises:
            ValueError: a value is refused.
        """
        aside: dict[str, Any] = {}
        if changes.get("steps", self.steps) != self.steps or "spacing" in changes:
            aside["timesteps"] = None
        if any(changes.get(name, getattr(self, name)) != getattr(self, name)
               for name in ("solver", "steps", "spacing", "timesteps")):
            aside |= {"cache": None, "coefficients": None}
        return replace(self, **{**aside, **changes})


def _require_known(what: str, name: Any, table: Mapping[str, Any]) -> None:
    if name not in table:
        raise ValueError(f"sampling: {what} {name!r} is unknown; {nearest(name, table)}")


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
