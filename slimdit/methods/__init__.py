"""Methods: one file changes a pipeline in one way. Add yours: a frozen dataclass with `apply`, and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from .cache_blocks import CacheBlocks
from .compile import Compile
from .distill import Distill
from .distill_guidance import DistillGuidance
from .finetune import Finetune
from .low_rank_adaln import LowRankAdaln
from .prune_depth import PruneDepth
from .prune_weights import PruneWeights
from .prune_width import PruneWidth
from .quantize import Quantize
from .reduce_steps import ReduceSteps
from .simplify_attention import SimplifyAttention
from .sparse_experts import SparseExperts

if TYPE_CHECKING:
    from ..context import Context
    from ..pipeline import Pipeline


class Method(Protocol):
    """What a recipe is made of. Its fields are its options, checked as it is made."""

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """The changed pipeline. May change the given model in place: the caller uses what is returned.

        Raises:
            Refused: the pipeline is not one this method can change; the sentence says what to do instead.
        """


METHODS: Mapping[str, type] = {
    "prune_depth": PruneDepth,
    "prune_width": PruneWidth,
    "low_rank_adaln": LowRankAdaln,
    "simplify_attention": SimplifyAttention,
    "sparse_experts": SparseExperts,
    "reduce_steps": ReduceSteps,
    "prune_weights": PruneWeights,
    "finetune": Finetune,
    "distill": Distill,
    "distill_guidance": DistillGuidance,
    "quantize": Quantize,
    "cache_blocks": CacheBlocks,
    "compile": Compile,
}
"""Methods by the name a recipe gives."""
