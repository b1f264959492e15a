"""A recipe's whole sampling run against the way DiT was published: eager float32, 250 DDPM steps, a doubled batch.

    python -m benchmarks.historical --models bundled S/2 --recipes lean

Every step of the published way takes as long as any other, so some are timed and the rest is reckoned: `a_seconds` is
of all 250. It computes adaLN in every step. `eager float32` is PyTorch's own products, which leave the vectors of some
processors unused; `packed float32` uses them, by oneDNN, its weights laid out for that beforehand; `eager TF32` is what
a GPU's tensor cores make of it. All are what a speed-up is often quoted against, and none is what slimdit calls its
baseline: that is the compiled model in its best float type at 50 DDIM steps. A recipe that trains is trained first, on
the data that it names, so it is for models of such data. A preset has random weights, on which no time depends, and
timesteps that are not searched, on which none does either: what the recipe costs in quality is measured on the bundled
model by `slimdit bench`.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimdit.context import Context
from slimdit.formats import load
from slimdit.methods.compile import Compile
from slimdit.methods.reduce_steps import ReduceSteps
from slimdit.models.linear import set_linear
from slimdit.pipeline import Pipeline, Runtime
from slimdit.recipe import Recipe, find, run
from slimdit.sampling.settings import Sampling

from .int8 import opened
from .result import compare, settle, show
from .sampling_run import whole

STEPS = 250  # of the published way
RUNS = (("bundled", "lean"), ("bundled", "lean-6"), ("bundled", "guided-lean"), ("S/2", "lean"), ("S/2", "lean-6"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time recipes against DiT's published way of sampling.")
    parser.add_argument("--models", nargs="+", default=["bundled"])
    parser.add_argument("--recipes", nargs="+", help="each with every model, instead of some that are told apart")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--timed", type=int, default=4, help="steps of the published way that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    runs = product(options.models, options.recipes) if options.recipes else RUNS
    show("historical", [row for model, recipe in runs
                        for row in measure(model, recipe, options.images, options.timed, options.rounds)])


def measure(model: str, recipe: str, images: int, timed: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model and recipe."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = opened(model, device)
    guidance = 1.5 if model == "bundled" else 4.0
    published = plain.replace(sampling=Sampling("ddpm", timed, "respaced", guidance=guidance))
    eager = published.replace(runtime=Runtime())
    with tempfile.TemporaryDirectory() as folder:
        context = Context(plain, Path(folder), device=device)
        baseline = Compile().apply(plain.replace(sampling=Sampling("ddim", 50, guidance=guidance)), context)
        with torch.enable_grad():  # it may train
            chosen = find(recipe) if model == "bundled" else unsearched(find(recipe))
            run(chosen, baseline, Context(baseline, Path(folder, "recipe"), device=device))
        ours = load(Path(folder, "recipe")).to(device)
        others = {"eager float32": lambda: whole(eager, images, eager.denoise),
                  **({"eager TF32": in_tf32(lambda: whole(eager, images, eager.denoise))} if device == "cuda" else
                     {"packed float32": partial(whole, eager, images, packed(eager))})}
        rows = [{"a": f"{name}, {STEPS} DDPM steps",
                 **reckoned(compare(other, lambda: whole(ours, images), rounds), timed)}
                for name, other in others.items()]
        best = f"compiled {baseline.runtime.dtype}, 50 DDIM steps"
        rows.append({"a": best, **compare(lambda: whole(baseline, images), lambda: whole(ours, images), rounds)})
    return [{"model": model, "images": images, "b": recipe, **row} for row in rows]


def unsearched(recipe: Recipe) -> Recipe:
    """The recipe with its steps where their spacing puts them."""
    return replace(recipe, methods=tuple(replace(method, search=0) if isinstance(method, ReduceSteps) else method
                                         for method in recipe.methods))


def packed(pipeline: Pipeline) -> nn.Module:
    """The model with oneDNN's products in the place of PyTorch's own."""
    model = copy.deepcopy(pipeline.model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not name.startswith("t_embedder"):  # which is asked for its parameters
            set_linear(model, name, PackedFloat(layer))
    return model


class PackedFloat(nn.Module):
    """A float linear layer whose weights lie as oneDNN's product wants them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def in_tf32(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with float32 products in TF32, as DiT's published script allows them on a GPU."""
    def wrapped() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return wrapped


def reckoned(times: dict[str, Any], timed: int) -> dict[str, Any]:
    """What was timed of some steps, of all."""
    more = STEPS / timed
    scaled = {name: float(f"{times[name] * more:.4g}") for name in ("ratio", "low", "high", "a_seconds")}
    return {**times, **scaled, "steps_timed": timed}


if __name__ == "__main__":
    settle()
    torch.set_grad_enabled(False)
    main()
