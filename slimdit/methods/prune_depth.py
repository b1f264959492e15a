"""Leave whole blocks out: the one cut that saves its full share of time on any machine.

A block only adds to its tokens, so that any of them can go. What recovers well afterwards is not what hurts least at
first (TinyFusion, arXiv 2412.01199, which also learns the choice).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..context import Context, require

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline import Pipeline

BARE = 0.15  # share of blocks that may go before quality needs training afterwards


@dataclass(frozen=True)
class PruneDepth:
    """Keep some of the blocks.

    Attributes:
        keep: how many blocks stay; None keeps all.
        how: which ones: `"even"`, the first, the last and those evenly between them; `"greedy"`, one block goes after
            the other, each time the one without which the output changes least; `"taylor"`, those go without which the
            loss changes least to first order; `"learned"`, a choice is learned by gradient (see `learned_scores`).
            Where training follows, `"even"` recovers better than the choices by output or loss.
        images: images to calibrate on; `"even"` needs none.
        steps: of the learned choice.
        seed: of the images' noise and of the learned choice.

    Raises:
        ValueError: a number is below 1, or the choice is unknown.
    """

    keep: int | None = None
    how: Literal["even", "greedy", "taylor", "learned"] = "even"
    images: int = 16
    steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in CHOOSE:
            raise ValueError(f"prune_depth: how {self.how!r} is unknown; use one of {', '.join(CHOOSE)}")
        for name in ("keep", "images", "steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"prune_depth: {name} must be a whole number of at least 1, not {value!r}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Choose blocks and cut the others out."""
        from ..models.surgery import keep_blocks

        model = pipeline.model
        depth, packed = len(model.blocks), len(model.config.linears)
        require(not packed, f"prune_depth needs float weights, and {packed} layers are packed: put it before quantize")
        keep = depth if self.keep is None else self.keep
        require(keep <= depth, f"prune_depth would keep {keep} blocks of a model that has {depth}: keep fewer")
        method = replace(self, images=2, steps=2) if context.rehearsal else self  # the twin's numbers mean nothing
        kept = list(range(depth)) if keep == depth else CHOOSE[self.how](method, keep, pipeline, context)
        keep_blocks(model, kept)
        warning = self.warning(depth - keep, depth)
        if warning:
            context.report(f"prune_depth: {warning}")
        context.witness(how=self.how, blocks_before=depth, blocks_removed=depth - keep, kept=kept,
                        **({"warning": warning} if warning else {}))
        return pipeline.replace(model=model)

    def warning(self, removed: int, depth: int) -> str:
        """What to know before so many blocks go; empty where few do."""
        if removed <= BARE * depth:
            return ""
        # A method does not see what comes after it: whether the recipe trains is for its author to know.
        said = f"{removed} of {depth} blocks go, and beyond {BARE:.0%} quality holds only with training afterwards"
        return said if self.how == "even" else f'{said}, for which how = "even" is the better start'


def even(method: PruneDepth, keep: int, pipeline: Pipeline, context: Context) -> list[int]:
    """The first, the last, and what is evenly between; one block is the first."""
    from ..models.surgery import even_blocks

    return even_blocks(len(pipeline.model.blocks), keep)


def greedy(method: PruneDepth, keep: int, pipeline: Pipeline, context: Context) -> list[int]:
    """One block after the other goes: the one without which the output on deployed calls changes least."""
    import torch

    from ..training.calibration import deployed_calls, output_error, outputs
    from ..training.gradients import gated

    model = pipeline.model
    calls = deployed_calls(pipeline, images=method.images, seed=method.seed)
    expected = outputs(model, calls)

    def error(kept: list[int]) -> float:
        gates = torch.zeros(len(model.blocks), device=pipeline.device)
        gates[kept] = 1
        with gated(model, gates):
            return output_error(model, calls, expected)

    kept = list(range(len(model.blocks)))
    while len(kept) > keep:
        kept = min(([number for number in kept if number != gone] for gone in kept), key=error)
        context.report(f"prune_depth: {len(kept)} blocks left, keeping {keep}")
    return kept


def taylor(method: PruneDepth, keep: int, pipeline: Pipeline, context: Context) -> list[int]:
    """The blocks whose gate the loss is steepest in: |d loss / d gate| at 1, averaged over batches of all timesteps."""
    import torch

    from ..training.gradients import gated, loss_batches, loss_gradients

    model = pipeline.model
    batches = loss_batches(pipeline, context.data, images=method.images, seed=method.seed)
    gates = torch.ones(len(model.blocks), device=pipeline.device, requires_grad=True)
    with gated(model, gates):
        slopes = [slope.abs() for slope, in loss_gradients(model, pipeline.process, batches, [gates])]
    return highest(torch.stack(slopes).mean(0), keep)


def learned(method: PruneDepth, keep: int, pipeline: Pipeline, context: Context) -> list[int]:
    """The blocks with the highest learned scores."""
    from ..training.gradients import learned_scores, loss_batches

    batches = loss_batches(pipeline, context.data, images=method.images, seed=method.seed)
    scores = learned_scores(pipeline.model, pipeline.process, batches, keep, steps=method.steps, seed=method.seed)
    return highest(scores, keep)


def highest(scores: Tensor, keep: int) -> list[int]:
    """Places of the highest scores, ascending; of equal ones the first."""
    return sorted(scores.argsort(descending=True, stable=True)[:keep].tolist())


CHOOSE: Mapping[str, Callable[[PruneDepth, int, Pipeline, Context], list[int]]] = {
    "even": even, "greedy": greedy, "taylor": taylor, "learned": learned,
}
"""Ways to choose by the name that `how` gives."""
