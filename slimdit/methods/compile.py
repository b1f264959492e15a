"""Run the same model through a compiler in the precision that the hardware multiplies fastest.

PyTorch's, or OpenVINO, which is the faster one on a CPU where an image is few rows. Nothing about the weights changes;
a saved model can be run either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..context import Context, require

if TYPE_CHECKING:
    from ..pipeline import Dtype, Pipeline

DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMS = ("auto", "fused", "explicit", "native")
ENGINES = ("torch", "openvino")


@dataclass(frozen=True)
class Compile:
    """Compile the model.

    Attributes:
        dtype: of weights and activations while sampling; `"auto"` is bfloat16 where the hardware has it natively.
        attention: form of softmax attention; `"auto"` chooses by device and number of tokens.
        engine: whose compiler; `"openvino"` is for CPUs, and needs `pip install 'slimdit[openvino]'`.

    Raises:
        ValueError: an option is unknown, or the engine does not have it.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "fused", "explicit", "native"] = "auto"
    engine: Literal["torch", "openvino"] = "torch"

    def __post_init__(self) -> None:
        for option, allowed in (("dtype", DTYPES), ("attention", FORMS), ("engine", ENGINES)):
            if getattr(self, option) not in allowed:
                raise ValueError(f"compile: {option} {getattr(self, option)!r} is unknown; use one of "
                                 f"{', '.join(allowed)}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Choose the precision and turn the compiler on."""
        from ..pipeline import Runtime

        if self.engine == "openvino":
            require_openvino(context)
        runtime = Runtime(self.precision(context.device), compile=True, attention=self.attention, engine=self.engine)
        context.witness(dtype=runtime.dtype, dtype_before=pipeline.runtime.dtype, engine=runtime.engine)
        return pipeline.replace(runtime=runtime)

    def precision(self, device: str) -> Dtype:
        """The precision that `dtype` means on a device."""
        from ..training.loop import uses_bf16

        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if uses_bf16("auto", device) else "float32"


def require_openvino(context: Context) -> None:
    """Refuse OpenVINO on a GPU, and where it is not installed."""
    from ..models import openvino

    require(context.rehearsal or context.device == "cpu",
            f"compile: OpenVINO runs on a CPU here, and this is {context.device}: use the engine torch")
    try:
        openvino.library()
    except ImportError as error:
        require(False, f"compile: {error}")
