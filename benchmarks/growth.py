"""How time and memory of a forward pass grow with tokens, images at a time, depth and width.

    python -m benchmarks.growth

The compiled model in the machine's best float type, with the attention form that `Runtime(attention="auto")` takes, and
random weights, which no time depends on. All sizes of an axis are timed in turn, round after round. `slope` is that of
log time over log size, from one size to the next: 1 where twice as much takes twice as long. `all` is the slope through
all sizes, of which every round gives one: their median with its 95 % interval. `peak_bytes` is what a fresh process
holds at most in a warmed-up pass, beyond interpreter and libraries, the model's own `weights_bytes` among it;
`memory_slope` is of what is beyond these. `python -m benchmarks.record` draws both over the size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimdit.context import Context
from slimdit.methods.compile import Compile
from slimdit.metrics.speed import WORKER_ENVIRONMENT, peak_memory, resident_bytes
from slimdit.models.dit import DiT, DiTConfig, uniform
from slimdit.pipeline import Pipeline
from slimdit.report.charts import Point, Series, plot_svg

from .int8 import fill
from .result import settle, show

Size = tuple[DiTConfig, int]  # a model, and how many images it is given


def sized(*, tokens: int = 256, depth: int = 6, width: int = 384) -> DiTConfig:
    """A model of so many square tokens of patch 2, with heads of 64 features."""
    side = 2 * math.isqrt(tokens)
    return uniform(depth=depth, width=width, heads=width // 64, patch=2, input_size=(side, side), channels=4,
                   classes=1000)


AXES: Mapping[str, tuple[tuple[int, ...], Callable[[int], Size]]] = {
    "tokens": ((64, 256, 1024, 4096), lambda tokens: (sized(tokens=tokens), 1)),
    "batch": ((1, 2, 4, 8, 16, 32, 64), lambda batch: (sized(tokens=64), batch)),
    "depth": ((3, 6, 12, 24), lambda depth: (sized(depth=depth), 1)),
    "width": ((192, 384, 768, 1536), lambda width: (sized(width=width), 1)),
}
"""The sizes of each axis, and the model and images that a size means."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a forward pass, and measure its memory, over growing sizes.")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--sizes", type=int, nargs="+", help="instead of an axis's own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", nargs=2, metavar=("AXIS", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory(*AXES[options.memory[0]][1](int(options.memory[1])))))
        return
    show("growth", [row for axis in options.axes
                    for row in measure(axis, options.sizes or AXES[axis][0], options.rounds)])


def measure(axis: str, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Rows of one axis."""
    calls = [forward(*AXES[axis][1](size)) for size in sizes]
    seconds = np.median(times := in_turn(calls, rounds), axis=0)
    slopes = [float(np.polyfit(np.log(sizes), np.log(row), 1)[0]) for row in times]
    low, high = (float(end) for end in np.percentile([np.median(np.random.default_rng(seed).choice(slopes, rounds))
                                                      for seed in range(2000)], (2.5, 97.5)))
    held = [in_fresh_process(axis, size) for size in sizes]
    beyond = [found["peak"] - found["weights"] for found in held]
    rows: list[dict[str, Any]] = []
    for place, size in enumerate(sizes):
        row = {"axis": axis, "size": size, "seconds": rounded(seconds[place]), "peak_bytes": held[place]["peak"],
               "weights_bytes": held[place]["weights"]}
        if place:
            row["slope"] = slope(sizes[place - 1:place + 1], seconds[place - 1:place + 1])
            if min(beyond[place - 1:place + 1]) > 0:
                row["memory_slope"] = slope(sizes[place - 1:place + 1], beyond[place - 1:place + 1])
        rows.append(row)
    for row in rows:
        row |= {"all": f"{np.median(slopes):.2f} [{low:.2f}, {high:.2f}]", "rounds": rounds}
    return rows


@torch.inference_mode()
def in_turn(calls: Sequence[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Seconds of each call, (rounds, calls): one after the other, round after round; two rounds before do not count."""
    def clocked(call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return np.array([[clocked(call) for call in calls] for _ in range(2 + rounds)][2:])


def forward(config: DiTConfig, images: int) -> Callable[[], Any]:
    """A call of the compiled model."""
    pipeline = Pipeline(fill(DiT(config).eval()))
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Compile().apply(pipeline, Context(pipeline, Path(folder)))
    inputs = (torch.randn(images, config.channels, *config.input_size), torch.zeros(images, dtype=torch.int64),
              torch.zeros(images, dtype=torch.int64))
    denoise = pipeline.denoise  # in the type it runs in: no other copy is held
    return lambda: denoise(*inputs)


def in_fresh_process(axis: str, size: int) -> dict[str, int]:
    """`memory` in a new process."""
    command = [sys.executable, "-m", "benchmarks.growth", "--memory", axis, str(size)]
    plain = {name: value for name, value in os.environ.items() if name not in WORKER_ENVIRONMENT}  # which keeps memory
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout
    return json.loads(told.splitlines()[-1])


@torch.inference_mode()
def memory(config: DiTConfig, images: int) -> dict[str, int]:
    """Bytes that this process holds at most in a pass, and those of the model's weights."""
    forward(sized(tokens=4, depth=1, width=64), 1)()  # what the first of all passes reserves
    started = resident_bytes()
    call = forward(config, images)
    call()
    with peak_memory(starting_bytes=started) as peak:
        call()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in DiT(config).bfloat16().state_dict().values())
    return {"peak": peak.bytes, "weights": weights}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of log value over log size between two."""
    return round(math.log(values[1] / values[0]) / math.log(sizes[1] / sizes[0]), 2)


def rounded(value: float) -> float:
    """With four figures."""
    return float(f"{value:.4g}")


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a picture for every axis of a kept document: time and memory over the size, both axes logarithmic."""
    written = []
    for axis in dict.fromkeys(row["axis"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["axis"] == axis]
        first = rows[0]
        lines = [Series([Point(row["size"], row[name] / first[name]) for row in rows], label, line="solid")
                 for name, label in (("seconds", "time"), ("peak_bytes", "peak memory"))]
        lines.append(Series([Point(row["size"], row["size"] / first["size"]) for row in rows], "in proportion",
                            line="dotted", marks=False))
        path = folder / f"growth-{axis}.svg"
        path.write_text(plot_svg(lines, x=axis, y=f"of that at {first['size']}", log_x=True, log_y=True, width=480,
                                 height=360), encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    if "--memory" not in sys.argv:
        settle()
    main()
