"""Self-attention over the tokens of one image, in the kinds that a block may choose.

Softmax attention is "Attention Is All You Need" (arXiv 1706.03762), equation 1. Heads may share keys and values in
groups (arXiv 2305.13245), down to one pair for all (multi-query, arXiv 1911.02150). Every kind may add a depth-wise
convolution of the values over the token grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from . import kernels
from .linear import Int8Dynamic

AttentionForm = Literal["fused", "explicit", "native"]
FOCUS = 3  # the power that focused attention sharpens features with, as published
TINY = 1e-6


class Attention(nn.Module):
    """What all kinds share: the projections around the mixing of tokens, and the optional convolution.

    Parameters carry the names of the original DiT (`qkv`, `proj`), so its checkpoints load unchanged. The convolution
    starts at zero: a trained model answers as before until it has learned something.

    `form` says how softmax is executed: `"fused"` is PyTorch's scaled_dot_product_attention, `"explicit"` two matrix
    products around a softmax, which the compiler fuses better for short sequences on a CPU, and `"native"` is slimdit's
    own kernel for plain softmax attention in bfloat16 on some CPUs (`kernels.py`; fused for what it is not for). It is
    not part of the structure and never saved with the weights.

    Args:
        kv_heads: heads of the keys and values, each shared by a group of `heads` / `kv_heads` heads; None is `heads`.
        conv: side of the convolution's kernel, odd; None is no convolution.
        grid: rows and columns of tokens, which the convolution and mediators need to know.
    """

    def __init__(self, width: int, heads: int, head_dim: int, *, kv_heads: int | None = None, conv: int | None = None,
                 grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads or heads
        self.head_dim = head_dim
        self.grid = grid
        self.form: AttentionForm = "fused"
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)
        self.conv = None if conv is None else idle_convolution(self.kv_heads * head_dim, conv)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens: (batch, tokens, width) to the same shape."""
        batch, tokens, _ = x.shape
        q, k, v = self.split(self.qkv(x))
        mixed = self.mix(q, k, v)
        if self.conv is not None:
            near = over_grid(self.conv, v, self.grid)
            mixed = mixed + (near if self.is_whole else near.repeat_interleave(self.heads // self.kv_heads, dim=1))
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))

    @property
    def is_whole(self) -> bool:
        """Whether every head has keys and values of its own."""
        return self.kv_heads == self.heads

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The features of every token to q (batch, heads, tokens, head_dim), and k and v with `kv_heads`."""
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each head of each token takes from the values: as q, (batch, heads, tokens, head_dim)."""
        raise NotImplementedError


class SoftmaxAttention(Attention):
    """softmax(q k^T / sqrt(head_dim)) v, the kind every DiT is trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """See `Attention`."""
        if self.form == "native" and is_plain(self) and kernels.take(x):
            product, step, bias = unfinished(self.qkv, x)
            return self.proj(torch.ops.slimdit.attend(product, step, bias, len(x), self.heads).view(*x.shape[:2], -1))
        return super().forward(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        return attend_grouped(q, k, v, self.form)


class MediatedAttention(Attention):
    """Softmax attention by way of mediators, which are q averaged over cells of the token grid.

    The mediators gather from all tokens, softmax(t k^T) v, and every token asks the mediators, softmax(q t^T)
    ("Agent Attention", arXiv 2312.08874; for a DiT arXiv 2408.05710). With m mediators that is 4 m instead
    of 2 n MACs a token and feature: worth it where m < n / 2.

    Args:
        mediators: rows and columns of mediators.
    """

    def __init__(self, width: int, heads: int, head_dim: int, *, mediators: tuple[int, int], grid: tuple[int, int],
                 kv_heads: int | None = None, conv: int | None = None) -> None:
        super().__init__(width, heads, head_dim, kv_heads=kv_heads, conv=conv, grid=grid)
        self.mediators = mediators

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        mediators = over_grid(lambda image: nn.functional.adaptive_avg_pool2d(image, self.mediators), q, self.grid)
        return attend(q, mediators, attend_grouped(mediators, k, v, self.form), self.form)


class FocusedAttention(Attention):
    """Linear attention: q and k become features that are never negative, whose products stand for softmax's weights.

    f(q) (sum over tokens of f(k)^T v) / (f(q) . sum of f(k)), with f of `focused` ("FLatten Transformer", arXiv
    2308.00442): the weights of every token sum to 1, and a token costs the same however many there
    are. Features are focused per token and head. The paper's learned scale of q and k is a scale of qkv's rows.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        q, k = focused(q), focused(k)
        state = k.transpose(-2, -1) @ (v / k.shape[-2])  # (batch, kv_heads, head_dim, head_dim); means stay small
        asked = in_groups(q, self.kv_heads)
        mixed = asked @ state / (asked @ k.mean(-2).unsqueeze(-1) + TINY)
        return mixed.reshape(q.shape)


def is_plain(attention: nn.Module) -> bool:
    """Whether it is softmax attention as every DiT is published with: no shared keys, no convolution."""
    return type(attention) is SoftmaxAttention and attention.is_whole and attention.conv is None


def focused(x: Tensor) -> Tensor:
    """relu(x), its last dimension turned towards its largest entries: cubed, at the length it had."""
    x = torch.relu(x)
    length = x.norm(dim=-1, keepdim=True)
    sharp = (x / (length + TINY)) ** FOCUS
    return sharp * (length / (sharp.norm(dim=-1, keepdim=True) + TINY))


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


def attend_grouped(q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
    """`attend` where groups of q's heads share a head of k and v."""
    return attend(in_groups(q, k.shape[1]), k, v, form).reshape(q.shape)


def in_groups(q: Tensor, kv_heads: int) -> Tensor:
    """(batch, heads, tokens, head_dim) to (batch, kv_heads, heads / kv_heads x tokens, head_dim).

    Heads that share keys and values are no more than further tokens that ask them.
    """
    return q if q.shape[1] == kv_heads else q.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def over_grid(change: Callable[[Tensor], Tensor], x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Apply what changes an image to tokens: (batch, heads, tokens, head_dim) to the same with other tokens."""
    if grid is None:
        raise ValueError("attention: a convolution or mediators need to know the grid of tokens: name it")
    batch, heads, _, head_dim = x.shape
    image = x.transpose(2, 3).reshape(batch, heads * head_dim, *grid)
    return change(image).reshape(batch, heads, head_dim, -1).transpose(2, 3)


def idle_convolution(channels: int, side: int) -> nn.Conv2d:
    """A depth-wise convolution that answers zero until it has learned."""
    conv = nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
