"""Cut the least important hidden units and attention heads out of every block: narrower layers, dense as before.

A unit is a row of fc1 with its column of fc2; a head its rows of qkv with its columns of the projection ("DepGraph",
arXiv 2301.12900). Importance by first-order Taylor is arXiv 1906.10771, for a diffusion loss arXiv 2305.10924; by
weights and the activations they meet, arXiv 2306.11695.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..allocation import measured_errors
from ..context import Context, Refused, require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..models.dit import DiT, DiTConfig
    from ..pipeline import Pipeline

CRITERIA = ("taylor", "activation", "magnitude")
SCOPES = ("block", "global")
REHEARSED = 2  # images on the twin, where no number means anything


@dataclass(frozen=True)
class PruneWidth:
    """Narrow the MLPs and the attention of the blocks.

    Attributes:
        mlp: share of hidden units to keep, above 0 up to 1.
        heads: share of attention heads to keep, above 0 up to 1.
        macs: instead of both, the share to keep of the blocks' multiply-accumulates per token: one common share of
            units and heads is searched for it, then the units are let fill what the coarser heads leave.
        criterion: what makes a unit or head important: `"taylor"`, how much the diffusion loss would change without it
            (first order); `"activation"`, its outgoing weights times what they meet while sampling; `"magnitude"`, its
            weights. The last two are weighed by the mean |gate| of their branch, which Taylor's gradient has passed.
        scope: `"block"` cuts every block to the same share, `"global"` ranks units (and heads) of all blocks together.
        sensitivity: file or folder that `slimdit sensitivity` wrote for the model as it is here, or None. Blocks then
            keep more the more error their MLP, or their attention, was measured to cause, and the share on average.
        multiple: MLPs wider than this keep a multiple of it, as kernels like; a head stays whole.
        images: images to calibrate on, for the first two criteria.
        seed: of their noise.

    Raises:
        ValueError: a share is outside 0..1, or an option is unknown.
    """

    mlp: float = 1.0
    heads: float = 1.0
    macs: float | None = None
    criterion: Literal["taylor", "activation", "magnitude"] = "taylor"
    scope: Literal["block", "global"] = "block"
    sensitivity: str | None = None
    multiple: int = 16
    images: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mlp", "heads", "macs"):
            share = getattr(self, name)
            if share is not None and (isinstance(share, bool) or not 0 < share <= 1):
                raise ValueError(f"prune_width: {name} is the share that stays, above 0 up to 1, not {share!r}")
        if self.macs is not None and (self.mlp, self.heads) != (1, 1):
            raise ValueError("prune_width: macs finds the shares of mlp and heads itself: give either it or them")
        for name, known in (("criterion", CRITERIA), ("scope", SCOPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"prune_width: {name} {getattr(self, name)!r} is unknown; use {', '.join(known)}")
        if self.sensitivity and self.scope == "global":
            raise ValueError('prune_width: sensitivity says how much each block keeps, and so does a ranking over all '
                             'blocks: use scope = "block" with it')
        for name in ("multiple", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"prune_width: {name} must be at least 1, not {getattr(self, name)}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Rank, choose and cut."""
        from ..models.surgery import keep_heads, keep_units

        model, before = pipeline.model, pipeline.model.config
        units, heads = self.chosen(pipeline, context)
        for number, kept in enumerate(units):
            if len(kept) < before.blocks[number].mlp_width:
                keep_units(model, number, kept)
        for number, kept in enumerate(heads):
            if len(kept) < before.blocks[number].heads:
                keep_heads(model, number, kept)
        context.witness(criterion=self.criterion, **changes(before, model.config))
        return pipeline.replace(model=model)

    def chosen(self, pipeline: Pipeline, context: Context) -> tuple[Kept, Kept]:
        """The units and the heads that stay, block by block; nothing where all of them do."""
        config = pipeline.model.config
        mlps = branches(pipeline.model, "mlp") if self.mlp < 1 or self.macs is not None else []
        attentions = branches(pipeline.model, "attn") if self.heads < 1 or self.macs is not None else []
        require_float(pipeline.model)
        if not mlps + attentions:
            return [], []
        scores = importance(self, [*mlps, *attentions], pipeline, context)
        grains = [self.multiple if branch.parts > self.multiple else 1 for branch in mlps]

        errors = {} if context.rehearsal else measured_errors("prune_width", self.sensitivity)

        def units(share: float) -> Kept:
            return best(scores[:len(mlps)], shares(errors, "*.mlp.*", share, len(mlps)), grains, self.scope)

        def heads(share: float) -> Kept:
            return best(scores[len(mlps):], shares(errors, "*.attn.*", share, len(attentions)), [1] * len(attentions),
                        self.scope)

        def macs(some_units: Kept, some_heads: Kept) -> int:
            return block_macs(config, [len(kept) for kept in some_units], [len(kept) for kept in some_heads])

        if self.macs is None:
            return units(self.mlp), heads(self.heads)
        whole, least = macs(units(1), heads(1)), macs(units(0), heads(0))
        budget = self.macs * whole
        require(least <= budget, f"prune_width: the least that blocks keep is {least / whole:.3f} of their MACs: ask "
                                 "for macs above that, or drop blocks with prune_depth")
        common = largest(lambda share: macs(units(share), heads(share)) <= budget)
        return units(largest(lambda share: macs(units(share), heads(common)) <= budget)), heads(common)


Kept = list[list[int]]
"""For every block, the numbers of what stays of it, ascending."""


def require_float(model: DiT) -> None:
    """Refuse packed layers."""
    packed = len(model.config.linears)
    require(not packed, f"prune_width needs float weights, and {packed} layers are packed: put it before quantize")


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


def branches(model: DiT, name: str) -> list[Branch]:
    """The branches of a name, one per block, refused where they are not the kind that can be cut."""
    from ..models.attention import is_plain
    from ..models.feedforward import MLP

    require_float(model)
    found = []
    blocks: Any = model.blocks
    for number, block in enumerate(blocks):
        if name == "mlp":
            require(type(block.mlp) is MLP, f"prune_width cuts MLPs, and block {number} has a "
                                            f"{type(block.mlp).__name__}: put it before what replaces them")
            found.append(Branch(number, name, block.mlp.fc1, block.mlp.fc2, block.mlp.fc2.in_features))
        else:
            require(is_plain(block.attn),
                    "prune_width cuts heads of softmax attention with keys of their own and no convolution, and block "
                    f"{number} has a {type(block.attn).__name__}: leave heads at 1, or put it before what replaces "
                    "attention")
            found.append(Branch(number, name, block.attn.qkv, block.attn.proj, block.attn.heads))
    return found


def importance(method: PruneWidth, ranked: list[Branch], pipeline: Pipeline, context: Context) -> list[Tensor]:
    """How important each part of each branch is, by the method's criterion: (parts,), float64 each."""
    if method.criterion == "magnitude":
        return magnitude(ranked, pipeline)
    images = REHEARSED if context.rehearsal else method.images
    if method.criterion == "activation":
        return activation(ranked, pipeline, images, method.seed)
    return taylor(ranked, pipeline, context, images, method.seed)


def magnitude(ranked: list[Branch], pipeline: Pipeline) -> list[Tensor]:
    """The L2 norm of all weights of a part, times the mean |gate| of its branch."""
    from ..training.calibration import gate_sizes

    gates, scores = gate_sizes(pipeline), []
    for branch in ranked:
        rows = branch.reads.weight.detach().double().square().sum(1) + branch.reads.bias.detach().double().square()
        # A head has rows in each of q, k and v, which stand one after the other.
        into = sum(branch.grouped(part) for part in rows.split(branch.writes.in_features))
        norm = (into + branch.grouped(column_squares(branch.writes))).sqrt().cpu()
        scores.append(gates[branch.block][branch.name] * norm)
    return scores


def activation(ranked: list[Branch], pipeline: Pipeline, images: int, seed: int) -> list[Tensor]:
    """The norm of what a part adds: its outgoing weights times what they meet while sampling, times the mean |gate|.

    Both norms as Wanda's (arXiv 2306.11695, equation 1), column by column.
    """
    from ..training.calibration import deployed_calls, gate_sizes, layer_inputs

    gates, names = gate_sizes(pipeline), {module: name for name, module in pipeline.model.named_modules()}
    met: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor) -> None:
        met[name] = met.get(name, 0) + x.double().square().flatten(0, -2).sum(0)

    layer_inputs(pipeline.model, deployed_calls(pipeline, images=images, seed=seed),
                 [names[branch.writes] for branch in ranked], visit)
    return [gates[branch.block][branch.name]
            * branch.grouped(column_squares(branch.writes) * met[names[branch.writes]]).sqrt().cpu()
            for branch in ranked]


def taylor(ranked: list[Branch], pipeline: Pipeline, context: Context, images: int, seed: int) -> list[Tensor]:
    """|sum of weight x gradient| over a part's outgoing weights, averaged over batches of all deployed timesteps.

    The sum is the slope of the loss as the part is turned down, so its size is to first order the loss's change without
    it (arXiv 1906.10771). Slopes of opposite sign would cancel over timesteps: their sizes are averaged.
    """
    from ..training.gradients import loss_batches, loss_gradients

    weights = [branch.writes.weight for branch in ranked]
    batches = loss_batches(pipeline, context.data, images=images, seed=seed)
    sums: list[Any] = [0.0] * len(ranked)
    for gradients in loss_gradients(pipeline.model, pipeline.process, batches, weights):
        for place, (branch, weight, gradient) in enumerate(zip(ranked, weights, gradients)):
            slopes = branch.grouped((weight.detach().double() * gradient.double()).sum(0))
            sums[place] = sums[place] + slopes.abs().cpu() / len(batches)
    return sums


def column_squares(linear: nn.Linear) -> Tensor:
    """Sum of squares of each input's weights: (in_features,)."""
    return linear.weight.detach().double().square().sum(0)


def shares(errors: Mapping[str, float], among: str, share: float, blocks: int) -> list[float]:
    """What each block keeps so that all keep a share: equally much where no errors were measured."""
    from ..allocation import keep_ratios

    if not errors or not 0 < share < 1:
        return [share] * blocks
    try:
        kept = keep_ratios(errors, share, among)
    except ValueError as error:
        raise Refused(f"prune_width: sensitivity: {error}") from error
    require(kept.keys() == {f"blocks.{number}" for number in range(blocks)},
            f"prune_width: the sensitivity is of a model of {len(kept)} blocks, and this one has {blocks}: measure it "
            "with `slimdit sensitivity MODEL --perturb prune`")
    return [kept[f"blocks.{number}"] for number in range(blocks)]


def best(scores: Sequence[Tensor], shares: Sequence[float], grains: Sequence[int], scope: str) -> Kept:
    """What stays of each block: the best of its own, or the best of all blocks together, in whole grains.

    Every block keeps its best grain. Then grains are added by their mean score, best first, as long as that brings the
    number that stays nearer to the share. Of all blocks together there is one share: the first.
    """
    import torch

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


def block_macs(config: DiTConfig, units: Sequence[int], heads: Sequence[int]) -> int:
    """Multiply-accumulates of an image's tokens in the blocks with so many units and heads; adaLN is left out."""
    total = 0
    for block, mlp_width, count in zip(config.blocks, units, heads):
        inner = count * block.head_dim
        total += config.tokens * (config.width * (4 * inner + 2 * mlp_width) + 2 * config.tokens * inner)
    return total


def largest(fits: Callable[[float], bool]) -> float:
    """The largest share that fits, where all below it do, by bisection."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def changes(before: DiTConfig, after: DiTConfig) -> dict[str, Any]:
    """What went, and what each block has left."""
    def told(config: DiTConfig) -> tuple[list[int], list[int]]:
        return [block.mlp_width for block in config.blocks], [block.heads for block in config.blocks]

    (units_before, heads_before), (units, heads) = told(before), told(after)
    macs_kept = block_macs(after, units, heads) / block_macs(before, units_before, heads_before)
    return {"units_removed": sum(units_before) - sum(units), "heads_removed": sum(heads_before) - sum(heads),
            "mlp_widths": units, "heads": heads, "block_macs_kept": round(macs_kept, 4)}
