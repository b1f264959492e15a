"""What it gains to compile a whole step, guidance and the solver's arithmetic too, rather than the model alone.

    python -m benchmarks.step --models bundled S/2 --images 1 8

Whole guided runs with adaLN computed ahead, in the machine's best float type and on a CPU in int8. `ratio` is how many
times faster slimdit's own run is (b), of which every step is one compiled function (on a GPU one CUDA graph), than one
whose model alone is compiled (a). `error` is how far the latents of the two are apart. A preset has random weights,
which no time depends on.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimdit.context import Context
from slimdit.methods.compile import Compile
from slimdit.methods.quantize import Quantize
from slimdit.models.modulation import Modulations
from slimdit.pipeline import Pipeline
from slimdit.sampling.seeds import ImageNoise, image_labels
from slimdit.sampling.settings import SOLVERS, Sampling
from slimdit.sampling.solvers import solve, timesteps

from .int8 import opened, relative
from .result import compare, settle, show
from .sampling_run import whole


def main() -> None:
    parser = argparse.ArgumentParser(description="Time runs whose whole step is compiled.")
    parser.add_argument("--models", nargs="+", default=["bundled", "S/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=["ddim"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    show("step", [row for name, images, solver in product(options.models, options.images, options.solvers)
                  for row in measure(name, images, Sampling(solver, options.steps, guidance=1.5), options.rounds)])


def measure(name: str, images: int, sampling: Sampling, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model, number of images and solver."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = opened(name, device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        context = Context(plain, Path(folder), device=device)
        floats = Compile().apply(plain.replace(sampling=sampling), context)
        for weights in (floats.runtime.dtype, "int8") if device == "cpu" else (floats.runtime.dtype,):
            ours = floats if weights != "int8" else Quantize(activations="int8").apply(floats.copy(), context)
            alone, one = partial(model_alone, ours, images), partial(whole, ours, images)
            rows.append({"model": name, "weights": weights, "images": images, "solver": sampling.solver,
                         "steps": sampling.steps, **compare(alone, one, rounds), "error": relative(one(), alone())})
    return rows


@torch.inference_mode()
def model_alone(pipeline: Pipeline, images: int) -> Tensor:
    """The latents of a run that calls the compiled model, and does the rest of a step operation by operation."""
    config, denoise, ids = pipeline.model.config, pipeline.denoise, range(images)
    labels = image_labels(0, ids, config.classes)
    ahead = Modulations(denoise.model, timesteps(pipeline.process, pipeline.sampling),
                        torch.cat([labels, labels.new_tensor([config.classes])]))
    return solve(lambda x, t, y: denoise(x, t, y, ahead(y)), pipeline.process, pipeline.sampling,
                 ImageNoise(0, ids, (config.channels, *config.input_size)), labels, null_class=config.classes,
                 learn_sigma=config.learn_sigma, device=pipeline.device, progress=ahead.seek)


if __name__ == "__main__":
    settle()
    torch.set_grad_enabled(False)
    main()
