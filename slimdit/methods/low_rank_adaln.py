"""Replace adaLN's linear layers, a third of a DiT's weights, by pairs of low rank fitted to the conditions in use.

adaLN sees nothing but timesteps and labels: a finite set on a thin manifold, whatever the width. The pair is the exact
least-squares one on that set (reduced-rank regression, Izenman 1975, doi 10.1016/0047-259X(75)90042-1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..context import Context, require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..models.linear import LowRank
    from ..pipeline import Pipeline


@dataclass(frozen=True)
class LowRankAdaln:
    """Store adaLN as pairs of thin layers. It runs once an image: bytes are saved, hardly any time.

    Attributes:
        rank: of the pairs, as a share of the width, rounded up; 1 keeps the layers as they are.
        final: whether the final layer's adaLN, smaller by three, is replaced too.

    Raises:
        ValueError: the rank is outside 0..1.
    """

    rank: float = 0.25
    final: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not 0 < self.rank <= 1:
            raise ValueError(f"low_rank_adaln: rank is a share of the width, above 0 up to 1, not {self.rank!r}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Fit a pair to every layer's answers and put it in the layer's place."""
        from ..models.surgery import put_modulation, weight_bytes

        model, config = pipeline.model, pipeline.model.config
        require(not config.linears, f"low_rank_adaln needs float weights, and {len(config.linears)} layers are packed: "
                                    "put it before quantize")
        before, errors = weight_bytes(model), []
        rank = math.ceil(self.rank * config.width)
        places: list[int | None] = []
        if self.rank < 1:
            places = [*range(len(config.blocks)), *([None] if self.final else [])]
            require_full(pipeline, self.final)
            require_saving(rank, config.width, outputs=2 if self.final else 6)
            mean, spread = met_by_adaln(pipeline)
        for place in places:
            owner: Any = model.final_layer if place is None else model.blocks[place]
            pair, error = fitted(owner.adaLN_modulation[1], rank, mean, spread)
            put_modulation(model, place, pair)
            errors.append(error)
        context.witness(layers=len(places), rank=rank, width=config.width, bytes_before=before,
                        bytes_after=weight_bytes(model), largest_relative_error=max(errors, default=0.0))
        return pipeline.replace(model=model)


def require_full(pipeline: Pipeline, final: bool) -> None:
    """Refuse layers that are pairs already: an error fitted on an error would go unseen."""
    config = pipeline.model.config
    pairs = sum(block.adaln_rank is not None for block in config.blocks) + bool(final and config.final_adaln_rank)
    require(not pairs, f"low_rank_adaln needs full layers, and {pairs} are pairs already: choose the rank once, from "
                       "the full model")


def require_saving(rank: int, width: int, outputs: int) -> None:
    """Refuse a pair, `width` to `outputs` times the width, that stores as many weights as the layer or more."""
    most = math.ceil(outputs * width / (1 + outputs)) - 1
    require(rank <= most, f"low_rank_adaln: pairs of rank {rank} at width {width} are no smaller than "
                          f"{'the final layer' if outputs == 2 else 'the layers'}: at most rank {most} saves anything, "
                          f"so ask for a share of at most {math.floor(1000 * most / width) / 1000}")


def met_by_adaln(pipeline: Pipeline) -> tuple[Tensor, Tensor]:
    """Mean (width,) and covariance (width, width), float64, of what adaLN's linear layers are given while sampling."""
    import torch

    from ..training.calibration import conditions

    width, visited = pipeline.model.config.width, 0
    mean = torch.zeros(width, dtype=torch.float64, device=pipeline.device)
    second = torch.zeros(width, width, dtype=torch.float64, device=pipeline.device)
    for condition, weights in conditions(pipeline):
        given, share = torch.nn.functional.silu(condition).double(), weights.double()
        mean += share @ given
        second += given.T @ (share[:, None] * given)
        visited += 1
    mean, second = mean / visited, second / visited
    return mean, second - torch.outer(mean, mean)


def fitted(linear: nn.Linear, rank: int, mean: Tensor, spread: Tensor) -> tuple[LowRank, float]:
    """The pair nearest to a layer on inputs of this mean and covariance, and its relative squared error there.

    With S the covariance and W S^(1/2) = P D Q^T, the answers W x vary along the columns of P by D: the best pair is
    P_r (P_r^T W), and the bias takes up what the rest says on average.
    """
    import torch

    from ..models.linear import LowRank

    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    values, vectors = torch.linalg.eigh(spread)
    root = vectors * values.clamp(min=0).sqrt()
    directions, sizes, _ = torch.linalg.svd(weight @ root, full_matrices=False)
    up = directions[:, :rank]
    down = up.T @ weight
    pair = LowRank(linear.in_features, linear.out_features, rank).to(weight)
    pair.load_state_dict({"down.weight": down, "up.weight": up, "up.bias": bias + (weight - up @ down) @ mean})
    left, all_of_it = sizes[rank:].square().sum().item(), sizes.square().sum().item()
    return pair, left / all_of_it if all_of_it else 0.0
