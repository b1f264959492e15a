"""At which steps of a run the blocks must be evaluated, for what is foretold at the others to stay within an error.

Measured once, on images of the pipeline's own sampling, and fixed: a gate that looks at the images being made
(TeaCache, arXiv 2411.19108) would let one image decide for all of its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pipeline import Pipeline, Runtime
from ..sampling.caching import foretold
from ..sampling.seeds import ImageNoise, image_labels
from ..sampling.solvers import full_steps, solve, timesteps
from .calibration import FIRST_ID


class Chooser:
    """The whole model at every step, which notes the steps that a forecast from those noted before would miss.

    Attributes:
        full: those steps.
        errors: of the forecasts that are good enough: ||foretold - changed|| / ||changed||, the mean over images.
    """

    def __init__(self, pipeline: Pipeline, threshold: float, order: int) -> None:
        self.denoiser, self.threshold, self.order = pipeline.denoise, threshold, order
        self.visited = timesteps(pipeline.process, pipeline.sampling)
        # Where guidance begins or ends the whole model is evaluated whatever a cache says.
        self.forced = full_steps(pipeline.process, pipeline.sampling.with_cache((0,), order))
        self.full: list[int] = []
        self.errors: list[float] = []
        self.kept: list[tuple[int, Tensor]] = []
        self.step = 0

    def seek(self, step: int) -> None:
        """Be ready for a step of the run."""
        self.step = step

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As `DiT.forward`."""
        output, change = self.denoiser.with_change(x, t, y)
        if self.forced[self.step]:
            self.kept = []
        error = self.error(change)
        if error > self.threshold:
            self.full.append(self.step)
            self.kept = [*self.kept, (self.visited[self.step], change)][-(self.order + 1):]
        else:
            self.errors.append(error)
        return output

    def error(self, change: Tensor) -> float:
        """Of what would be foretold at this step; infinite where nothing is known."""
        if not self.kept:
            return float("inf")
        missed = (foretold(self.kept, self.visited[self.step]) - change).flatten(1).norm(dim=1)
        return float((missed / change.flatten(1).norm(dim=1)).mean())


@torch.no_grad()
def steps_to_evaluate(pipeline: Pipeline, threshold: float, order: int, *, images: int, seed: int = 0) -> Chooser:
    """The steps of the pipeline's own runs at which a forecast of that order errs by more than the threshold."""
    plain = pipeline.replace(runtime=Runtime())
    config, ids = plain.model.config, range(FIRST_ID, FIRST_ID + images)
    chooser = Chooser(plain, threshold, order)
    solve(chooser, plain.process, plain.sampling, ImageNoise(seed, ids, (config.channels, *config.input_size)),
          image_labels(seed, ids, config.classes), null_class=config.classes, learn_sigma=config.learn_sigma,
          device=plain.device, progress=chooser.seek)
    return chooser
