"""How important the hidden units and attention heads of a model are, and which of them to keep.

Importance by first-order Taylor is arXiv 1906.10771, for a diffusion loss arXiv 2305.10924; by weights and the
activations they meet, arXiv 2306.11695.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attention import is_plain
from ..models.dit import DiT
from ..models.feedforward import MLP
from ..pipeline import Pipeline
from .calibration import deployed_calls, gate_sizes, layer_inputs
from .data import ImageData
from .gradients import loss_batches, loss_gradients

Kept = list[list[int]]
"""For every block, the numbers of what stays of it, ascending."""


@dataclass(frozen=True)
class Branch:
    """The MLP or the attention of a block, whose units or heads are to be ranked."""

    block: int
    name: str  # "mlp" or "attn"
    reads: nn.Linear  # fc1 or qkv: a part's rows
    writes: nn.Linear  # fc2 or proj: a part's columns
    parts: int  # units or heads

    def grouped(self, columns: Tensor) -> Tensor:
        """Values per column of `writes`, summed for each part: (parts,)."""
        return columns.view(self.parts, -1).sum(1)


def uncuttable(model: DiT, name: str) -> str:
    """Why a branch cannot be cut in every block, as the rest of a sentence with its remedy; empty where it can."""
    blocks: Any = model.blocks
    for number, block in enumerate(blocks):
        if name == "mlp" and type(block.mlp) is not MLP:
            return (f"cuts MLPs, and block {number} has a {type(block.mlp).__name__}: put it before what replaces "
                    "them")
        if name == "attn" and not is_plain(block.attn):
            return ("cuts heads of softmax attention with keys of their own and no convolution, and block "
                    f"{number} has a {type(block.attn).__name__}: leave heads at 1, or put it before what replaces "
                    "attention")
    return ""


def branches(model: DiT, name: str) -> list[Branch]:
    """The branches of a name, `"mlp"` or `"attn"`, one per block.

    Raises:
        ValueError: `uncuttable` says why not.
    """
    if reason := uncuttable(model, name):
        raise ValueError(f"importance {reason}")
    blocks: Any = model.blocks
    if name == "mlp":
        return [Branch(number, name, block.mlp.fc1, block.mlp.fc2, block.mlp.fc2.in_features)
                for number, block in enumerate(blocks)]
    return [Branch(number, name, block.attn.qkv, block.attn.proj, block.attn.heads)
            for number, block in enumerate(blocks)]


def importance(criterion: str, ranked: Sequence[Branch], pipeline: Pipeline, data: ImageData | None, *, images: int,
               seed: int) -> list[Tensor]:
    """How important each part of each branch is: (parts,), float64 each.

    Args:
        criterion: `"taylor"`, `"activation"` or `"magnitude"`.
        data: images for the loss of `"taylor"`; None takes the pipeline's own samples.
        images: how many to calibrate on.
    """
    if criterion == "magnitude":
        return magnitude(ranked, pipeline)
    if criterion == "activation":
        return activation(ranked, pipeline, images, seed)
    return taylor(ranked, pipeline, data, images, seed)


def magnitude(ranked: Sequence[Branch], pipeline: Pipeline) -> list[Tensor]:
    """The L2 norm of all weights of a part, times the mean |gate| of its branch."""
    gates, scores = gate_sizes(pipeline), []
    for branch in ranked:
        rows = branch.reads.weight.detach().double().square().sum(1) + branch.reads.bias.detach().double().square()
        # A head has rows in each of q, k and v, which stand one after the other.
        into = sum(branch.grouped(part) for part in rows.split(branch.writes.in_features))
        norm = (into + branch.grouped(column_squares(branch.writes))).sqrt().cpu()
        scores.append(gates[branch.block][branch.name] * norm)
    return scores


def activation(ranked: Sequence[Branch], pipeline: Pipeline, images: int, seed: int) -> list[Tensor]:
    """The norm of what a part adds: its outgoing weights times what they meet while sampling, times the mean |gate|.

    Both norms as Wanda's (arXiv 2306.11695, equation 1), column by column.
    """
    gates, names = gate_sizes(pipeline), {module: name for name, module in pipeline.model.named_modules()}
    met: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor) -> None:
        met[name] = met.get(name, 0) + x.double().square().flatten(0, -2).sum(0)

    layer_inputs(pipeline.model, deployed_calls(pipeline, images=images, seed=seed),
                 [names[branch.writes] for branch in ranked], visit)
    return [gates[branch.block][branch.name]
            * branch.grouped(column_squares(branch.writes) * met[names[branch.writes]]).sqrt().cpu()
            for branch in ranked]


def taylor(ranked: Sequence[Branch], pipeline: Pipeline, data: ImageData | None, images: int,
           seed: int) -> list[Tensor]:
    """|sum of weight x gradient| over a part's outgoing weights, averaged over batches of all deployed timesteps.

    The sum is the slope of the loss as the part is turned down, so its size is to first order the loss's change without
    it (arXiv 1906.10771). Slopes of opposite sign would cancel over timesteps: their sizes are averaged.
    """
    weights = [branch.writes.weight for branch in ranked]
    batches = loss_batches(pipeline, data, images=images, seed=seed)
    sums: list[Any] = [0.0] * len(ranked)
    for gradients in loss_gradients(pipeline.model, pipeline.process, batches, weights):
        for place, (branch, weight, gradient) in enumerate(zip(ranked, weights, gradients)):
            slopes = branch.grouped((weight.detach().double() * gradient.double()).sum(0))
            sums[place] = sums[place] + slopes.abs().cpu() / len(batches)
    return sums


def column_squares(linear: nn.Linear) -> Tensor:
    """Sum of squares of each input's weights: (in_features,)."""
    return linear.weight.detach().double().square().sum(0)


def best(scores: Sequence[Tensor], shares: Sequence[float], grains: Sequence[int], scope: str) -> Kept:
    """What stays of each block: the best of its own, or the best of all blocks together, in whole grains.

    Every block keeps its best grain. Then grains are added by their mean score, best first, as long as that brings the
    number that stays nearer to the share. Of all blocks together there is one share: the first.
    """
    if scope == "block":
        return [best([one], [share], [grain], "global")[0] for one, share, grain in zip(scores, shares, grains)]
    pieces = [one.argsort(descending=True, stable=True).split(grain) for one, grain in zip(scores, grains)]
    kept = [1] * len(pieces)  # grains of each block, its best first
    count = sum(len(piece[0]) for piece in pieces)
    others = [(float(scores[block][grain].mean()), block, len(grain))
              for block, piece in enumerate(pieces) for grain in piece[1:]]
    for _, block, size in sorted(others, key=lambda entry: -entry[0]):
        if count + size / 2 > shares[0] * sum(map(len, scores)):
            break
        kept[block] += 1
        count += size
    return [sorted(torch.cat(piece[:number]).tolist()) for piece, number in zip(pieces, kept)]
