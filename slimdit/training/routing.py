"""How evenly experts are used on deployed calls: loads by timestep, and the numbers that sum them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.dit import DiT
from ..models.experts import Experts, TokenExperts, timestep_bin
from .balance import first_choices
from .calibration import BINS, Call, layer_inputs


@dataclass(frozen=True)
class Load:
    """Who uses the experts of one block.

    Attributes:
        by_bin: (BINS, experts), tokens that used each expert, by the timestep's bin; bin 0 is 0..249.
        dropped: tokens that no expert took, of `tokens`.
        passed_on: tokens that were taken by another expert than their first choice, which only token_choice has.
    """

    by_bin: Tensor
    dropped: int
    passed_on: int
    tokens: int

    def summary(self) -> dict[str, Any]:
        """The numbers, JSON-ready: the load as a share of all uses in its bin, and how uneven the total is.

        `max_violation` is the largest load over the mean, minus 1; `gini` 0 for equal loads, towards 1 for one expert;
        `entropy` in nats, `effective_experts` its exponential; `dropped` and `passed_on` are shares of tokens.
        """
        total = self.by_bin.sum(0)
        share = total / total.sum().clamp(min=1)
        count = len(share)
        entropy = -(share * share.clamp(min=1e-30).log()).sum().item()
        gini = (share[:, None] - share).abs().sum().item() / (2 * count)
        by_bin = self.by_bin / self.by_bin.sum(1, keepdim=True).clamp(min=1)
        return {"load": [[round(value, 4) for value in row] for row in by_bin.tolist()],
                "max_violation": round(share.max().item() * count - 1, 4), "gini": round(gini, 4),
                "entropy": round(entropy, 4), "effective_experts": round(torch.tensor(entropy).exp().item(), 3),
                "dropped": round(self.dropped / max(1, self.tokens), 4),
                "passed_on": round(self.passed_on / max(1, self.tokens), 4)}


@torch.no_grad()
def loads(model: DiT, calls: Sequence[Call]) -> dict[int, Load]:
    """The load of every block that has experts."""
    layers = {f"blocks.{number}.mlp": (number, block.mlp) for number, block in enumerate(model.blocks)
              if isinstance(block.mlp, Experts)}
    found: dict[int, Load] = {}
    for call in calls if layers else []:
        unlabelled, bins = call.y == model.config.classes, timestep_bin(call.t, BINS)

        def visit(name: str, x: Tensor, call: Call = call, unlabelled: Tensor = unlabelled,
                  bins: Tensor = bins) -> None:
            number, layer = layers[name]
            used = layer.uses(x, call.t, unlabelled).double().cpu()
            passed_on = 0
            if isinstance(layer, TokenExperts) and layer.config.router == "token_choice":
                first = first_choices(layer.router, layer.router(x, unlabelled), unlabelled).cpu()
                passed_on = int(((used - first) > 0).sum())
            by_bin = used.new_zeros(BINS, used.shape[-1]).index_add(0, bins.cpu(), used.sum(1))
            dropped, tokens = int((used.sum(-1) == 0).sum()), used.shape[0] * used.shape[1]
            before = found.get(number, Load(torch.zeros_like(by_bin), 0, 0, 0))
            found[number] = Load(before.by_bin + by_bin, before.dropped + dropped, before.passed_on + passed_on,
                                 before.tokens + tokens)

        layer_inputs(model, [call], layers, visit)
    return found


def report(model: DiT, calls: Sequence[Call]) -> dict[str, dict[str, Any]]:
    """`Load.summary` of every block that has experts, by its name; nothing for a model without."""
    return {f"blocks.{number}": load.summary() for number, load in loads(model, calls).items()}
