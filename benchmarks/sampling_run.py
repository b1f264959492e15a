"""Whole sampling runs of the int8 model: adaLN computed ahead against step by step, and against other engines.

    python -m benchmarks.sampling_run --presets S/2 B/2 --images 1 4

Guided DDIM: the model sees two rows for every image. `ratio` is how many times faster slimdit's int8 (b) is than the
other (a), from noise to the last latent, with what is computed ahead. OpenVINO, where it is installed, is called by
the same solver, with the same weights. Weights are random, which no time depends on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from slimdit.pipeline import Pipeline
from slimdit.sampling.seeds import ImageNoise, image_labels
from slimdit.sampling.settings import Sampling
from slimdit.sampling.solvers import solve

from .int8 import openvino, pipelines
from .result import compare, settle, show

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time whole sampling runs in int8.")
    parser.add_argument("--presets", nargs="+", default=["S/2", "B/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    show("sampling_run", [row for name, images in product(options.presets, options.images)
                          for row in measure(name, images, options.steps, options.rounds)])


def measure(name: str, images: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one preset and number of images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pipelines(name, device, sampling=Sampling("ddim", steps, guidance=4.0)) as (plain, baseline, ours):
        config = plain.model.config
        both = (torch.zeros(2 * images, config.channels, *config.input_size),
                torch.zeros(2 * images, dtype=torch.int64), torch.zeros(2 * images, dtype=torch.int64))
        engines: dict[str, Model] = openvino(plain, both) if device == "cpu" else {}
        runs = {
            f"compiled {baseline.runtime.dtype}, ahead": lambda: whole(baseline, images),
            f"compiled {baseline.runtime.dtype}, step by step": lambda: whole(baseline, images, baseline.denoise),
            "slimdit int8, step by step": lambda: whole(ours, images, ours.denoise),
            **{called: lambda engine=engine: whole(plain, images, engine) for called, engine in engines.items()}}
        return [{"model": name, "images": images, "steps": steps, "a": other, "b": "slimdit int8, ahead",
                 **compare(run, lambda: whole(ours, images), rounds)} for other, run in runs.items()]


@torch.inference_mode()
def whole(pipeline: Pipeline, images: int, model: Model | None = None) -> Tensor:
    """Latents of the first images: as the pipeline makes them, or by a model called step by step."""
    config, ids = pipeline.model.config, range(images)
    noise = ImageNoise(0, ids, (config.channels, *config.input_size))
    labels = image_labels(0, ids, config.classes)
    if model is None:
        return pipeline.latents(noise, labels)
    return solve(model, pipeline.process, pipeline.sampling, noise, labels, null_class=config.classes,
                 learn_sigma=config.learn_sigma, device=pipeline.device)


if __name__ == "__main__":
    settle()
    main()
