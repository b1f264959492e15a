"""Cut the least important hidden units and attention heads out of every block: narrower layers, dense as before.

A unit is a row of fc1 with its column of fc2; a head its rows of qkv with its columns of the projection ("DepGraph",
arXiv 2301.12900). How they are ranked is in `training/importance.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..allocation import measured_errors
from ..context import Context, Refused, require

if TYPE_CHECKING:
    from ..models.dit import DiT, DiTConfig
    from ..pipeline import Pipeline
    from ..training.importance import Branch, Kept

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
        from ..models.surgery import block_macs
        from ..training.importance import best, importance

        config = pipeline.model.config
        mlps = branches(pipeline.model, "mlp") if self.mlp < 1 or self.macs is not None else []
        attentions = branches(pipeline.model, "attn") if self.heads < 1 or self.macs is not None else []
        require_float(pipeline.model)
        if not mlps + attentions:
            return [], []
        scores = importance(self.criterion, [*mlps, *attentions], pipeline, context.data,
                            images=REHEARSED if context.rehearsal else self.images, seed=self.seed)
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


def require_float(model: DiT) -> None:
    """Refuse packed layers."""
    packed = len(model.config.linears)
    require(not packed, f"prune_width needs float weights, and {packed} layers are packed: put it before quantize")


def branches(model: DiT, name: str) -> list[Branch]:
    """The branches of a name, one per block, refused where they are not the kind that can be cut."""
    from ..training import importance

    require_float(model)
    require(not (reason := importance.uncuttable(model, name)), f"prune_width {reason}")
    return importance.branches(model, name)


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
    from ..models.surgery import block_macs

    def told(config: DiTConfig) -> tuple[list[int], list[int]]:
        return [block.mlp_width for block in config.blocks], [block.heads for block in config.blocks]

    (units_before, heads_before), (units, heads) = told(before), told(after)
    macs_kept = block_macs(after, units, heads) / block_macs(before, units_before, heads_before)
    return {"units_removed": sum(units_before) - sum(units), "heads_removed": sum(heads_before) - sum(heads),
            "mlp_widths": units, "heads": heads, "block_macs_kept": round(macs_kept, 4)}
