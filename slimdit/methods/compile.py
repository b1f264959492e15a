"""Run the same model through PyTorch's compiler in the precision that the hardware multiplies fastest.

Nothing about the weights changes; a saved model can be run either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..context import Context

if TYPE_CHECKING:
    from ..pipeline import Dtype, Pipeline

DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMS = ("auto", "fused", "explicit", "native")


@dataclass(frozen=True)
class Compile:
    """Compile the model.

    Attributes:
        dtype: of weights and activations while sampling; `"auto"` is bfloat16 where the hardware has it natively.
        attention: form of softmax attention; `"auto"` chooses by device and number of tokens.

    Raises:
        ValueError: an option is unknown.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "fused", "explicit", "native"] = "auto"

    def __post_init__(self) -> None:
        for option, allowed in (("dtype", DTYPES), ("attention", FORMS)):
            if getattr(self, option) not in allowed:
                raise ValueError(f"compile: {option} {getattr(self, option)!r} is unknown; use one of "
                                 f"{', '.join(allowed)}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Choose the precision and turn the compiler on."""
        from ..pipeline import Runtime

        runtime = Runtime(dtype=self.precision(context.device), compile=True, attention=self.attention)
        context.witness(dtype=runtime.dtype, dtype_before=pipeline.runtime.dtype)
        return pipeline.replace(runtime=runtime)

    def precision(self, device: str) -> Dtype:
        """The precision that `dtype` means on a device."""
        from ..training.loop import uses_bf16

        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if uses_bf16("auto", device) else "float32"
