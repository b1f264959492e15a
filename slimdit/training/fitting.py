"""By which numbers a solver goes from step to step: those with which a short run ends where a long one does.

A linear multistep solver weighs x and the clean images that were predicted so far. The usual weights follow from the
noise levels alone; those that serve one model best are a few dozen numbers, found with the model as it is and without
data ("S4S", arXiv 2502.17423; "Differentiable Solver Search", arXiv 2505.21114, both by gradients through the run).
Here the ends of the runs are a least-squares problem, and its derivatives are differences of runs: no run is longer
than the one that is fitted, none is held for a gradient, and whatever samples can be fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from ..pipeline import Pipeline
from ..sampling.settings import FITTED, Sampling
from ..sampling.solvers import coefficients
from .placement import goals

DIFFERENCE = 1e-3  # of a number, for a derivative: well above the rounding of a float32 run
ROUNDS = 12  # of new numbers tried
ENOUGH = 1e-2  # less gained by a round, relative to the error, ends the fit


def fit_coefficients(pipeline: Pipeline, sampling: Sampling, *, images: int, long: int, seed: int,
                     rounds: int = ROUNDS,
                     report: Callable[[str], None] = lambda line: None) -> tuple[Sampling, dict[str, Any]]:
    """The settings with coefficients fitted to the model, and what is to be told of them.

    They stay as they were where the fit is no better for images that it did not see.

    Args:
        sampling: the settings to improve, of the solver `multistep`.
        images: whose ends are compared; as many others say what was gained.
        long: steps of the long run.
        rounds: of the fit at the most, each of as many runs as there are numbers.
        report: told how far the fit is.
    """
    goal, others = goals(pipeline, sampling, images, long, seed)
    begun = np.array([row[-FITTED:] for row in coefficients(pipeline.process, sampling)])
    free = np.array([[place < 2 + step for place in range(FITTED)] for step in range(sampling.steps)])
    runs = 0

    def with_numbers(numbers: np.ndarray) -> Sampling:
        rows = begun.copy()
        rows[free] = numbers
        return replace(sampling, coefficients=tuple(map(tuple, rows.tolist())))

    def residual(numbers: np.ndarray) -> np.ndarray:
        nonlocal runs
        runs += 1
        return goal.missed(with_numbers(numbers)).flatten().cpu().double().numpy()

    def derivative(numbers: np.ndarray) -> np.ndarray:
        here = residual(numbers)
        report(f"solver fitted: error {np.square(here).mean():.3g}, {runs} runs")
        moved = numbers + DIFFERENCE * np.eye(len(numbers))
        return np.stack([(residual(one) - here) / DIFFERENCE for one in moved], axis=1)

    found = with_numbers(least_squares(residual, begun[free], derivative, ftol=ENOUGH, max_nfev=rounds).x)
    before, after = others.error(sampling), others.error(found)
    return found if after < before else sampling, {
        "numbers_fitted": int(free.sum()), "runs": runs, "error_before": before, "error_found": after,
        "error_before_fitted": goal.error(sampling), "error_found_fitted": goal.error(found)}
