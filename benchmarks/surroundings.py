"""What the allocator's settings and the number of threads do to a whole run.

    python -m benchmarks.surroundings --models bundled S/2 --images 1 8

Guided DDIM runs of the compiled bfloat16 model on a CPU, by two processes in turn. `ratio` is how many times faster the
one is that runs as everything here is timed (b), with freed memory kept (`WORKER_ENVIRONMENT`) and a thread for every
core, than one in other surroundings (a). A preset has random weights, which no time depends on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch

from slimdit.metrics.speed import WORKER_ENVIRONMENT
from slimdit.pipeline import Runtime
from slimdit.sampling.settings import Sampling

from .int8 import opened
from .result import compare, show
from .sampling_run import whole

OURS: Mapping[str, str] = WORKER_ENVIRONMENT
OTHERS: Mapping[str, Mapping[str, str]] = {
    "freed memory given back": {},
    "one thread": {**OURS, "OMP_NUM_THREADS": "1"},
    "twice the threads": {**OURS, "OMP_NUM_THREADS": str(2 * torch.get_num_threads())},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time runs by the allocator's settings and the number of threads.")
    parser.add_argument("--models", nargs="+", default=["bundled", "S/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--others", nargs="+", choices=list(OTHERS), default=list(OTHERS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", action="store_true", help="be one of the processes: a run for every line read")
    options = parser.parse_args()
    if options.serve:
        serve(options.models[0], options.images[0], options.steps)
        return
    show("surroundings", [row for name, images in product(options.models, options.images)
                          for row in measure(name, images, options.others, options.steps, options.rounds)])


def measure(name: str, images: int, others: list[str], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model and number of images."""
    rows = []
    for other in others:
        with ExitStack() as both:
            a, b = (both.enter_context(process(name, images, steps, given)) for given in (OTHERS[other], OURS))
            times = compare(a, b, rounds, settle=1)  # threads of the other's are awake for a while
            rows.append({"model": name, "images": images, "steps": steps, "a": other, "b": "as timed", **times})
    return rows


@contextmanager
def process(name: str, images: int, steps: int, surroundings: Mapping[str, str]) -> Iterator[Any]:
    """A process in such surroundings, as a function that has it run once."""
    command = [sys.executable, "-m", "benchmarks.surroundings", "--serve", "--models", name, "--images", str(images),
               "--steps", str(steps)]
    kept = {key: value for key, value in os.environ.items() if key not in OURS and key != "OMP_NUM_THREADS"}
    with subprocess.Popen(command, env={**kept, **surroundings}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as server:
        assert server.stdin and server.stdout

        def run() -> None:
            print(file=server.stdin, flush=True)
            if not server.stdout.readline():
                raise RuntimeError(f"the process that runs {name} ended with {server.wait()}")

        yield run
        server.stdin.close()


def serve(name: str, images: int, steps: int) -> None:
    """Run once for every line on stdin, and say so on stdout."""
    plain = opened(name)
    pipeline = plain.replace(runtime=Runtime("bfloat16", compile=True), sampling=Sampling("ddim", steps, guidance=1.5))
    for _ in sys.stdin:
        whole(pipeline, images)
        print("done", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
