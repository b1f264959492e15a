"""Load a model, make it cheaper by a recipe, and compare the two image by image.

    python examples/quickstart.py
    python examples/quickstart.py --model path/to/DiT.pt --images 16
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import slimdit
from slimdit.context import Context
from slimdit.methods import Quantize, ReduceSteps
from slimdit.metrics.cost import file_bytes, run_macs
from slimdit.metrics.paired import psnr, ssim
from slimdit.recipe import run


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a model cheaper and see what that changed.")
    parser.add_argument("--model", default="bundled", help="a path, 'bundled' or a Hub id")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        facts = compare(slimdit.load(options.model), options.images, options.steps, Path(folder))
    for name, value in facts.items():
        print(f"{name:<24}{value:.4g}")


def compare(pipeline: slimdit.Pipeline, images: int, steps: int, folder: Path) -> dict[str, float]:
    """Apply a recipe, save the result, load it again and set its images beside the original's."""
    recipe = slimdit.Recipe("quickstart", (ReduceSteps(steps=steps, solver="dpmpp_2m"), Quantize(weights="int8")))
    run(recipe, pipeline, Context(teacher=pipeline, folder=folder / "lean"))
    lean = slimdit.load(folder / "lean")
    for name, one in (("before", pipeline), ("after", lean)):
        slimdit.save(one, folder / name)

    # The same ids are the same noise and labels, so that image i of one belongs to image i of the other.
    before, after = pipeline.sample(range(images)), lean.sample(range(images))
    return {
        "PSNR, dB": float(psnr(after, before).mean()),
        "SSIM": float(ssim(after, before).mean()),
        "size ratio": file_bytes(folder / "before") / file_bytes(folder / "after"),
        "MACs per image, ratio": (run_macs(pipeline.model.config, pipeline.process, pipeline.sampling)
                                  / run_macs(lean.model.config, lean.process, lean.sampling)),
    }


if __name__ == "__main__":
    main()
