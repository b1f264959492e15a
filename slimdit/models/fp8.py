"""Linear layers of 8-bit floats that also round their input, row by row, and multiply 8-bit floats.

float8_e4m3fn with a float32 scale per output channel and per token ("FP8 Formats for Deep Learning", arXiv 2209.05433).
It needs a GPU with 8-bit float products, compute capability 8.9 or newer; what it gains there, and from which size on,
`benchmarks/gpu.py` measures.
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

    `ordinary` says that the input's numbers are of ordinary size, so that they are rounded as they are, without a look
    at each token's largest. Who runs the model chooses it, and it is never saved.
    """

    EXACT = ("weight", "scale")
    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.register_buffer("weight", torch.zeros(out_features, in_features, device=device).to(FP8))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.ordinary = False

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
        rows = x.reshape(-1, self.in_features)
        tokens, step = as_they_are(rows) if self.ordinary else float8_rows(rows)
        bias = self.bias
        if multiplies_float8(tokens, self.weight):
            # A product adds a bias of its own type at no cost. Fast accumulation keeps some bits fewer than float32 of
            # a sum, which does not show beside the rounding to 8 bits, and is what makes the product fast.
            inside, bias = (bias, None) if x.dtype == torch.bfloat16 else (None, bias)
            product = torch._scaled_mm(tokens, self.weight.t(), scale_a=step, scale_b=self.scale[None], bias=inside,
                                       out_dtype=torch.bfloat16, use_fast_accum=True)
        else:
            product = (tokens.float() * step) @ self.dequantize().t()
        if bias is not None:
            product = product + bias
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """The weights as the layer means them: float32, (out_features, in_features)."""
        return self.weight.float() * self.scale[:, None]


def as_they_are(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each number rounded to the nearest float8, beyond 448 to that: (n, d) to float8 (n, d), and scales of 1, (n, 1).

    These floats have exponents: from 1/64 to 448 they are as exact without a scale as with one.
    """
    return rows.clamp(-LARGEST, LARGEST).to(FP8), torch.ones(len(rows), 1, device=rows.device)


def float8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row rounded to float8 under its own scale: (n, d) to float8 (n, d) and float32 (n, 1)."""
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=TINY)
    # One division a row, not one a number; the clamp is for the rounding of that reciprocal.
    return (rows.float() * (1 / scale)).clamp(-LARGEST, LARGEST).to(FP8), scale


def multiplies_float8(a: Tensor, b: Tensor) -> bool:
    """Whether the device has a product of 8-bit floats, a scale per row, for (n, d) and (m, d)."""
    return (a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) >= CAPABILITY
            and a.shape[0] > 0 and a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0)
