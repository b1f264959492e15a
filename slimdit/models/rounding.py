"""Which integers a matrix of weights becomes: to the nearest, or so that something that matters more stays close.

W ~ scale (codes - zero), per group of weights along a row. Three ways to choose:

* `nearest`: each weight to the nearest integer.
* `hqq`: zeros that keep the weights close in a norm that forgives outliers ("Half-Quadratic Quantization of Large
  Machine Learning Models", Badri and Shaji 2023, the half-quadratic splitting of its section on the solver).
* `gptq`: integers that keep the layer's *output* close on given inputs ("GPTQ", arXiv 2210.17323, algorithm 1).

Pure functions of tensors; nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # smallest scale: a group of zeros stays zeros
NORM = 0.7  # p of HQQ's norm, its authors' value
STRENGTH, GROWTH, ITERATIONS = 10.0, 1.01, 20  # HQQ's beta in steps of the grid, its factor per iteration, how many
DAMPING = 0.01  # of the mean of GPTQ's Hessian diagonal, the paper's value
COLUMNS = 128  # that GPTQ rounds before it tells the rest: for speed alone


class Grid(NamedTuple):
    """The integers that weights become, and how exactly a group's scale and zero are stored."""

    low: int
    high: int
    symmetric: bool  # a zero of 0, and a scale from the largest magnitude
    scale: torch.dtype = torch.float32
    zero: torch.dtype = torch.float32


INT8 = Grid(-127, 127, symmetric=True)  # -128 is left out, so that the scale is symmetric
# bfloat16 has float32's range, so that small weights keep their scale; float16 is finer, and a zero lies near 0..15.
INT4 = Grid(0, 15, symmetric=False, scale=torch.bfloat16, zero=torch.float16)


class Rounded(NamedTuple):
    """A matrix of weights as integers."""

    codes: Tensor  # (out, in), whole float32 numbers in low..high of the grid
    scale: Tensor  # (out, in / group), float32 numbers that the grid's type holds exactly
    zero: Tensor  # (out, in / group), likewise

    def weight(self) -> Tensor:
        """The weights that the integers mean: float32, (out, in)."""
        groups = self.codes.unflatten(1, (self.scale.shape[1], -1))
        return ((groups - self.zero[..., None]) * self.scale[..., None]).flatten(1)


def nearest(weight: Tensor, grid: Grid, group: int) -> Rounded:
    """Every weight, (out, in), to the nearest integer; `group` weights of a row share a scale."""
    groups = _grouped(weight, group)
    scale, zero = fit(groups, grid)
    return Rounded(encode(groups, scale, zero, grid).flatten(1), scale[..., 0], zero[..., 0])


def fit(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero, (..., 1), with which a grid spans groups of weights, (..., group), and 0."""
    if grid.symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / grid.high
        return _stored(scale, grid.scale).clamp(min=TINY), torch.zeros_like(scale)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = _stored((high - low) / (grid.high - grid.low), grid.scale).clamp(min=TINY)
    return scale, (grid.low - low / scale).round()


def encode(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest integers to weights under a scale and a zero."""
    return (groups / scale + zero).round().clamp(grid.low, grid.high)


def hqq(weight: Tensor, grid: Grid, group: int) -> Rounded:
    """Nearest integers under zeros moved to where sum |W - Wq|^p, p < 1, is smaller: never larger than `nearest`'s.

    W - Wq is split into a sparse part E and a rest. In turns: E = shrink(W - Wq), which keeps what is large, and
    zero = mean(codes - (W - E) / scale) over the group. Every group keeps the best zero it saw.

    Raises:
        ValueError: the grid is symmetric, and so has no zeros to move.
    """
    if grid.symmetric:
        raise ValueError("hqq moves zeros, and a symmetric grid has none: use nearest or gptq")
    groups = _grouped(weight, group)
    scale, zero = fit(groups, grid)
    steps = groups / scale  # weights in steps of the grid, so that STRENGTH means the same whatever their size
    best, least, strength = zero, _distance(steps, zero, grid), STRENGTH
    for _ in range(ITERATIONS):
        codes = (steps + zero).round().clamp(grid.low, grid.high)
        sparse = _shrink(steps - (codes - zero), strength)
        zero = _stored((codes - (steps - sparse)).mean(-1, keepdim=True), grid.zero)
        distance = _distance(steps, zero, grid)
        better = distance < least
        best, least = torch.where(better, zero, best), torch.where(better, distance, least)
        strength *= GROWTH
    return Rounded(encode(groups, scale, best, grid).flatten(1), scale[..., 0], best[..., 0])


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, group: int) -> Rounded:
    """Integers that keep X W^T close: each column's rounding error is made up for by the columns after it.

    Columns are taken in their own order, and a group's scale is fitted as the group is reached, to weights that have
    made up for the errors so far. Arithmetic is float64: the inverse of a Hessian of correlated inputs needs it.

    Args:
        weight: (out, in).
        hessian: (in, in), sum of x x^T over the inputs; its factor does not matter.
    """
    inverse = _inverse_factor(hessian)  # upper triangular: row i has what column i's error does to those after it
    left = weight.detach().double().clone()
    codes = torch.empty_like(left)
    scales, zeros = [], []
    for start in range(0, left.shape[1], COLUMNS):
        end = min(start + COLUMNS, left.shape[1])
        errors = torch.zeros_like(left[:, start:end])
        for column in range(start, end):
            if column % group == 0:
                # This block's errors have not reached the columns behind it yet, and a group may end among those.
                behind = left[:, column:column + group].clone()
                behind[:, max(end - column, 0):] -= errors @ inverse[start:end, end:max(column + group, end)]
                scale, zero = fit(behind.float(), grid)
                scales.append(scale)
                zeros.append(zero)
            values = left[:, column:column + 1]
            codes[:, column:column + 1] = encode(values, scale.double(), zero.double(), grid)
            rounded = (codes[:, column:column + 1] - zero) * scale
            errors[:, column - start:column - start + 1] = error = (values - rounded) / inverse[column, column]
            left[:, column + 1:end] -= error @ inverse[column:column + 1, column + 1:end]
        left[:, end:] -= errors @ inverse[start:end, end:]
    return Rounded(codes.float(), torch.cat(scales, 1), torch.cat(zeros, 1))


def _grouped(weight: Tensor, group: int) -> Tensor:
    """(out, in) to float32 (out, in / group, group)."""
    return weight.detach().float().unflatten(1, (-1, group))


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that a type keeps of these, as float32."""
    return values.to(dtype).float()


def _distance(steps: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """sum |W - Wq|^p of every group in steps of its grid: (..., 1)."""
    codes = (steps + zero).round().clamp(grid.low, grid.high)
    return (steps - (codes - zero)).abs().pow(NORM).sum(-1, keepdim=True)


def _shrink(x: Tensor, strength: float) -> Tensor:
    """The proximal operator of |x|^p, generalised soft thresholding: what is small becomes 0."""
    threshold = x.abs().clamp(min=TINY).pow(NORM - 1) / strength
    return x.sign() * (x.abs() - threshold).clamp(min=0)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, float64."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is never other than 0: any weight will do, and the nearest is taken
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


ROUNDINGS: dict[str, Callable[..., Rounded]] = {"nearest": nearest, "hqq": hqq, "gptq": gptq}
"""Ways to choose the integers, by the name that `quantize` gives."""
