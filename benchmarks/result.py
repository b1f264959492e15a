"""What a benchmark prints: a line for people per row, and last of all one JSON document with its provenance."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from slimdit.metrics.speed import WORKER_ENVIRONMENT, interleaved
from slimdit.report.record import provenance


def settle() -> None:
    """Start this program over in the environment of processes that are timed, unless it is: `WORKER_ENVIRONMENT`.

    For a module that is run; called from elsewhere it would start that program over.
    """
    if WORKER_ENVIRONMENT.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **WORKER_ENVIRONMENT})


def compare(a: Callable[[], Any], b: Callable[[], Any], rounds: int, settle: int = 0) -> dict[str, Any]:
    """How many times faster b is than a: `ratio` with its 95 % interval, and the median seconds of both.

    `settle` is that of `interleaved`.
    """
    times = interleaved(a, b, rounds, settle=settle)
    measured = {"ratio": times.ratio, "low": times.low, "high": times.high,
                "a_seconds": times.baseline_seconds, "b_seconds": times.variant_seconds}
    return {**{name: float(f"{value:.4g}") for name, value in measured.items()}, "rounds": rounds}


def show(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a benchmark's rows."""
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    where = provenance(device="cuda" if torch.cuda.is_available() else "cpu", threads=torch.get_num_threads(),
                       dtype="as each row says", command=["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    print(json.dumps({"benchmark": name, "rows": list(rows), "provenance": where}))
