"""Set single weights of the blocks to zero: a smaller file, and no faster on hardware that multiplies zeros too.

GPUs with sparse tensor cores do not: there layers of 2:4 run sparse where that is measured to be faster.

By magnitude (the L1 and the L2 norm of one weight order alike), by what the weight carries of its input, |w| times the
L2 norm of its input feature ("Wanda", arXiv 2306.11695, equation 1), or by the change of the loss to first order,
|w dL/dw| (arXiv 1906.10771), averaged over the timesteps (Diff-Pruning, arXiv 2305.10924).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..context import Context, matching, require

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline import Pipeline

Criterion = Literal["magnitude", "wanda", "taylor"]
Scope = Literal["layer", "global"]
REHEARSED = 2  # images on the twin, where no number means anything


@dataclass(frozen=True)
class PruneWeights:
    """Remove the weights that matter least.

    Attributes:
        sparsity: share of the chosen layers' weights that becomes zero; 0 changes nothing. Left out it is 0.5, or what
            the pattern makes it.
        pattern: `"unstructured"`, or N:M such as `"2:4"`: of every M weights in a row the N that matter most stay. At
            the end of a row that M does not divide, N of the rest stay.
        criterion: how much a weight matters: see above.
        scope: whether weights are ranked within their layer (`"wanda"`: within their row, the output they feed) or
            over all chosen layers.
        layers: patterns of module names. The default leaves adaLN, the embedders and the final layer as they are.
        skip: patterns of module names to leave out of those.
        images: how many images the criteria `"wanda"` and `"taylor"` look at.

    Raises:
        ValueError: a value is out of its range, or two do not go together.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    criterion: Criterion = "magnitude"
    scope: Scope = "layer"
    layers: tuple[str, ...] = ("blocks.*.attn.*", "blocks.*.mlp.*")
    skip: tuple[str, ...] = ()
    images: int = 32

    def __post_init__(self) -> None:
        for name, kind in (("criterion", Criterion), ("scope", Scope)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"prune_weights: {name} {getattr(self, name)!r} is unknown; use one of "
                                 f"{', '.join(get_args(kind))}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"prune_weights: sparsity must be in 0..1 (1 excluded), not {self.sparsity}")
        if self.images < 1:
            raise ValueError(f"prune_weights: images must be at least 1, not {self.images}")
        group = self.group  # refuses what is no pattern
        if group and self.sparsity not in (None, 1 - group[0] / group[1]):
            raise ValueError(f"prune_weights: the pattern {self.pattern} removes {1 - group[0] / group[1]:.4g} of the "
                             f"weights, not {self.sparsity}: leave sparsity out")
        if self.scope == "global" and (group or self.criterion == "wanda"):
            ranked = f"{self.pattern} ranks within groups" if group else "wanda ranks within rows"
            raise ValueError(f'prune_weights: {ranked}, so a global scope has nothing to rank: use scope = "layer"')

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Score the chosen layers' weights and zero the least of them."""
        from ..formats.sparse import stored_bytes
        from ..models.surgery import packable_linears, weight_bytes, zero_weights

        model = pipeline.model
        require(not model.config.linears, f"prune_weights needs float weights, and {len(model.config.linears)} layers "
                                          "are packed already: put prune_weights before quantize")
        names = packable_linears(model)
        chosen = matching(self.layers, names, "prune_weights: layers")
        chosen -= matching(self.skip, names, "prune_weights: skip")
        ordered = [name for name in names if name in chosen]
        weights = {name: model.get_submodule(name).get_parameter("weight") for name in ordered}
        bytes_before, zeros_before = stored_bytes(model.state_dict()), count_zeros(weights)
        if self.share and ordered:
            zero_weights(model, self.least(self.scores(pipeline, context, ordered)))
        total, zeros = sum(weight.numel() for weight in weights.values()), count_zeros(weights)
        context.witness(layers=len(ordered), weights=total, weights_removed=zeros - zeros_before,
                        share_zero=zeros / max(1, total), dense_bytes=weight_bytes(model),
                        stored_bytes_estimate_before=bytes_before,
                        stored_bytes_estimate_after=stored_bytes(model.state_dict()))
        return pipeline.replace(model=model)

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M of an N:M pattern."""
        if self.pattern == "unstructured":
            return None
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", self.pattern)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(f'prune_weights: pattern {self.pattern!r} is neither "unstructured" nor N:M, N weights '
                             f'kept of every M (0 < N < M), as in "2:4"')
        return int(found[1]), int(found[2])

    @property
    def share(self) -> float:
        """The share of weights to remove."""
        if self.group:
            return 1 - self.group[0] / self.group[1]
        return 0.5 if self.sparsity is None else self.sparsity

    def scores(self, pipeline: Pipeline, context: Context, names: list[str]) -> dict[str, Tensor]:
        """How much each weight matters, by layer: float32, of the weight's shape."""
        weights = {name: pipeline.model.get_submodule(name).get_parameter("weight").detach().abs().float()
                   for name in names}
        images = REHEARSED if context.rehearsal else self.images
        if self.criterion == "magnitude":
            return weights
        if self.criterion == "wanda":
            norms = input_norms(pipeline, names, images, context.seed)
            return {name: weight * norms[name] for name, weight in weights.items()}
        gradients = gradient_sizes(pipeline, context, names, images)
        return {name: weight * gradients[name] for name, weight in weights.items()}

    def least(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the weights to remove are, by layer: masks of the weights' shapes."""
        import torch

        if self.group:
            return {name: outside_best(score, *self.group) for name, score in scores.items()}
        if self.criterion == "wanda":
            return {name: smallest(score, self.share) for name, score in scores.items()}
        if self.scope == "layer":
            return {name: smallest(score.view(1, -1), self.share).view_as(score) for name, score in scores.items()}
        together = smallest(torch.cat([score.flatten() for score in scores.values()])[None], self.share)[0]
        parts = together.split([score.numel() for score in scores.values()])
        return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts)}


def input_norms(pipeline: Pipeline, names: list[str], images: int, seed: int) -> dict[str, Tensor]:
    """The L2 norm of every input feature over the deployed calls, by layer: (in_features,)."""
    import torch

    from ..training.calibration import deployed_calls, layer_inputs

    squares: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        squares[name] = squares.get(name, torch.zeros((), device=x.device)) + x.float().square().flatten(0, -2).sum(0)

    layer_inputs(pipeline.model, deployed_calls(pipeline, images=images, seed=seed), names, add)
    return {name: square.sqrt() for name, square in squares.items()}


def gradient_sizes(pipeline: Pipeline, context: Context, names: list[str], images: int) -> dict[str, Tensor]:
    """The size of the loss's gradient, averaged over all deployed timesteps, by layer: of the weight's shape."""
    from ..training.gradients import loss_batches, loss_gradients

    weights = [pipeline.model.get_submodule(name).get_parameter("weight") for name in names]
    batches = loss_batches(pipeline, context.data, images=images, seed=context.seed)
    total: dict[str, Tensor] = {}
    for gradients in loss_gradients(pipeline.model, pipeline.process, batches, weights):
        for name, gradient in zip(names, gradients):
            size = gradient.abs().float() / len(batches)
            total[name] = total[name] + size if name in total else size
    return total


def count_zeros(weights: Mapping[str, Tensor]) -> int:
    """How many weights are zero."""
    return sum(int((weight == 0).sum()) for weight in weights.values())


def smallest(scores: Tensor, share: float) -> Tensor:
    """A mask of the smallest scores of each row, (rows, n): as many as the share says, ties by position."""
    import torch

    count = round(share * scores.shape[1])
    order = scores.argsort(dim=1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


def outside_best(scores: Tensor, n: int, m: int) -> Tensor:
    """A mask of what is not among the n largest of every m scores of a row, (rows, columns)."""
    from torch.nn.functional import pad

    rows, columns = scores.shape
    whole = pad(scores, (0, -columns % m), value=-1).view(-1, m)  # what fills the last group up is never among the best
    removed = smallest(whole, (m - n) / m)
    return removed.view(rows, -1)[:, :columns]
