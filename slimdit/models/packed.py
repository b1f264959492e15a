"""What packed linear layers share: few bits instead of floats, and numbers that a cast of the model leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from .rounding import Grid, Rounded


class PackedLinear(nn.Module):
    """A linear layer that stores its weights in fewer bits than a float, and turns them back to multiply.

    A kind of layer registers its buffers in `__init__`, empty, on the given device: its output is then 0. `dequantize`
    says what weights they mean. A kind whose numbers a `Grid` describes also has `store`, and can then be rounded by
    everything in `rounding.py`.

    Attributes:
        EXACT: buffers that keep their type when the model is cast; a cast would cost more than the packing does.
        GRID: the integers its weights become, or None where they are not integers.
    """

    EXACT: ClassVar[tuple[str, ...]] = ("scale",)
    GRID: ClassVar[Grid | None] = None

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    @classmethod
    @torch.no_grad()
    def of_rounded(cls, linear: nn.Linear, rounded: Rounded, **options: int) -> Self:
        """The layer of a float layer's sizes and bias that holds these integers."""
        packed = cls.like(linear, **options)
        packed.store(rounded)
        return packed

    @classmethod
    @torch.no_grad()
    def like(cls, linear: nn.Linear, **options: int) -> Self:
        """An empty layer of a float layer's sizes, device and bias."""
        packed = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device, **options)
        if packed.bias is not None:
            packed.bias = nn.Parameter(linear.bias.detach().clone())
        return packed

    @property
    def group(self) -> int:
        """How many weights of a row share a scale."""
        return self.in_features

    def store(self, rounded: Rounded) -> None:
        """Hold these integers with their scales and zeros."""
        raise TypeError(f"{type(self).__name__} holds no integers")

    def dequantize(self) -> Tensor:
        """The weights as the layer means them: float32, (out_features, in_features)."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its weights mean")

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self.EXACT}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype != tensor.dtype:  # a cast: keep the numbers, follow the device
                setattr(self, name, tensor.to(now.device))
        return self
