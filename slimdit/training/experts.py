"""Which hidden units belong together and which tokens to which expert: closed forms on tokens of deployed calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.dit import DiT
from ..models.experts import by_tokens
from ..models.feedforward import MLP, gelu
from ..sampling.seeds import seeded
from .calibration import Call, layer_inputs

MOST_TOKENS = 8192  # of a block: more say the same again
ROUNDS = 20  # of clustering, and a tenth of those of balancing
RIDGE = 1e-3  # of the mean variance


@dataclass(frozen=True)
class Given:
    """What an MLP was given: the tokens of some images."""

    x: Tensor  # (images, tokens, width)
    t: Tensor  # (images,)
    unlabelled: Tensor  # (images,), whether the label was the null class

    @property
    def centred(self) -> Tensor:
        """The tokens without their image's mean, as a router sees them: (images, tokens, width)."""
        return self.x - self.x.mean(1, keepdim=True)

    def halves(self) -> list[Tensor]:
        """Masks of the labelled images and of the others; where there are none of one kind, all stand for it."""
        masks = [~self.unlabelled, self.unlabelled]
        return [mask if mask.any() else torch.ones_like(mask) for mask in masks]


def mlp_inputs(model: DiT, calls: Sequence[Call], blocks: Sequence[int]) -> dict[int, Given]:
    """What the MLPs of blocks are given in calls, a few images of each call, both guidance halves alike."""
    names = {f"blocks.{block}.mlp": block for block in blocks}
    images = max(2, MOST_TOKENS // (len(calls) * model.config.tokens))
    kept: dict[int, list[Tensor]] = {block: [] for block in blocks}
    rows = []
    for number, call in enumerate(calls):
        batch = len(call.x)
        row = torch.unique((torch.arange(images) * batch // images + number) % batch).to(call.x.device)
        layer_inputs(model, [call], names, lambda name, x, row=row: kept[names[name]].append(x[row]))  # type: ignore[misc]
        rows.append(row)
    t = torch.cat([call.t[row] for call, row in zip(calls, rows)])
    unlabelled = torch.cat([call.y[row] for call, row in zip(calls, rows)]) == model.config.classes
    return {block: Given(torch.cat(kept[block]), t, unlabelled) for block in blocks}


@torch.no_grad()
def contributions(mlp: MLP, x: Tensor) -> Tensor:
    """How far each hidden unit moves a token from what it does on average: (images, tokens, units)."""
    hidden = gelu(mlp.fc1(x))
    return (hidden - hidden.mean((0, 1))) * mlp.fc2.weight.norm(dim=0)


@torch.no_grad()
def answers(mlp: MLP, units: Sequence[int], x: Tensor) -> Tensor:
    """What some of the hidden units add to a token: (images, tokens, width)."""
    index = torch.tensor(units, device=x.device)
    return gelu(x @ mlp.fc1.weight[index].t() + mlp.fc1.bias[index]) @ mlp.fc2.weight[:, index].t()


def balanced_clusters(points: Tensor, count: int, seed: int) -> list[list[int]]:
    """Places of (n, features) points in `count` clusters of n // count each, near to their means; a rest is left out.

    k-means whose every assignment is balanced, as in "MoEfication" (arXiv 2110.01786).
    """
    order = torch.randperm(len(points), generator=seeded(seed, "clusters")).to(points.device)
    points = points[order]
    centres = points[:count]
    for _ in range(ROUNDS):
        index, _ = by_tokens(nearness(points, centres)[None], len(points) // count)
        centres = points[index[0]].mean(1)
    return [sorted(order[members].tolist()) for members in index[0]]


def nearness(points: Tensor, centres: Tensor) -> Tensor:
    """How near (..., features) points are to (count, features) centres: (..., count), larger is nearer.

    Half the squared distance, negated, without the part that is the same for all centres: linear in the points.
    """
    return points @ centres.t() - centres.square().sum(1) / 2


def fitted_scores(given: Given, sizes: Tensor) -> Tensor:
    """Router weights, (2, experts, width), whose scores are least-squares guesses of how far experts move a token.

    Tokens are compared within their image, as experts will.

    Args:
        sizes: (images, tokens, experts), how far each expert would move each token.
    """
    sizes = sizes - sizes.mean(1, keepdim=True)
    weights = []
    for half in given.halves():
        x, y = given.centred[half].flatten(0, 1).double(), sizes[half].flatten(0, 1).double()
        second = x.t() @ x
        second.diagonal().add_(RIDGE * second.diagonal().mean() + 1e-12)
        weights.append(torch.linalg.solve(second, x.t() @ y).t())
    return torch.stack(weights).to(given.x.dtype)


def prototypes(given: Given, sizes: Tensor | None, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Router weights (2, experts, width) and biases (2, experts) by which a token goes to the nearest prototype.

    A prototype is the mean of the tokens that use an expert: of those that it moves farthest, as many in every image,
    or, where the experts are alike (`sizes` is None), of a cluster.
    """
    centres = []
    for half in given.halves():
        x = given.centred[half]
        if sizes is None:
            flat = x.flatten(0, 1)
            centres.append(torch.stack([flat[members].mean(0) for members in balanced_clusters(flat, count, seed)]))
        else:
            relative = sizes[half] / sizes[half].mean((0, 1)).clamp(min=1e-12)
            index, _ = by_tokens(relative, max(1, x.shape[1] // count))
            taken = index[..., None].expand(-1, -1, -1, x.shape[-1])
            centres.append(x[:, None].expand(-1, count, -1, -1).gather(2, taken).mean((0, 2)))
    weight = torch.stack(centres)
    return weight, -weight.square().sum(-1) / 2


def balanced_bias(given: Given, weight: Tensor, bias: Tensor) -> Tensor:
    """Biases (2, experts) under which the experts are first choice equally often; those given are the start.

    Whoever is chosen too often is lowered a little, again and again, as in arXiv 2408.15664, on calibrated tokens
    instead of in training.
    """
    balanced = []
    for half, rows, start in zip(given.halves(), weight, bias):
        scores, count = given.centred[half].flatten(0, 1) @ rows.t() + start, len(start)
        shift, step = torch.zeros_like(start), scores.std()
        for turn in range(10 * ROUNDS):
            load = torch.bincount((scores + shift).argmax(1), minlength=count) / len(scores)
            shift = shift - step / (1 + turn) ** 0.5 * (load - 1 / count)
        balanced.append(start + shift)
    return torch.stack(balanced)
