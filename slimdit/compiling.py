"""Whether a run is long enough for compiling its model to pay, and how long compiling takes.

A compiled model is faster from its second call on; its first call compiles, for seconds. PyTorch keeps what it compiled
in a folder, so that the same model at the same batch compiles sooner in the next process: a marker there remembers it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import ceil
from pathlib import Path

import torch

from .pipeline import Engine, Pipeline
from .sampling.solvers import SOLVE, blank, full_steps, is_guided, timesteps

# `benchmarks/compiling.py`, on two cores: seconds to compile, and what it then saves of an evaluation at the least.
COLD = (10.0, 1.3)  # at all, and per block
WARM = (2.0, 0.09)  # where PyTorch has compiled it before
OPENVINO = (0.0, 0.17)  # which keeps nothing between processes
SAVED = 0.07


@dataclass(frozen=True)
class Choice:
    """Whether to compile, and the numbers behind it.

    Attributes:
        evaluations: calls of the model in the run.
        seconds: of one of them, uncompiled.
        compiling: seconds that compiling is expected to take.
    """

    pays: bool
    evaluations: int
    seconds: float
    compiling: float

    def sentence(self) -> str:
        """What was chosen, and why."""
        whole = self.evaluations * self.seconds
        chosen = "compiled" if self.pays else "not compiled"
        return (f"{chosen}: {self.evaluations} evaluations of {self.seconds:.3g} s "
                f"take {whole:.3g} s as they are; compiling takes {self.compiling:.3g} s and saves {SAVED:.0%} of them")


def choose(pipeline: Pipeline, images: int, batch: int) -> Choice:
    """Whether to compile for so many images: an evaluation is timed uncompiled, the best of some after the first."""
    plain = pipeline.replace(runtime=replace(pipeline.runtime, compile=False))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        call(plain, "forward", shapes(plain, min(images, batch))[0])
        times.append(time.perf_counter() - began)
    seconds = min(times[1:])
    return decide(ceil(images / batch) * sum(full_steps(plain.process, plain.sampling)), seconds,
                  len(plain.model.blocks), known=marker(pipeline, batch).exists(), engine=pipeline.runtime.engine)


def decide(evaluations: int, seconds: float, blocks: int, *, known: bool, engine: Engine = "torch") -> Choice:
    """Whether compiling saves more than it takes."""
    once, each = OPENVINO if engine == "openvino" else WARM if known else COLD
    compiling = once + each * blocks
    return Choice(evaluations * seconds * SAVED > compiling, evaluations, seconds, compiling)


def warm_up(pipeline: Pipeline, batch: int) -> float:
    """Call everything that a run at this batch calls, once, so that it is compiled; the seconds that took.

    Nothing, where the model is not compiled.
    """
    if not pipeline.runtime.compile:
        return 0.0
    began = time.perf_counter()
    functions = ("with_change", "without_blocks") if pipeline.sampling.cache else ("forward",)
    if pipeline.takes_whole_steps:
        functions = ("step",)
    for rows in shapes(pipeline, batch):
        for function in functions:
            call(pipeline, function, rows, batch)
    seconds = time.perf_counter() - began
    place = marker(pipeline, batch)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    return seconds


def shapes(pipeline: Pipeline, batch: int) -> list[int]:
    """How many rows the model is given in a run at this batch: two for an image where guidance acts."""
    guided = {is_guided(pipeline.sampling, t) for t in timesteps(pipeline.process, pipeline.sampling)}
    return [batch * (2 if one else 1) for one in sorted(guided, reverse=True)]


def as_asked(pipeline: Pipeline, asked: str | None, images: int, batch: int,
             tell: Callable[[str], None]) -> Pipeline:
    """The pipeline, compiled as asked: yes, no, auto for where it pays, openvino for that engine, None as it says.

    Args:
        tell: told why, where it was left to us.

    Raises:
        ValueError: something else is asked.
    """
    if asked is None:
        return pipeline
    if asked not in ("yes", "no", "auto", "openvino"):
        raise ValueError(f"--compile {asked}: use yes, no, auto for where it pays, or openvino for that engine")
    compiled = pipeline.replace(runtime=replace(pipeline.runtime, compile=True))
    if asked == "openvino":
        return compiled.replace(runtime=replace(compiled.runtime, engine="openvino"))
    if asked == "auto":
        choice = choose(compiled, images, batch)
        tell(choice.sentence())
    wanted = choice.pays if asked == "auto" else asked != "no"
    return compiled if wanted else pipeline.replace(runtime=replace(pipeline.runtime, compile=False))


@torch.inference_mode()
def call(pipeline: Pipeline, function: str, rows: int, images: int = 1) -> None:
    """Call a function of the model on zeros, as a sampling run does, and wait for its answer.

    A whole `step` of so many images is one, too.
    """
    from .models.modulation import Modulations

    config, device = pipeline.model.config, pipeline.device
    x = torch.zeros(rows, config.channels, *config.input_size, device=device)
    t, y = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
    denoise = pipeline.denoise
    ahead = Modulations(denoise.model, [0], y[:1], compute=denoise.modulations)
    ahead.seek(0)
    if function == "step":
        numbers = torch.tensor(SOLVE[pipeline.sampling.solver].coefficients([0.5, 1.0])[0], device=device)
        pipeline.step(x[:images], t, y, ahead(y), numbers, *blank(pipeline.sampling, x[:images]))
    elif function == "without_blocks":
        change = torch.zeros(rows, config.tokens, config.width, dtype=denoise.dtype, device=device)
        denoise.without_blocks(x, t, y, ahead(y), change)
    else:
        getattr(denoise, "__call__" if function == "forward" else function)(x, t, y, ahead(y))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def marker(pipeline: Pipeline, batch: int) -> Path:
    """The file that says that PyTorch has compiled this structure at this batch before."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    sampling = pipeline.sampling
    known = repr((pipeline.model.config, asdict(pipeline.runtime), shapes(pipeline, batch), torch.__version__,
                  pipeline.device.type, sampling.solver, sampling.guidance, sampling.guidance_channels))
    return Path(cache_dir()) / "slimdit" / sha256(known.encode()).hexdigest()[:32]
