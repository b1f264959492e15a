"""Does it pay to keep float weights in oneDNN's own layout, and to embed patches by a product?

    python -m benchmarks.prepacked --models bundled S/2 --images 1 8

Whole guided DDIM runs of the compiled bfloat16 model on a CPU. `ratio` is how many times faster slimdit runs it (b)
than the same model is (a) with its weights as they are stored and its patches embedded by a convolution, as PyTorch
compiles it, and as PyTorch compiles it with its weights frozen, its own way to lay them out. `error` is how far the
latents of the two are apart. A preset has random weights, which no time depends on.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from slimdit import pipeline as module
from slimdit.pipeline import Pipeline, Runtime
from slimdit.sampling.settings import Sampling

from .int8 import opened, relative
from .result import compare, settle, show
from .sampling_run import whole


def main() -> None:
    parser = argparse.ArgumentParser(description="Time compiled float models by how weights lie.")
    parser.add_argument("--models", nargs="+", default=["bundled", "S/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    show("prepacked", [row for name, images in product(options.models, options.images)
                       for row in measure(name, images, options.steps, options.rounds)])


def measure(name: str, images: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model and number of images."""
    plain = opened(name)
    pipeline = plain.replace(runtime=Runtime("bfloat16", compile=True), sampling=Sampling("ddim", steps, guidance=1.5))
    ours = pipeline.copy()
    whole(ours, images)
    rows = []
    for called, freezing in (("as stored", False), ("frozen", True)):
        other = stored(pipeline)
        with torch._inductor.config.patch(freezing=freezing):
            before = whole(other, images)  # compiled so
        rows.append({"model": name, "images": images, "steps": steps, "a": called, "b": "prepacked",
                     **compare(lambda other=other: whole(other, images), lambda: whole(ours, images), rounds),
                     "error": relative(whole(ours, images), before)})
    return rows


def stored(pipeline: Pipeline) -> Pipeline:
    """A copy whose model is run with the layers that it is saved with."""
    other = pipeline.copy()
    with patch.object(module, "prepack"):
        assert other.denoise  # prepared now, once and for all
    return other


if __name__ == "__main__":
    settle()
    main()
