"""What it gains on a CPU to launch a compiled model's kernels from C++ instead of Python.

    python -m benchmarks.launches --models bundled XS/4 S/2 --images 1 8

Whole guided DDIM runs of the compiled model in bfloat16 and in int8. `ratio` is how many times faster slimdit's run
is (b) than the same run is as PyTorch compiles it unasked (a). A preset has random weights, which no time depends on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from slimdit import pipeline as module
from slimdit.context import Context
from slimdit.methods.quantize import Quantize
from slimdit.models.execution import compiled
from slimdit.pipeline import Runtime
from slimdit.sampling.settings import Sampling

from .int8 import opened
from .result import compare, settle, show
from .sampling_run import whole

WEIGHTS = ("bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time compiled models by what launches their kernels.")
    parser.add_argument("--models", nargs="+", default=["bundled", "XS/4", "S/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    show("launches", [row for name, images in product(options.models, options.images)
                      for row in measure(name, images, options.weights, options.steps, options.rounds)])


def measure(name: str, images: int, all_weights: Sequence[str], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model and number of images."""
    plain = opened(name)
    floats = plain.replace(runtime=Runtime("bfloat16", compile=True), sampling=Sampling("ddim", steps, guidance=1.5))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for weights in all_weights:
            ours = floats.copy()
            if weights == "int8":
                ours = Quantize(activations="int8").apply(ours, Context(plain, Path(folder)))
            other = ours.copy()
            with patch.object(module, "compiled", partial(compiled, mode="default")):
                whole(other, images)  # compiled so
            rows.append({"model": name, "weights": weights, "images": images, "steps": steps, "a": "Python", "b": "C++",
                         **compare(partial(whole, other, images), partial(whole, ours, images), rounds)})
    return rows


if __name__ == "__main__":
    settle()
    torch.set_grad_enabled(False)
    main()
