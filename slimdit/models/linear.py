"""Linear layers by what they store: float numbers, packed 8-bit integers, two thin matrices for a large one.

The kinds of packed layers are these and those of int4.py and fp8.py.

Weights are symmetric per output channel, W ~ scale[:, None] * weight with weight in -127..127; activations, where they
are integers too, symmetric per token ("LLM.int8()", arXiv 2208.07339, equation 4, without its outliers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import kernels
from .fp8 import Fp8Dynamic
from .int4 import Int4WeightOnly
from .packed import PackedLinear
from .rounding import INT8, Rounded

LEVELS = 127  # -128 is left out, so that the scale is symmetric
ZERO = 128  # where 0 lies among the unsigned levels of a CPU's product
# Whether oneDNN multiplies 8-bit integers here at full speed and without saturating: on a CPU with VNNI.
FAST_PRODUCT = torch.backends.mkldnn.is_available() and bool(torch.cpu._is_vnni_supported())
FEW_ROWS = 4  # up to which weights are read as integers: benchmarks/few_rows.py
READS_INTEGERS = torch.backends.cpu.get_cpu_capability() == "AVX512"  # whether PyTorch has a quick product for it
VECTOR = 16  # floats of AVX-512
TINY = torch.finfo(torch.float32).tiny  # smallest scale: a row or token of zeros stays zeros


class Int8WeightOnly(PackedLinear):
    """A linear layer of int8 weights that multiplies in the precision of its input.

    `weight` is int8 (out, in), `scale` float32 (out,), `bias` float. Empty until loaded or made by `of`: its output is
    then 0. `scale` stays float32 when the model is cast; bfloat16 would cost it more than the int8 weights do.
    """

    GRID = INT8
    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> Self:
        """The layer with a float layer's weights, rounded to the nearest of 255 levels per output channel."""
        packed = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device)
        weight, scale = quantize_rows(linear.weight)
        packed.weight, packed.scale = weight, scale[:, 0]
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.detach().clone())
        return packed

    def store(self, rounded: Rounded) -> None:
        """Hold these integers with their scales."""
        self.weight, self.scale = rounded.codes.to(torch.int8), rounded.scale[:, 0]

    def dequantize(self) -> Tensor:
        """The weights as the layer means them: float32, (out_features, in_features)."""
        return self.weight * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        rows = x.reshape(-1, self.in_features)
        if reads_integers(rows):
            product = torch.ops.slimdit.few_rows_product(rows, self.weight)
        elif torch.compiler.is_compiling() or x.dtype == torch.float16:  # one fused pass; what would overflow
            return super().forward(x)
        else:  # bfloat16 holds the integers as they are: one pass over the weights instead of three
            product = nn.functional.linear(rows, self.weight.to(x.dtype))
        product = product * self.scale
        product = product if self.bias is None else product + self.bias
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)


class Int8Dynamic(Int8WeightOnly):
    """A linear layer of int8 weights that also rounds its input to int8, token by token, and multiplies integers."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features, bias, device)
        if FAST_PRODUCT:
            provide_product()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.finished(*self.product(x), x)

    def product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded x times the weights, without bias, and the steps of x's rows that are left to multiply by.

        Returns:
            (n, out_features), in bfloat16 where x is and in float32 otherwise, and (n, 1), float32.
        """
        rows = x.reshape(-1, self.in_features)
        if FAST_PRODUCT and x.device.type == "cpu":
            levels, step = shifted_rows(rows)
            return self.product_of_levels(levels, x.dtype), step
        integers, step = quantize_rows(rows)
        return integer_matmul(integers, self.weight).float() * self.scale, step

    def product_of_levels(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        """The same of a row's unsigned levels, for a float model of `dtype`: (n, out_features)."""
        # bfloat16 halves what is written, and its rounding is a third of what int8 itself costs.
        dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return torch.ops.slimdit.int8_product(levels, self.weight, self.scale, dtype)

    def finished(self, product: Tensor, step: Tensor, x: Tensor) -> Tensor:
        """What the layer answers to x, given its product: (..., out_features), of x's type."""
        rows = product.float() * step
        if self.bias is not None:
            rows = rows + self.bias
        return rows.to(x.dtype).view(*x.shape[:-1], self.out_features)


class Int8Static(Int8WeightOnly):
    """A linear layer of int8 weights that rounds its input on one grid for all tokens and timesteps, fixed beforehand.

    `step` is float32 (1,) and `zero` uint8 (1,): x becomes round(x / step) + zero in 0..255 ("Quantization and Training
    of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877, equation 1). Here it is
    computed in floats; `execution.prepack` puts `PrepackedInt8` in its place.
    """

    EXACT = ("scale", "step")
    step: Tensor
    zero: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.register_buffer("step", torch.full((1,), 1 / LEVELS, device=device))
        self.register_buffer("zero", torch.full((1,), ZERO, dtype=torch.uint8, device=device))

    def rounded(self, x: Tensor) -> Tensor:
        """x as the layer sees it: float32, of x's shape."""
        return (static_levels(x, 1 / self.step, self.zero).float() - self.zero) * self.step

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        rows = self.rounded(x) @ self.dequantize().t()
        return (rows if self.bias is None else rows + self.bias).to(x.dtype)


LINEARS: Mapping[str, type[PackedLinear]] = {
    "int8_weight_only": Int8WeightOnly, "int8_dynamic": Int8Dynamic, "int8_static": Int8Static,
    "int4_weight_only": Int4WeightOnly, "fp8_dynamic": Fp8Dynamic}
"""Kinds of packed linear layers, by the name that `DiTConfig.linears` gives; int4's has its groups after it, as in
"int4_weight_only:128"."""


class Prepacked(nn.Module):
    """A float layer to run and not to save: its weights are in oneDNN's own layout alone (`kernels.prepacked_linear`).

    Args:
        weight: (out_features, in_features), bfloat16, on a CPU that `kernels` are for.
        bias: (out_features,), or None.
    """

    handle: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.register_buffer("handle", torch.zeros(1), persistent=False)
        torch.ops.slimdit.prepack_linear(weight.detach(), self.handle)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """(..., in_features) to (..., out_features), or to the tanh-approximated GELU of it."""
        rows = torch.ops.slimdit.prepacked_linear(x.reshape(-1, self.in_features), self.handle, self.bias,
                                                  self.out_features, gelu)
        return rows.view(*x.shape[:-1], self.out_features)


class PrepackedInt8(nn.Module):
    """An `Int8Static` to run and not to save, on CPUs that `kernels` are for: bias, GELU and the rounding for the next
    layer are parts of its product.
    """

    handle: Tensor
    inverse: Tensor
    shift: Tensor

    def __init__(self, layer: Int8Static) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.step, self.zero = layer.step.item(), int(layer.zero)
        self.register_buffer("handle", torch.zeros(1), persistent=False)
        # A tensor, where the step is a number: layers then share the compiled code that rounds.
        self.register_buffer("inverse", 1 / layer.step, persistent=False)
        self.register_buffer("shift", layer.zero.float(), persistent=False)
        torch.ops.slimdit.prepack_int8(layer.weight, layer.scale * layer.step,
                                       None if layer.bias is None else layer.bias.detach(), self.handle)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.of_levels(self.levels(x)).view(*x.shape[:-1], self.out_features)

    def levels(self, x: Tensor) -> Tensor:
        """What x is rounded to: uint8, (n, in_features)."""
        return static_levels(x.reshape(-1, self.in_features), self.inverse, self.shift)

    def of_levels(self, levels: Tensor) -> Tensor:
        """The layer's answer to levels of its input, (n, in_features): bfloat16, (n, out_features)."""
        return torch.ops.slimdit.static_linear(levels, self.handle, self.zero, self.out_features)

    def gelu_levels(self, x: Tensor, following: PrepackedInt8) -> Tensor:
        """What the GELU of the answer to x is to the layer that follows it: uint8, (n, out_features)."""
        return torch.ops.slimdit.static_gelu_levels(self.levels(x), self.handle, self.zero, self.out_features,
                                                    following.step, following.zero)


class GeluLinear(nn.Linear):
    """A float layer to run on a GPU: the GELU behind it is a part of the product, not a pass over its output."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The layer with the weights of another, shared."""
        layer = cls(linear.in_features, linear.out_features, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """(..., in_features) to (..., out_features), or to the tanh-approximated GELU of it."""
        if not gelu:
            return super().forward(x)
        rows = torch.ops.slimdit.gelu_linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)


class LowRank(nn.Module):
    """Two linear layers that stand for one of low rank: x to `up`(`down`(x)), the bias in `up`.

    It stores rank (in + out) weights for in x out.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.up(self.down(x))


def reads_integers(rows: Tensor) -> bool:
    """Whether a product of these rows reads int8 weights as they are sooner than it reads them turned to floats.

    On a CPU the weights' bytes are all that a few rows cost, as in adaLN, of which an image is a row. PyTorch's product
    reads them in whole vectors, past the end of a row that is none.
    """
    return (rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and 0 < len(rows) <= FEW_ROWS
            and rows.shape[1] % VECTOR == 0 and READS_INTEGERS)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row rounded to integers of its own scale: (n, d) to int8 (n, d) and float32 (n, 1)."""
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / LEVELS).clamp(min=TINY)
    return (rows.float() / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def shifted_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` with ZERO added: (n, d) to uint8 (n, d) and float32 (n, 1). x86 multiplies unsigned by signed."""
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / LEVELS).clamp(min=TINY)
    # One division a row, not one a number; the clamp is for the rounding of that reciprocal.
    return ((rows.float() * (1 / scale)).round().clamp(-LEVELS, LEVELS) + ZERO).to(torch.uint8), scale


def static_levels(x: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
    """round(x * inverse) + zero in 0..255, as uint8 of x's shape."""
    return ((x.float() * inverse).round() + zero).clamp(0, 255).to(torch.uint8)


PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weights in oneDNN's own layout, and their zero points, for as long as the weights themselves live."""


@cache
def provide_product() -> None:
    """See that there is an operator for the product: that of operators.cpp, or where it cannot be had the one below."""
    if kernels.missing():
        torch.library.impl("slimdit::int8_product", "cpu")(int8_product)


# Not torch.library.custom_op: its wrapping costs 60 us a call, and a model of 12 blocks makes 48 calls.
torch.library.define("slimdit::int8_product",
                     "(Tensor levels, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")


def int8_product(levels: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(levels - ZERO) (weight * scale)^T by oneDNN: uint8 (n, d), int8 (m, d), float32 (m,) to `dtype` (n, m).

    The compiler treats it as one operation, with no shape fixed: any batch runs on one packed copy of the weights.
    """
    if weight not in PACKED:
        PACKED[weight] = (torch.ops.onednn.qlinear_prepack(weight.contiguous(), None),
                          torch.zeros(len(weight), dtype=torch.int64))
    packed, zeros = PACKED[weight]
    return torch.ops.onednn.qlinear_pointwise(levels, 1.0, ZERO, packed, scale, zeros, None, 1.0, 0, dtype, "none", [],
                                              "")


@torch.library.register_fake("slimdit::int8_product")
def _(levels: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return levels.new_empty(levels.shape[0], weight.shape[0], dtype=dtype)


torch.library.define("slimdit::few_rows_product", "(Tensor rows, Tensor weight) -> Tensor")


@torch.library.impl("slimdit::few_rows_product", "cpu")
def few_rows_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows weight^T where the weights' bytes are all that it costs: bfloat16 (n, d), int8 (m, d) to bfloat16 (n, m)."""
    # PyTorch's product would take scales in bfloat16 only: it is given ones, and float32's can follow.
    return torch._weight_int8pack_mm(rows.contiguous(), weight, rows.new_ones(len(weight)))


@torch.library.register_fake("slimdit::few_rows_product")
def _(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


torch.library.define("slimdit::gelu_linear", "(Tensor rows, Tensor weight, Tensor bias) -> Tensor")


@torch.library.impl("slimdit::gelu_linear", "cuda")
def gelu_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(rows weight^T + bias) as one cuBLASLt call: (n, d), (m, d) and (m,) to (n, m).

    An operator of its own, since the compiler takes PyTorch's apart into a product and a pass.
    """
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)


@torch.library.register_fake("slimdit::gelu_linear")
def _(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact product a b^T of int8 matrices, (n, d) and (m, d): int32, (n, m)."""
    if multiplies_integers(a, b):
        return torch._int_mm(a, b.t())
    return (a.double() @ b.double().t()).to(torch.int32)  # sums stay far below 2^53


def multiplies_integers(a: Tensor, b: Tensor) -> bool:
    """Whether the device has an int8 product for these shapes: on CUDA, cuBLASLt's sizes only."""
    if a.device.type == "cuda":
        return a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0
    return a.device.type == "cpu" and a.shape[0] > 0


def replace_linear(model: nn.Module, name: str, kind: str) -> None:
    """Put an empty layer of a kind in the place of the float one called `name`.

    Raises:
        ValueError: the kind is unknown, or `name` is not a float linear layer of the model.
    """
    linear, (layer, options) = float_linear(model, name), linear_kind(name, kind)
    set_linear(model, name, layer(linear.in_features, linear.out_features, linear.bias is not None,
                                  linear.weight.device, **options))


def pack_linear(model: nn.Module, name: str, kind: str, rounded: Rounded | None = None) -> None:
    """Quantize the float layer called `name` to a kind, in place.

    Args:
        rounded: the integers to hold, instead of the nearest ones.

    Raises:
        ValueError: the kind is unknown, or `name` is not a float linear layer of the model.
    """
    linear, (layer, options) = float_linear(model, name), linear_kind(name, kind)
    set_linear(model, name, layer.of_rounded(linear, rounded, **options) if rounded else layer.of(linear, **options))


def linear_kind(name: str, kind: Any) -> tuple[Any, dict[str, int]]:
    """The `PackedLinear` class of a kind, and what the kind's name says besides, to build it with.

    Raises:
        ValueError: there is no such kind; `name` is the layer's.
    """
    if grouped := re.fullmatch(r"int4_weight_only:([1-9][0-9]{0,6})", str(kind)):
        return Int4WeightOnly, {"group": int(grouped[1])}
    if kind not in LINEARS or LINEARS[kind] is Int4WeightOnly:
        known = (f"{name}:GROUP" if layer is Int4WeightOnly else name for name, layer in LINEARS.items())
        raise ValueError(f"{name}: linear kind {kind!r} is unknown; use one of {', '.join(known)}")
    return LINEARS[kind], {}


def float_linear(model: nn.Module, name: str) -> nn.Linear:
    """The float layer of that name."""
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, nn.Linear):
        raise ValueError(f"the model has no float linear layer called {name!r} to replace")
    return found


def set_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer at a dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
