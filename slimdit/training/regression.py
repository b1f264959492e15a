"""Teaching a new attention what the trained one answers, block by block, on what it is given while sampling.

Layer-wise regression costs minutes where training end to end costs hours, and its error says how well a block bears the
change. What a branch says is weighed as the model hears it: times adaLN's gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.dit import DiT
from ..models.surgery import pruned_weights, zero_weights
from ..sampling.seeds import seeded
from .calibration import Call
from .loop import descend

ROWS = 32  # images of a step, each at a timestep of its own


@dataclass(frozen=True)
class Answers:
    """What the attention of a block is given and answers, a row for every image and call."""

    x: Tensor  # (rows, tokens, width)
    y: Tensor  # (rows, tokens, width)
    gate: Tensor  # (rows, 1, width)

    def rows(self, chosen: Tensor) -> Answers:
        """Some of the rows."""
        return Answers(self.x[chosen], self.y[chosen], self.gate[chosen])


@torch.no_grad()
def attention_answers(model: DiT, calls: Sequence[Call], block: int) -> Answers:
    """The rows of a block's attention on calls of the model."""
    place: Any = model.blocks[block]
    x: list[Tensor] = []
    y: list[Tensor] = []
    gates: list[Tensor] = []

    def told_modulation(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        gates.append(inputs[1][:, None].chunk(6, dim=-1)[2])

    def told_answer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x.append(inputs[0])
        y.append(output)

    with ExitStack() as hooks:
        hooks.callback(place.register_forward_pre_hook(told_modulation).remove)
        hooks.callback(place.attn.register_forward_hook(told_answer).remove)
        for call in calls:
            model(call.x, call.t, call.y)
    return Answers(torch.cat(x), torch.cat(y), torch.cat(gates))


def gated_error(layer: nn.Module, answers: Answers) -> Tensor:
    """||gate (layer(x) - y)||^2 / ||gate y||^2, a scalar."""
    wrong = (answers.gate * (layer(answers.x) - answers.y)).square().sum()
    return wrong / (answers.gate * answers.y).square().sum().clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def mean_error(layer: nn.Module, answers: Answers) -> float:
    """`gated_error` over all rows, some at a time."""
    parts = [answers.rows(part) for part in torch.arange(len(answers.x)).split(ROWS)]
    sizes = [(part.gate * part.y).square().sum().item() for part in parts]
    total = sum(sizes)
    return sum(gated_error(layer, part).item() * size for part, size in zip(parts, sizes)) / total if total else 0.0


def regress(layer: nn.Module, answers: Answers, *, steps: int, rate: float = 2e-3, seed: int = 0) -> None:
    """Train a layer in place towards the answers; weights that are pruned to zero stay zero."""
    pruned = pruned_weights(layer)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(0, len(answers.x), (min(ROWS, len(answers.x)),), generator=seeded(seed, "regress", step))
        return gated_error(layer, answers.rows(chosen.to(answers.x.device)))

    descend(layer, loss, steps=steps, rate=rate, project=(lambda: zero_weights(layer, pruned)) if pruned else None)
