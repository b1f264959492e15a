"""Forms of the same softmax attention: PyTorch's fused kernel, two matrix products around a softmax, a kernel of ours.

    python -m benchmarks.attention

`ratio` is how many times faster a form (b) is than the fused one (a). It decides what `Runtime(attention="auto")` means
(`attention_form` and `EXPLICIT_TOKENS` in `slimdit/pipeline.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from slimdit.models import kernels
from slimdit.models.attention import AttentionForm, SoftmaxAttention

from .result import compare, settle, show


def main() -> None:
    settle()
    parser = argparse.ArgumentParser(description="Time the forms of softmax attention.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32", "float16"],
                        default=["bfloat16", "float32"])
    parser.add_argument("--modes", nargs="+", choices=["compiled", "eager"], default=["compiled", "eager"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    rows = [measure(form, tokens=tokens, dtype=dtype, compiled=mode == "compiled", batch=options.batch,
                    heads=options.heads, head_dim=options.head_dim, rounds=options.rounds)
            for mode, dtype, tokens in product(options.modes, options.dtypes, options.tokens) for form in forms(dtype)]
    show("attention", rows)


def forms(dtype: str) -> list[AttentionForm]:
    """What there is besides the fused form."""
    native = dtype == "bfloat16" and not torch.cuda.is_available() and not kernels.missing()
    return ["explicit", *(["native"] if native else [])]


@torch.inference_mode()
def measure(form: AttentionForm, *, tokens: int, dtype: str, compiled: bool, batch: int, heads: int, head_dim: int,
            rounds: int) -> dict[str, Any]:
    """Time a form and the fused one of an attention layer, projections included, on the same weights and input."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    width = heads * head_dim
    x = torch.randn(batch, tokens, width, device=device, dtype=getattr(torch, dtype))
    fused, other = (attention(one, x, heads, head_dim, compiled) for one in ("fused", form))
    return {"tokens": tokens, "dtype": dtype, "compiled": compiled, "batch": batch, "heads": heads,
            "head_dim": head_dim, "a": "fused", "b": form, **compare(fused, other, rounds)}


def attention(form: AttentionForm, x: Tensor, heads: int, head_dim: int, compiled: bool) -> Callable[[], Tensor]:
    """A call of one attention layer on x, (batch, tokens, width)."""
    layer = SoftmaxAttention(x.shape[-1], heads, head_dim).to(x.device, x.dtype).eval()
    layer.form = form
    forward = torch.compile(layer, dynamic=False) if compiled else layer
    return lambda: forward(x)


if __name__ == "__main__":
    main()
