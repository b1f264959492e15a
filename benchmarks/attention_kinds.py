"""Kinds of attention against softmax in each of its forms, from few tokens to many.

    python -m benchmarks.attention_kinds

`ratio` is how many times faster the kind (b) is than softmax attention in the form that `against` names (a): above 1,
the kind wins. `slope` is that of log time over log tokens between the two longest sequences: 1 where a token costs the
same however many there are, 2 where it asks each of them. `crossover` is the fewest tokens from which on the kind was
faster than every form of softmax, its interval above 1; null where it never was.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from slimdit.methods.simplify_attention import mediator_grid
from slimdit.models.attention import AttentionForm
from slimdit.models.dit import BlockConfig, attention_of

from .attention import forms
from .result import compare, settle, show

KINDS: Mapping[str, Mapping[str, Any]] = {
    "softmax": {}, "softmax conv": {"conv": 3}, "mediated": {"attention": "mediated"},
    "focused": {"attention": "focused"}, "focused conv": {"attention": "focused", "conv": 3},
    "focused multi_query": {"attention": "focused", "kv_heads": 1}, "grouped": {"kv_heads": 2},
    "multi_query": {"kv_heads": 1}, "shallow": {"shallow": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time kinds of attention against softmax attention.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32", "float16"], default=["bfloat16"])
    parser.add_argument("--modes", nargs="+", choices=["compiled", "eager"], default=["compiled"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--mediators", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = []
    for mode, dtype, kind in product(options.modes, options.dtypes, options.kinds):
        measured = [row for tokens in sorted(options.tokens)
                    for row in measure(kind, tokens=tokens, dtype=dtype, compiled=mode == "compiled", options=options)]
        rows += [{**row, "slope": slope(measured), "crossover": crossover(measured)} for row in measured]
    show("attention_kinds", rows)


@torch.inference_mode()
def measure(kind: str, *, tokens: int, dtype: str, compiled: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one layer of a kind, its projections included, against softmax of the same sizes in each form there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    width = options.heads * options.head_dim
    x = torch.randn(options.batch, tokens, width, device=device, dtype=getattr(torch, dtype))
    plain = BlockConfig(options.heads, options.head_dim, width)
    block = described(kind, plain, grid_of(tokens), options.mediators)
    rows = []
    for against in ("fused", *forms(dtype)):
        times = compare(layer(plain, x, against, compiled), layer(block, x, "fused", compiled), options.rounds)
        rows.append({"kind": kind, "against": against, "tokens": tokens, "dtype": dtype, "compiled": compiled,
                     "batch": options.batch, "heads": options.heads, "head_dim": options.head_dim, **times})
    return rows


def described(kind: str, plain: BlockConfig, grid: tuple[int, int], mediators: int) -> BlockConfig:
    """The config of a block with a kind's attention."""
    changes = dict(KINDS[kind])
    if changes.pop("shallow", False):
        changes["head_dim"] = plain.head_dim // 2
    if changes.get("attention") == "mediated":
        changes["mediators"] = mediator_grid(grid, mediators)
    return replace(plain, **changes)


def grid_of(tokens: int) -> tuple[int, int]:
    """The squarest grid of so many tokens."""
    rows = max(side for side in range(1, math.isqrt(tokens) + 1) if tokens % side == 0)
    return rows, tokens // rows


def layer(block: BlockConfig, x: Tensor, form: AttentionForm, compiled: bool) -> Callable[[], Tensor]:
    """A call of a block's attention on x, (batch, tokens, width)."""
    attention = attention_of(x.shape[-1], block, grid_of(x.shape[1])).to(x.device, x.dtype).eval()
    attention.form = form
    forward = torch.compile(attention, dynamic=False) if compiled else attention
    return lambda: forward(x)


def slope(rows: list[dict[str, Any]]) -> float | None:
    """Of log time over log tokens between the two longest sequences; None where there is one."""
    times = {row["tokens"]: row["b_seconds"] for row in rows if row["against"] == "fused"}
    if len(times) < 2:
        return None
    short, long = sorted(times)[-2:]
    return round(math.log(times[long] / times[short]) / math.log(long / short), 3)


def crossover(rows: list[dict[str, Any]]) -> int | None:
    """The fewest tokens from which on the kind was faster than softmax in every form."""
    first = None
    for tokens in sorted({row["tokens"] for row in rows}, reverse=True):
        if min(row["low"] for row in rows if row["tokens"] == tokens) <= 1:
            break
        first = tokens
    return first


if __name__ == "__main__":
    settle()
    main()
