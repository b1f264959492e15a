"""How equal a model's timestep embedding stays when its embedder is refitted to diffusers' frequencies.

    python -m benchmarks.diffusers_timesteps [MODEL ...]

For embedders of random weights, and those of the models named: the largest deviation at the timesteps of the schedule,
at any of the 1000, and what it is without a refit; each relative to the embedding's largest value.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from slimdit import formats
from slimdit.formats.timesteps import DIFFUSERS_SHIFT, refit
from slimdit.models.dit import TimestepEmbedder
from slimdit.sampling.process import NoiseProcess
from slimdit.sampling.solvers import Sampling, timesteps

from .result import show


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Refit timestep embedders to diffusers' frequencies.")
    parser.add_argument("models", nargs="*", help="models whose embedders to refit beside random ones")
    parser.add_argument("--widths", type=int, nargs="*", default=[32, 128, 256, 384, 768, 1152])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100, 250, 1000])
    options = parser.parse_args()
    embedders = {f"random, width {width}": randomised(width) for width in options.widths}
    embedders |= {source: formats.load(source).model.t_embedder for source in options.models}
    show("diffusers_timesteps", [measure(name, embedder, steps) for name, embedder in embedders.items()
                                 for steps in options.steps])


def randomised(width: int) -> TimestepEmbedder:
    """An embedder that keeps the magnitude of what goes through it."""
    generator, embedder = torch.Generator().manual_seed(0), TimestepEmbedder(width, 0)
    for parameter in embedder.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return embedder


def measure(name: str, embedder: TimestepEmbedder, steps: int) -> dict[str, Any]:
    """The deviations of one refit, and of the weights taken as they are."""
    process = NoiseProcess()
    found = refit(embedder, timesteps(process, Sampling(steps=steps)), process.steps)
    verbatim = TimestepEmbedder(embedder.mlp[2].out_features, DIFFUSERS_SHIFT)
    verbatim.load_state_dict(embedder.state_dict())
    t = torch.arange(process.steps)
    deviations = {"scheduled": found.scheduled, "anywhere": found.anywhere,
                  "without_refit": float((verbatim(t) - embedder(t)).abs().max())}
    return {"embedder": name, "steps": steps,
            **{key: float(f"{value / found.size:.2g}") for key, value in deviations.items()}}


if __name__ == "__main__":
    main()
