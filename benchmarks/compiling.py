"""How long a model takes until its first image and from then on: set-up, compiling and steady state, apart.

    python -m benchmarks.compiling --models bundled S/2 B/2

Every row is of fresh processes, the median of some: `load` reads the saved model, `cold` compiles it where PyTorch's
cache is empty, `warm` where the same model was compiled by the process before. `eager` and `compiled` are seconds of an
evaluation, timed in turn, with `ratio` their ratio. `pays_from_cold` and `pays_from_warm` are the evaluations from
which compiling takes less than it saves: what `--compile auto` (`slimdit/compiling.py`) has to guess.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from math import ceil
from pathlib import Path
from typing import Any

import torch

from slimdit.compiling import call, shapes, warm_up
from slimdit.context import Context
from slimdit.formats import load, save
from slimdit.methods.compile import Compile
from slimdit.methods.quantize import Quantize
from slimdit.pipeline import Runtime
from slimdit.sampling.settings import Sampling

from .int8 import opened
from .result import compare, settle, show


def main() -> None:
    parser = argparse.ArgumentParser(description="Time set-up, compiling and steady state.")
    parser.add_argument("--models", nargs="+", default=["bundled", "S/2", "B/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(first_call(options.one[0], int(options.one[1]))))
        return
    show("compiling", [row for name in options.models for row in measure(name, options)])


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model: in its best float type, in int8, and compiled by OpenVINO, for every number of images."""
    rows = []
    plain = opened(name)
    with tempfile.TemporaryDirectory() as folder:
        context = Context(plain, Path(folder))
        floats = Compile().apply(plain.replace(sampling=Sampling("ddim", 10, guidance=1.5)), context)
        made = {floats.runtime.dtype: floats, "int8": Quantize(activations="int8").apply(floats.copy(), context)}
        if importlib.util.find_spec("openvino"):
            made[f"{floats.runtime.dtype}, OpenVINO"] = Compile(engine="openvino").apply(floats, context)
        for kind, pipeline in made.items():
            save(pipeline, Path(folder, kind))
            for images in options.images:
                rows.append({"model": name, "weights": kind, "images": images,
                             **timed(Path(folder, kind), images, options)})
    return rows


def timed(model: Path, images: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row's numbers."""
    cold, warm = [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(in_fresh_process(model, images, cache))
            warm.append(in_fresh_process(model, images, cache))
    pipeline = load(model)
    plain = pipeline.replace(runtime=Runtime(pipeline.runtime.dtype))
    rows = shapes(pipeline, images)[0]
    steady = compare(lambda: call(plain, "forward", rows), lambda: call(pipeline, "forward", rows), options.rounds,
                     settle=1)
    eager, compiled = steady.pop("a_seconds"), steady.pop("b_seconds")
    found = {"load": middle(cold, "load"), "cold": middle(cold, "compile"), "warm": middle(warm, "compile"),
             "eager": eager, "compiled": compiled, **steady}
    for start in ("cold", "warm"):
        saved = eager - compiled
        found[f"pays_from_{start}"] = ceil(found[start] / saved) if saved > 0 else None
    return found


def middle(found: list[dict[str, float]], name: str) -> float:
    """The median of a number, with three figures."""
    return float(f"{statistics.median(one[name] for one in found):.3g}")


def in_fresh_process(model: Path, images: int, cache: str) -> dict[str, float]:
    """`first_call` in a new process that keeps what it compiles in a folder."""
    command = [sys.executable, "-m", "benchmarks.compiling", "--one", str(model), str(images)]
    told = subprocess.run(command, capture_output=True, text=True, check=True,
                          env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}).stdout
    return json.loads(told.splitlines()[-1])


def first_call(model: str, images: int) -> dict[str, float]:
    """Seconds to load a model, once the libraries are there, and to compile it."""
    began = time.perf_counter()
    pipeline = load(model)
    return {"load": time.perf_counter() - began, "compile": warm_up(pipeline, images)}


if __name__ == "__main__":
    settle()
    torch.set_grad_enabled(False)
    main()
