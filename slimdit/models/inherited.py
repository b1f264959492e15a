"""A new attention that begins with the weights of a trained one, so that it need not learn everything again."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Attention
from .dit import BlockConfig, attention_of


@torch.no_grad()
def inherited(old: Attention, block: BlockConfig, grid: tuple[int, int]) -> Attention:
    """The attention of a block's config with the projections of plain softmax attention of as many heads.

    Where heads come to share keys and values, these are the means of the group's ("GQA", arXiv 2305.13245, section
    2.1). A convolution starts at zero.

    Args:
        grid: rows and columns of tokens.
    """
    new = attention_of(old.qkv.in_features, block, grid).to(old.qkv.weight).eval()
    q, k, v = parts(old)
    fill(new, q, *(part.unflatten(0, (new.kv_heads, -1)).mean(1) for part in (k, v)))
    new.proj.load_state_dict(old.proj.state_dict())
    return new


@torch.no_grad()
def narrowed(old: Attention, block: BlockConfig, grid: tuple[int, int], mean: Tensor, spread: Tensor) -> Attention:
    """Plain softmax attention at the smaller `head_dim` of a block's config, by truncated singular values.

    Of every head, scores and answers depend on Wq^T Wk and Wo Wv alone: each product is replaced by the nearest of the
    smaller rank on inputs of this mean and covariance. A key's part that is the same for all tokens leaves softmax as
    it is; a value's goes into the projection's bias.

    Args:
        mean, spread: (width,) and (width, width), of what the attention is given.
    """
    new = attention_of(old.qkv.in_features, block, grid).to(old.qkv.weight).eval()
    rank, mean, spread = block.head_dim, mean.double(), spread.double()
    given = torch.cat([mean, mean.new_ones(1)])  # the bias's input is 1
    second = torch.nn.functional.pad(spread, (0, 1, 0, 1)) + torch.outer(given, given)
    q, k, v = (part.double() for part in parts(old))  # (heads, head_dim, width + 1)

    # q^T k becomes (U_r^T A^-1 q)^T (U_r^T A k), where A A = E q q^T and U are the left vectors of A cov(k)^(1/2).
    ask, unask = roots(q @ second @ q.mT)
    answer, _ = roots(k[..., :-1] @ spread @ k[..., :-1].mT)
    most = torch.linalg.svd(ask @ answer)[0][..., :rank]
    scale = (rank / old.head_dim) ** 0.5  # softmax divides by the root of another head_dim now
    new_q, new_k = most.mT @ unask @ q * scale, most.mT @ ask @ k

    # Wo v becomes U_r (U_r^T Wo v), where U are the left vectors of Wo cov(v)^(1/2).
    out = old.proj.weight.double().unflatten(1, (old.heads, -1)).transpose(0, 1)  # (heads, width, head_dim)
    spoken, _ = roots(v[..., :-1] @ spread @ v[..., :-1].mT)
    new_out = torch.linalg.svd(out @ spoken, full_matrices=False)[0][..., :rank]
    new_v = new_out.mT @ out @ v
    lost = (out @ v - new_out @ new_v) @ given  # (heads, width), the same for every token

    fill(new, new_q, new_k, new_v)
    new.proj.weight.copy_(new_out.transpose(0, 1).flatten(1))
    new.proj.bias.copy_(old.proj.bias + lost.sum(0))
    return new


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of positive semi-definite matrices, (..., n, n), and their pseudo-inverses."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0).sqrt()
    kept = values > 1e-6 * values.amax(-1, keepdim=True)
    inverse = torch.where(kept, 1 / values.clamp(min=1e-300), 0.0)
    return vectors * values[..., None, :] @ vectors.mT, vectors * inverse[..., None, :] @ vectors.mT


def parts(attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of q, k and v with the bias as a last column: (heads or kv_heads, head_dim, width + 1)."""
    rows = torch.cat([attention.qkv.weight, attention.qkv.bias[:, None]], dim=1).unflatten(0, (-1, attention.head_dim))
    q, k, v = rows.split([attention.heads, attention.kv_heads, attention.kv_heads])
    return q, k, v


def fill(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Give an attention these weights, as `parts` has them."""
    rows = torch.cat([q, k, v]).flatten(0, 1)
    attention.qkv.weight.copy_(rows[:, :-1])
    attention.qkv.bias.copy_(rows[:, -1])
