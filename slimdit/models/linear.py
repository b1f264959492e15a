"""Linear layers by what they store: float numbers, packed 8-bit integers, two thin matrices for a large one.

Weights are symmetric per output channel, W ~ scale[:, None] * weight with weight in -127..127; activations, where they
are integers too, symmetric per token ("LLM.int8()", arXiv 2208.07339, equation 4, without its outliers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

LEVELS = 127  # -128 is left out, so that the scale is symmetric
TINY = torch.finfo(torch.float32).tiny  # smallest scale: a row or token of zeros stays zeros


class Int8WeightOnly(nn.Module):
    """A linear layer of int8 weights that multiplies in the precision of its input.

    `weight` is int8 (out, in), `scale` float32 (out,), `bias` float. Empty until loaded or made by `of`: its output is
    then 0. `scale` stays float32 when the model is cast; bfloat16 would cost it more than the int8 weights do.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

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

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)

    def dequantize(self) -> Tensor:
        """The weights as the layer means them: float32, (out_features, in_features)."""
        return self.weight * self.scale[:, None]

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # a cast: keep the numbers, follow the device
            self.scale = scale.to(self.scale.device)
        return self


class Int8Dynamic(Int8WeightOnly):
    """A linear layer of int8 weights that also rounds its input to int8, token by token, and multiplies integers."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        tokens, token_scale = quantize_rows(x.reshape(-1, self.in_features))
        product = integer_matmul(tokens, self.weight).float() * (token_scale * self.scale)
        if self.bias is not None:
            product = product + self.bias
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)


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


LINEARS: Mapping[str, type[Int8WeightOnly]] = {"int8_weight_only": Int8WeightOnly, "int8_dynamic": Int8Dynamic}
"""Kinds of packed linear layers, by the name that `DiTConfig.linears` gives."""


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row rounded to integers of its own scale: (n, d) to int8 (n, d) and float32 (n, 1)."""
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / LEVELS).clamp(min=TINY)
    return (rows.float() / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


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
    set_linear(model, name, empty(float_linear(model, name), linear_kind(name, kind)))


def pack_linear(model: nn.Module, name: str, kind: str) -> None:
    """Quantize the float layer called `name` to a kind, in place.

    Raises:
        ValueError: the kind is unknown, or `name` is not a float linear layer of the model.
    """
    set_linear(model, name, linear_kind(name, kind).of(float_linear(model, name)))


def empty(linear: nn.Linear, kind: type[Int8WeightOnly]) -> nn.Module:
    """A layer of a kind with a float layer's sizes and device."""
    return kind(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device)


def linear_kind(name: str, kind: Any) -> type[Int8WeightOnly]:
    """The class of a kind."""
    if kind not in LINEARS:
        raise ValueError(f"{name}: linear kind {kind!r} is unknown; use one of {', '.join(LINEARS)}")
    return LINEARS[kind]


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
