"""Linear layers of 8-bit floats that also round their input, row by row, and multiply 8-bit floats.

float8_e4m3fn with a float32 scale per output channel and per token ("FP8 Formats for Deep Learning", arXiv 2209.05433).
Nothing here has been measured yet: it needs a GPU with 8-bit float products, compute capability 8.9 or newer.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from .packed import PackedLinear
from .rounding import TINY

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
CAPABILITY = (8, 9)  # the first GPUs with 8-bit float products


class Fp8Dynamic(PackedLinear):
    """A linear layer of float8 weights that also rounds its input to float8, token by token.

    `weight` is float8_e4m3fn (out, in), `scale` float32 (out,). Where the device has no product of 8-bit floats for the
    shape, the same rounded numbers are multiplied in the precision of the input.
    """

    EXACT = ("weight", "scale")
    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.register_buffer("weight", torch.zeros(out_features, in_features, device=device).to(FP8))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> Self:
        """The layer with a float layer's weights, each row under a scale of its own."""
        packed = cls.like(linear)
        packed.weight, scale = float8_rows(linear.weight)
        packed.scale = scale[:, 0]
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        tokens, token_scale = float8_rows(x.reshape(-1, self.in_features))
        if multiplies_float8(tokens, self.weight):
            product = torch._scaled_mm(tokens, self.weight.t(), scale_a=token_scale, scale_b=self.scale[None],
                                       out_dtype=torch.bfloat16)
        else:
            product = (tokens.float() * token_scale) @ self.dequantize().t()
        if self.bias is not None:
            product = product + self.bias
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """The weights as the layer means them: float32, (out_features, in_features)."""
        return self.weight.float() * self.scale[:, None]


def float8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row rounded to float8 under its own scale: (n, d) to float8 (n, d) and float32 (n, 1)."""
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=TINY)
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def multiplies_float8(a: Tensor, b: Tensor) -> bool:
    """Whether the device has a product of 8-bit floats, a scale per row, for (n, d) and (m, d)."""
    return (a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) >= CAPABILITY
            and a.shape[0] > 0 and a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0)
