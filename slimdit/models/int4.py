"""Linear layers of 4-bit integers: two weights a byte, a scale and a zero per group of weights along a row.

Asymmetric groups of 128 are the least with which round-to-nearest keeps a DiT's images (Q-DiT, arXiv 2406.17343); one
scale per row does not.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from .packed import PackedLinear
from .rounding import INT4, Rounded, nearest


class Int4WeightOnly(PackedLinear):
    """A linear layer of 4-bit weights that multiplies in the precision of its input; fewer bytes, not less time.

    `weight` is uint8 (out, in / 2), rounded up, `scale` bfloat16 and `zero` float16 (out, in / group): 4.25 bits a
    weight at groups of 128. W ~ scale (q - zero), q in 0..15.

    Args:
        group: the most weights that share a scale. Groups are the largest equal parts of a row that are not longer, so
            that every row can be cut: 128 is 96 at 192 inputs.
    """

    EXACT = ("scale", "zero")
    GRID = INT4
    weight: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | str | None = None, group: int = 128) -> None:
        super().__init__(in_features, out_features, bias, device)
        self._group = fitting_group(in_features, group)
        groups = in_features // self._group
        self.register_buffer("weight", torch.zeros(out_features, -(-in_features // 2), dtype=torch.uint8,
                                                   device=device))
        self.register_buffer("scale", torch.ones(out_features, groups, dtype=INT4.scale, device=device))
        self.register_buffer("zero", torch.zeros(out_features, groups, dtype=INT4.zero, device=device))

    @classmethod
    def of(cls, linear: nn.Linear, group: int = 128) -> Self:
        """The layer with a float layer's weights, rounded to the nearest of 16 levels per group."""
        rounded = nearest(linear.weight, INT4, fitting_group(linear.in_features, group))
        return cls.of_rounded(linear, rounded, group=group)

    @property
    def group(self) -> int:
        """How many weights of a row share a scale."""
        return self._group

    def store(self, rounded: Rounded) -> None:
        """Hold these integers with their scales and zeros."""
        self.weight = pack(rounded.codes.to(torch.uint8))
        self.scale, self.zero = rounded.scale.to(INT4.scale), rounded.zero.to(INT4.zero)

    def dequantize(self) -> Tensor:
        """The weights as the layer means them: float32, (out_features, in_features)."""
        codes = unpack(self.weight, self.in_features)
        return Rounded(codes.float(), self.scale.float(), self.zero.float()).weight()


def fitting_group(in_features: int, most: int) -> int:
    """The largest number of weights up to `most` that cuts a row into equal groups."""
    return next(size for size in range(min(most, in_features), 0, -1) if in_features % size == 0)


def pack(codes: Tensor) -> Tensor:
    """Numbers in 0..15, uint8 (out, in), two a byte, the first in the low half: (out, in / 2), rounded up."""
    even = nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """What `pack` packed: uint8 (out, in_features)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :in_features]
