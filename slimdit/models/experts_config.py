"""How a block's hidden units are shared out among experts, in numbers: `models/experts.py` has the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROUTERS = ("expert_choice", "token_choice", "timestep")
BALANCES = ("none", "bias", "loss")
MOST_EXPERTS, MOST_BINS = 256, 1000


@dataclass(frozen=True)
class ExpertsConfig:
    """How a block's hidden units are shared out among experts.

    Attributes:
        count: experts, all of one size.
        shared: hidden units that every token is put through; the others are the experts', equally many each.
        router: `"expert_choice"`: each expert takes the tokens of an image that it scores highest; one token may be
            taken by several, or by none. `"token_choice"`: each token goes to the expert that scores it highest, and
            from a full one to the next, so that none is left out where there is room for all. `"timestep"`: a table
            says which experts an image uses, by the timestep's bin.
        active: experts that a token uses, on average; exactly so many with `"timestep"`.
        capacity: room for tokens in all experts together, over tokens times `active`.
        balance: what evens out token_choice's first choices in training: `"none"`, `"bias"` or an auxiliary `"loss"`,
            see `training/balance.py`.
        bins: of the timesteps, all equally long; one where the timestep does not decide.

    Raises:
        ValueError: a number is out of its range, or two do not go together.
    """

    count: int
    shared: int = 0
    router: str = "expert_choice"
    active: int = 1
    capacity: float = 1.0
    balance: str = "none"
    bins: int = 1

    def __post_init__(self) -> None:
        if self.router not in ROUTERS:
            raise ValueError(f"experts: router {self.router!r} is unknown; use one of {', '.join(ROUTERS)}")
        if self.balance not in BALANCES:
            raise ValueError(f"experts: balance {self.balance!r} is unknown; use one of {', '.join(BALANCES)}")
        if self.balance != "none" and self.router != "token_choice":
            raise ValueError(f"experts: only token_choice has first choices to balance, not {self.router}: leave "
                             "balance at none")
        for name, least, most in (("count", 2, MOST_EXPERTS), ("shared", 0, None), ("active", 1, self.count),
                                  ("bins", 1, MOST_BINS)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least or (most and value > most):
                raise ValueError(f"experts: {name} must be a whole number from {least} on"
                                 f"{f' up to {most}' if most else ''}, not {value!r}")
        if isinstance(self.capacity, bool) or not 0 < self.capacity < float("inf"):
            raise ValueError(f"experts: capacity must be a number above 0, not {self.capacity!r}")
        if self.router == "token_choice" and self.active != 1:
            raise ValueError(f"experts: with token_choice every token uses one expert, not {self.active}: "
                             "use expert_choice, or fewer and larger experts")
        if self.router == "timestep" and self.capacity != 1:
            raise ValueError(f"experts: a timestep's experts take every token: leave capacity at 1, not "
                             f"{self.capacity}")
        if self.router != "timestep" and self.bins != 1:
            raise ValueError(f"experts: only the timestep router has bins: leave bins at 1, not {self.bins}")

    def units(self, mlp_width: int) -> int:
        """Hidden units of one expert, of a block with so many in all.

        Raises:
            ValueError: there are too few, or they cannot be shared out equally.
        """
        routed = mlp_width - self.shared
        if routed < self.count or routed % self.count:
            raise ValueError(f"experts: {routed} hidden units beside the {self.shared} shared ones cannot be shared "
                             f"out equally among {self.count} experts: use a number of experts that divides them")
        return routed // self.count

    def slots(self, tokens: int) -> int:
        """Tokens of an image that one expert has room for: all of them, or its part of the capacity, rounded down."""
        if self.router == "timestep":
            return tokens
        return min(tokens, max(1, int(self.capacity * self.active * tokens / self.count + 1e-6)))

    def macs(self, mlp_width: int, width: int, tokens: int) -> tuple[int, int]:
        """Multiply-accumulates of an image's tokens: in the experts and the shared units, and in the router."""
        at_once = self.active if self.router == "timestep" else self.count
        passes = tokens * self.shared + at_once * self.slots(tokens) * self.units(mlp_width)
        return 2 * width * passes, 0 if self.router == "timestep" else tokens * width * self.count


def experts_config(value: Any) -> ExpertsConfig | None:
    """The config, also from the mapping that JSON makes of it.

    Raises:
        ValueError: as `ExpertsConfig`; TypeError: a name is unknown or missing.
    """
    return value if value is None or isinstance(value, ExpertsConfig) else ExpertsConfig(**value)
