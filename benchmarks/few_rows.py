"""A few rows times int8 weights: read as integers against turned to bfloat16 first.

    python -m benchmarks.few_rows

`ratio` is how many times faster reading the integers (b) is than turning them to floats (a), for adaLN's layer of a
width: its rows are the images of a batch. slimdit reads integers up to `FEW_ROWS` rows (`slimdit/models/linear.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from slimdit.models import linear
from slimdit.models.linear import Int8WeightOnly
from slimdit.models.packed import PackedLinear

from .result import compare, settle, show

LAYERS = 12  # of a model, called one after another: their weights do not stay in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description="Time products of a few rows with int8 weights.")
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 384, 768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    linear.FEW_ROWS = max(options.batches)  # to see where the limit belongs
    show("few_rows", [measure(width, batch, options.rounds)
                      for width, batch in product(options.widths, options.batches)])


@torch.inference_mode()
def measure(width: int, batch: int, rounds: int) -> dict[str, Any]:
    """Both ways through twelve layers."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # it compiles a function eight times and no more
    layers = [Int8WeightOnly.of(nn.Linear(width, 6 * width)).bfloat16() for _ in range(LAYERS)]
    x = torch.randn(batch, width).bfloat16()

    def through(forward: Callable[[Int8WeightOnly, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        return torch.compile(lambda: [forward(layer, x) for layer in layers], dynamic=False)

    return {"width": width, "rows": batch, "a": "floats", "b": "integers",
            **compare(through(PackedLinear.forward), through(Int8WeightOnly.forward), rounds)}


if __name__ == "__main__":
    settle()
    main()
