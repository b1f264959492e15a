"""Refitting a timestep embedder to the frequencies diffusers uses, so that plain diffusers gives the same outputs.

The original DiT spaces its 128 frequencies as 10000^(-k/128), diffusers' DiTTransformer2DModel as 10000^(-k/127) and
has no option for it. docs/design/0002-diffusers-timesteps.md says what this can and cannot reach, with numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..models.dit import TimestepEmbedder, timestep_features

DIFFUSERS_SHIFT = 1
PENALTIES = (1e-9, 1e-2, 1.0)  # on how far the first layer moves
SHARES = (0.0, 1e-4, 1e-2)  # how much a timestep outside the schedule weighs beside one in it
ROUNDING = 3e-6  # relative; deviations below this are the rounding of float32, and no reason to prefer a fit


@dataclass(frozen=True)
class Refit:
    """An embedder on diffusers' frequencies and its largest deviation from the original, in float32.

    Attributes:
        scheduled: over the timesteps of the schedule.
        anywhere: over all timesteps of the process.
        size: largest magnitude of the original embedding, to compare with.
    """

    embedder: TimestepEmbedder
    scheduled: float
    anywhere: float
    size: float


@torch.no_grad()
def refit(embedder: TimestepEmbedder, schedule: Sequence[int], steps: int) -> Refit:
    """The embedder with both its linear layers moved as little as gives the same vectors at the schedule's timesteps.

    Layer by layer in float64, a penalised least-squares fit each. The first layer alone has 257 inputs, of
    which the frequencies leave some 80 usable at even spacing; the second then absorbs what is left, one timestep per
    unit of width. A few penalties are tried, and the fit that deviates least in float32 is kept.
    """
    timesteps = torch.arange(steps)
    scheduled = torch.zeros(steps, dtype=torch.bool)
    scheduled[torch.tensor(list(schedule))] = True
    target = embedder(timesteps)
    size = float(target.abs().max())

    def measured(penalty: float, share: float) -> Refit:
        candidate = fit(embedder, timesteps, torch.where(scheduled, 1.0, share).double(), penalty)
        deviation = (candidate(timesteps) - target).abs().amax(dim=1)
        return Refit(candidate, float(deviation[scheduled].max()), float(deviation.max()), size)

    floor = ROUNDING * size
    return min((measured(penalty, share) for penalty, share in product(PENALTIES, SHARES)),
               key=lambda found: (max(found.scheduled, floor), found.anywhere))


def fit(embedder: TimestepEmbedder, timesteps: Tensor, weight: Tensor, penalty: float) -> TimestepEmbedder:
    """The embedder on diffusers' frequencies, fitted at the timesteps by their weights."""
    original = copy.deepcopy(embedder).double()
    fitted = copy.deepcopy(embedder)
    fitted.frequency_shift = DIFFUSERS_SHIFT
    hidden = original.mlp[0](_features(original, timesteps))
    _move(fitted.mlp[0], _features(fitted, timesteps), hidden, weight, penalty)
    # The second layer is fitted to what the first gives once rounded to float32.
    ready = fitted.mlp[1](fitted.mlp[0](_features(fitted, timesteps).float())).double()
    _move(fitted.mlp[2], ready, original.mlp[2](original.mlp[1](hidden)), weight, 1e-13)
    return fitted


def _features(embedder: TimestepEmbedder, timesteps: Tensor) -> Tensor:
    return timestep_features(timesteps, embedder.frequency_shift).double()


def _move(layer: Any, inputs: Tensor, outputs: Tensor, weight: Tensor, penalty: float) -> None:
    """Give a layer the weights and bias nearest to its own that map inputs to outputs: ridge regression of the rest."""
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)  # the last column is the bias
    now = torch.cat([layer.weight, layer.bias[:, None]], dim=1).double()
    used = weight > 0
    left, values, right = torch.linalg.svd(inputs[used] * weight[used, None], full_matrices=False)
    residual = (outputs - inputs @ now.T)[used] * weight[used, None]
    moved = now + (right.T @ ((values / (values ** 2 + penalty))[:, None] * (left.T @ residual))).T
    layer.weight.copy_(moved[:, :-1])
    layer.bias.copy_(moved[:, -1])
