"""What a model costs by the clock: times side by side, latency, throughput and peak memory.

A speed-up is a ratio measured in one run, baseline and variant in turn, so that a machine that slows down slows both.
A process keeps for its life what it was given (addresses, pages, a core's neighbours), so that its rounds agree better
with one another than with another process's: how sure a ratio is, only several processes tell (Kalibera and Jones,
Rigorous Benchmarking in Reasonable Time, 2013).
"""

from __future__ import annotations

import ctypes
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Clock = Callable[[], float]
"""Seconds since some moment, as time.perf_counter."""

KEPT = {"TRIM_THRESHOLD": (-1, 2_000_000_000), "MMAP_THRESHOLD": (-3, 2_000_000_000), "TOP_PAD": (-2, 2**28)}
"""Of glibc's malloc, so that it keeps freed memory instead of faulting it in anew at every step: what `mallopt` calls a
setting, and its value. `benchmarks/surroundings.py` says what that is worth."""
WORKER_ENVIRONMENT = {f"MALLOC_{name}_": str(value) for name, (_, value) in KEPT.items()}
"""Environment of a process that is timed."""

RESAMPLES = 2000  # of the bootstrap


def keep_freed_memory() -> None:
    """Set this process's malloc as `WORKER_ENVIRONMENT` does from the start; without glibc, nothing."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in KEPT.values():
            mallopt(option, value)


@dataclass(frozen=True)
class SpeedComparison:
    """A variant's speed against a baseline's, in one process.

    Attributes:
        ratio: median over rounds of baseline seconds / variant seconds; above 1, the variant is faster.
        low, high: 95 % bootstrap interval of that median.
        rounds: pairs timed.
        baseline_seconds, variant_seconds: medians of one call.
        variant_times: seconds of every call of the variant that counts.
    """

    ratio: float
    low: float
    high: float
    rounds: int
    baseline_seconds: float
    variant_seconds: float
    variant_times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Timing:
    """The same two calls compared in one process, or in each of several.

    Attributes:
        processes: what each came to.
    """

    processes: tuple[SpeedComparison, ...]

    @property
    def rounds(self) -> int:
        """Pairs timed, in all."""
        return sum(one.rounds for one in self.processes)

    def ratio(self) -> tuple[float, float, float]:
        """Baseline seconds / variant seconds, and the ends of its 95 % interval; see `_across`."""
        return _across([(one.ratio, one.low, one.high) for one in self.processes])

    def throughput(self, images: int, seed: int = 0) -> tuple[float, float, float]:
        """Images per second of a variant whose call makes so many, and the ends of its 95 % interval."""
        speeds = [images / np.array(one.variant_times) for one in self.processes]
        return _across([(float(np.median(speed)), *_median_interval(speed, seed)) for speed in speeds])

    def latency(self) -> Latency:
        """How long a call of the variant took."""
        times = [seconds for one in self.processes for seconds in one.variant_times]
        return Latency(float(np.median(times)), float(np.percentile(times, 95)), self.rounds)


@dataclass(frozen=True)
class Latency:
    """How long a call takes, in seconds: the median, the 95th percentile and how many calls they are from."""

    p50: float
    p95: float
    repeats: int


@dataclass
class PeakMemory:
    """The most memory a block held, filled in when it ends.

    Attributes:
        bytes: the peak, less the starting bytes.
        source: where it was read: "cuda allocator", "VmHWM" (the peak of this block), or "ru_maxrss" (the peak since
            the process began, where the system cannot reset it).
    """

    bytes: int = 0
    source: str = ""


def interleaved(baseline: Callable[[], Any], variant: Callable[[], Any], rounds: int = 20, warmup: int = 3, *,
                settle: int = 0, clock: Clock = time.perf_counter, seed: int = 0) -> SpeedComparison:
    """Time two calls in turn: baseline, variant, baseline, variant.

    Args:
        rounds: pairs that count.
        warmup: pairs before them that do not.
        settle: calls before each that counts, of the same kind, for two with threads of their own, which stay awake for
            a while and slow the other.

    Raises:
        ValueError: rounds is below 1, or warmup below 0.
    """
    _require_counts(rounds=rounds, warmup=warmup)

    def timed(call: Callable[[], Any]) -> float:
        for _ in range(settle):
            call()
        return _seconds(call, clock)

    pairs = [(timed(baseline), timed(variant)) for _ in range(warmup + rounds)][warmup:]
    times = np.array(pairs)
    ratios = times[:, 0] / times[:, 1]
    low, high = _median_interval(ratios, seed)
    return SpeedComparison(float(np.median(ratios)), low, high, rounds, float(np.median(times[:, 0])),
                           float(np.median(times[:, 1])), tuple(times[:, 1].tolist()))


def alone(call: Callable[[], Any], rounds: int = 20, warmup: int = 3, *, clock: Clock = time.perf_counter,
          seed: int = 0) -> SpeedComparison:
    """Time a call that has nothing to be compared with, such as the baseline's own: its ratio is 1 by definition.

    Raises:
        ValueError: rounds is below 1, or warmup below 0.
    """
    _require_counts(rounds=rounds, warmup=warmup)
    times = [_seconds(call, clock) for _ in range(warmup + rounds)][warmup:]
    middle = float(np.median(times))
    return SpeedComparison(1.0, 1.0, 1.0, rounds, middle, middle, tuple(times))


@contextmanager
def peak_memory(device: torch.device | str = "cpu", starting_bytes: int = 0, *,
                proc: Path = Path("/proc/self")) -> Iterator[PeakMemory]:
    """The most memory held while a block runs; warm up before it.

    On CUDA what PyTorch's allocator handed out, on a CPU the resident set of this process. Weights that are already
    loaded count: they are part of the cost.

    Args:
        starting_bytes: what to leave out: `resident_bytes()` of the fresh process, its interpreter and libraries.
    """
    peak = PeakMemory()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        total, peak.source = torch.cuda.max_memory_allocated(device), "cuda allocator"
    else:
        resets = _reset_resident_peak(proc)
        yield peak
        total, peak.source = (_status_bytes(proc, "VmHWM"), "VmHWM") if resets else (_rusage_bytes(), "ru_maxrss")
    peak.bytes = max(0, total - starting_bytes)


def resident_bytes(*, proc: Path = Path("/proc/self")) -> int:
    """Memory this process holds now; where the system does not say, the most it has held."""
    return _status_bytes(proc, "VmRSS") if (proc / "status").exists() else _rusage_bytes()


def _seconds(call: Callable[[], Any], clock: Clock) -> float:
    _finish_kernels()
    began = clock()
    call()
    _finish_kernels()
    return clock() - began


def _finish_kernels() -> None:
    """Wait for what a GPU was asked to do: it answers before it has done it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _across(processes: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """A positive number from what it was in each process, a median and its interval: of one, just that.

    Of several the geometric mean, with Student's interval of the logarithms: rounds within a process do not narrow it.
    """
    from scipy.special import stdtrit

    if len(processes) == 1:
        return processes[0]
    logs = np.log([value for value, _, _ in processes])
    reach = float(stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1)) / math.sqrt(len(logs))
    return tuple(math.exp(logs.mean() + sign * reach) for sign in (0, -1, 1))  # type: ignore[return-value]


def _median_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        least = 0 if name == "warmup" else 1
        if count < least:
            raise ValueError(f"speed: {name} must be at least {least}, not {count}")


def _reset_resident_peak(proc: Path) -> bool:
    """Let VmHWM begin anew (Linux: 5 in clear_refs); whether that can be done here."""
    try:
        (proc / "clear_refs").write_text("5")
        return _status_bytes(proc, "VmHWM") > 0
    except (OSError, ValueError):
        return False


def _status_bytes(proc: Path, name: str) -> int:
    for line in (proc / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024  # the file says kB and means KiB
    raise ValueError(f"{proc / 'status'} has no {name}")


def _rusage_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
