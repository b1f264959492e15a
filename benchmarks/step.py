"""Does it pay to compile a whole step, guidance and the solver's arithmetic too, rather than the model alone?

    python -m benchmarks.step --models bundled S/2 --images 1 8

Whole guided DDIM runs with adaLN computed ahead, in the machine's best float type and on a CPU in int8. `ratio` is how
many times faster the run is whose step is one compiled function (b; on a GPU one CUDA graph) than slimdit's own, which
compiles the model (a). `error` is how far the latents of the two are apart. A preset has random weights, which no time
depends on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimdit.context import Context
from slimdit.formats import load
from slimdit.methods.compile import Compile
from slimdit.methods.quantize import Quantize
from slimdit.models.execution import compiled
from slimdit.models.modulation import Modulations
from slimdit.pipeline import Pipeline
from slimdit.sampling.seeds import ImageNoise, image_labels
from slimdit.sampling.settings import Sampling
from slimdit.sampling.solvers import timesteps

from .int8 import random_model, relative
from .result import compare, settle, show
from .sampling_run import whole

GUIDANCE = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Time runs whose whole step is compiled.")
    parser.add_argument("--models", nargs="+", default=["bundled", "S/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    show("step", [row for name, images in product(options.models, options.images)
                  for row in measure(name, images, options.steps, options.rounds)])


def measure(name: str, images: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model and number of images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = (load("bundled") if name == "bundled" else Pipeline(random_model(name))).to(device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        context = Context(plain, Path(folder), device=device)
        floats = Compile().apply(plain.replace(sampling=Sampling("ddim", steps, guidance=GUIDANCE)), context)
        for weights in (floats.runtime.dtype, "int8") if device == "cpu" else (floats.runtime.dtype,):
            ours = floats if weights != "int8" else Quantize(activations="int8").apply(floats.copy(), context)
            run = compiled_run(ours, images)
            rows.append({"model": name, "weights": weights, "images": images, "steps": steps,
                         **compare(lambda ours=ours: whole(ours, images), run, rounds),
                         "error": relative(run(), whole(ours, images))})
    return rows


def compiled_run(pipeline: Pipeline, images: int) -> Callable[[], Tensor]:
    """A DDIM run of which every step is one call of one compiled function; timestep and coefficients are its inputs."""
    config, denoise, ids = pipeline.model.config, pipeline.denoise, range(images)
    model, channels, device = denoise.model, config.channels, pipeline.device
    model.use_attention(denoise.form)
    visited = timesteps(pipeline.process, pipeline.sampling)
    shares = [*pipeline.process.alphas_cumprod[visited].tolist(), 1.0]
    coefficients = [torch.tensor([(1 - now) ** 0.5, now**0.5, following**0.5, (1 - following) ** 0.5]).to(device)
                    for now, following in pairwise(shares)]

    def step(x: Tensor, t: Tensor, y: Tensor, modulations: Tensor, by: Tensor) -> Tensor:
        output, without = model(torch.cat([x, x]).to(denoise.dtype), t, y, modulations).float().chunk(2)
        eps = torch.lerp(without[:, :channels], output[:, :channels], GUIDANCE)
        return by[2] * ((x - by[0] * eps) / by[1]) + by[3] * eps

    step = compiled(step, mode="reduce-overhead" if device.type == "cuda" else None)

    @torch.inference_mode()
    def run() -> Tensor:
        labels = image_labels(0, ids, config.classes)
        both = torch.cat([labels, torch.full_like(labels, config.classes)])
        ahead = Modulations(model, visited, both)
        x, both = ImageNoise(0, ids, (channels, *config.input_size)).draw().to(device), both.to(device)
        for place, t in enumerate(visited):
            ahead.seek(place)
            # A copy: a CUDA graph writes its next answer where it wrote this one.
            x = step(x, torch.full_like(both, t), both, ahead(both), coefficients[place]).clone()
        return x

    return run


if __name__ == "__main__":
    settle()
    torch.set_grad_enabled(False)
    main()
