"""Store linear layers as 8-bit integers, and multiply integers too where asked: a quarter of the bytes.

Weights symmetric per output channel, activations per token as they come ("LLM.int8()", arXiv 2208.07339). Activations
change their range along the timesteps, so no range is fixed beforehand (Q-DiT, arXiv 2406.17343, section 3).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..context import Context, matching, require

if TYPE_CHECKING:
    from ..pipeline import Pipeline

KINDS = {("int8", None): "int8_weight_only", ("int8", "int8"): "int8_dynamic"}
MODULATION = "adaLN_modulation"


@dataclass(frozen=True)
class Quantize:
    """Round linear layers to int8.

    Attributes:
        weights: numbers the weights are stored as.
        activations: numbers the layers' inputs are rounded to, or None to multiply in the runtime's precision. adaLN
            runs once per image, not per token, and amplifies errors: its activations always stay as they are.
        layers: patterns of module names, such as `"blocks.*.mlp.*"`. The default leaves the embedders and the final
            layer as they are.
        skip: patterns of module names to leave out of those.

    Raises:
        ValueError: a kind of number is not supported.
    """

    weights: Literal["int8"] = "int8"
    activations: Literal["int8"] | None = None
    layers: tuple[str, ...] = ("blocks.*",)
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.weights, self.activations) not in KINDS:
            raise ValueError(f"quantize: weights {self.weights!r} with activations {self.activations!r} are not "
                             'supported; weights can be "int8", activations "int8" or left out')

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Pack the chosen layers."""
        from ..models.surgery import pack_linears, packable_linears, weight_bytes

        model = pipeline.model
        require(not model.config.linears, f"quantize needs float weights, and {len(model.config.linears)} layers are "
                                          "packed already: quantize once, from the float model")
        names = packable_linears(model)
        chosen = (matching(self.layers, names, "quantize: layers")
                  - matching(self.skip, names, "quantize: skip"))
        kinds = {name: self.kind(name) for name in names if name in chosen}
        before = weight_bytes(model)
        pack_linears(model, kinds)
        context.witness(layers=dict(Counter(kinds.values())), layers_left_float=len(names) - len(kinds),
                        bytes_before=before, bytes_after=weight_bytes(model))
        return pipeline.replace(model=model)

    def kind(self, name: str) -> str:
        """The kind of layer that `models/linear.py` has for this one."""
        return KINDS[self.weights, None if MODULATION in name else self.activations]
