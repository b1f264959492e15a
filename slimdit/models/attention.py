"""Self-attention over the tokens of one image, in the forms that a block may choose.

Softmax attention is "Attention Is All You Need" (arXiv 1706.03762), equation 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from . import kernels
from .linear import Int8Dynamic

AttentionForm = Literal["fused", "explicit", "native"]


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention, the form every DiT is trained with.

    Parameters carry the names of the original DiT (`qkv`, `proj`), so its checkpoints load unchanged.

    `form` says how the same mathematics is executed: `"fused"` is PyTorch's scaled_dot_product_attention,
    `"explicit"` two matrix products around a softmax, which the compiler fuses better for short sequences on a
    CPU, and `"native"` is slimdit's own kernel for bfloat16 on some CPUs (`kernels.py`; fused for what it is not for).
    It is not part of the structure and never saved with the weights.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.form: AttentionForm = "fused"
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens: (batch, tokens, width) to the same shape."""
        batch, tokens, _ = x.shape
        if self.form == "native" and kernels.take(x):
            product, step, bias = unfinished(self.qkv, x)
            return self.proj(torch.ops.slimdit.attend(product, step, bias, batch, self.heads).view(batch, tokens, -1))
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, tokens, head_dim)
        mixed = attend(q, k, v, self.form)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


def unfinished(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A layer's rows before it multiplies them by their steps and adds its bias; of a float layer its rows alone."""
    if isinstance(layer, Int8Dynamic):
        return *layer.product(x), layer.bias
    return layer(x).flatten(0, -2), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v on (batch, heads, tokens, head_dim), fused or spelled out."""
    if form != "explicit":
        return nn.functional.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return torch.softmax(scores, dim=-1) @ v
