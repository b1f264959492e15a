"""What timing promises, tested with a clock of our own: pairs, ratios, intervals, percentiles; never real speed."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.metrics.speed import (
    WORKER_ENVIRONMENT,
    SpeedComparison,
    Timing,
    alone,
    interleaved,
    peak_memory,
    resident_bytes,
)


class Machine:
    """A clock, and calls that take the seconds they are told to."""

    def __init__(self):
        self.now, self.order = 100.0, []

    def clock(self):
        return self.now

    def call(self, name, seconds):
        remaining = iter(seconds)

        def run():
            self.order.append(name)
            self.now += next(remaining)

        return run


def test_calls_alternate_and_the_warmup_does_not_count():
    machine = Machine()
    compared = interleaved(machine.call("a", [50, 4, 6, 8]), machine.call("b", [1, 2, 2, 2]), rounds=3, warmup=1,
                           clock=machine.clock)
    assert machine.order == ["a", "b"] * 4
    assert compared.ratio == 3.0  # of 2, 3 and 4
    assert (compared.low, compared.high) == (2.0, 4.0)
    assert compared.rounds == 3
    assert (compared.baseline_seconds, compared.variant_seconds) == (6.0, 2.0)


def test_calls_that_let_the_machine_settle_do_not_count():
    machine = Machine()
    settled = interleaved(machine.call("a", [90, 4, 90, 8]), machine.call("b", [70, 1, 70, 2]), rounds=2, warmup=0,
                          settle=1, clock=machine.clock)
    assert machine.order == ["a", "a", "b", "b"] * 2
    assert settled.variant_times == (1, 2) and settled.baseline_seconds == 6


def test_the_variant_says_its_latency_and_throughput():
    machine = Machine()
    compared = interleaved(machine.call("a", [9] * 102), machine.call("b", [99, *range(1, 102)]), rounds=101, warmup=1,
                           clock=machine.clock)
    timing = Timing((compared,))
    assert (timing.latency().p50, timing.latency().p95, timing.latency().repeats) == (51, 96, 101)
    assert timing.ratio() == (compared.ratio, compared.low, compared.high)
    speed, low, high = timing.throughput(images=102)
    assert speed == 2.0 and 102 / 101 < low < speed < high < 102


def test_the_ratio_is_of_pairs_so_that_a_machine_that_slows_down_does_not_matter():
    machine = Machine()
    slower = np.geomspace(1, 100, 11)
    compared = interleaved(machine.call("a", 3 * slower), machine.call("b", 2 * slower), rounds=11, warmup=0,
                           clock=machine.clock)
    assert [compared.ratio, compared.low, compared.high] == pytest.approx([1.5] * 3)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_the_interval_holds_the_ratio_and_stays_within_the_pairs(pairs):
    machine = Machine()
    compared = interleaved(machine.call("a", [a for a, _ in pairs]), machine.call("b", [b for _, b in pairs]),
                           rounds=len(pairs), warmup=0, clock=machine.clock)
    ratios = [a / b for a, b in pairs]
    assert min(ratios) * 0.999 <= compared.low <= compared.ratio * 1.001
    assert compared.ratio * 0.999 <= compared.high <= max(ratios) * 1.001


def test_more_rounds_narrow_the_interval():
    def width(rounds):
        machine = Machine()
        noisy = np.random.default_rng(0).uniform(1, 2, rounds)
        compared = interleaved(machine.call("a", noisy), machine.call("b", [1.0] * rounds), rounds=rounds, warmup=0,
                               clock=machine.clock)
        return compared.high - compared.low

    assert width(400) < 0.5 * width(25)


def test_a_call_alone_has_the_ratio_1_and_its_own_times():
    machine = Machine()
    timed = alone(machine.call("a", [99, *range(1, 102)]), rounds=101, warmup=1, clock=machine.clock)
    assert (timed.ratio, timed.low, timed.high) == (1, 1, 1)
    timing = Timing((timed,))
    assert (timing.latency().p50, timing.latency().p95, timing.latency().repeats) == (51, 96, 101)
    assert timing.throughput(images=102)[0] == 2


def process(ratio, rounds=5):
    return SpeedComparison(ratio, ratio, ratio, rounds, ratio, 1.0, (1.0,) * rounds)


def test_of_several_processes_the_interval_is_students_of_what_each_came_to():
    timing = Timing((process(1.0), process(2.0), process(4.0)))
    ratio, low, high = timing.ratio()
    assert ratio == pytest.approx(2)  # 4.303 is Student's 97.5 % point with 2 degrees of freedom, from a printed table
    assert (low, high) == pytest.approx((2 * 2 ** (-4.303 / 3**0.5), 2 * 2 ** (4.303 / 3**0.5)), rel=1e-3)
    assert timing.rounds == timing.latency().repeats == 15
    assert timing.throughput(8) == pytest.approx((8, 8, 8))


def test_rounds_within_processes_do_not_narrow_what_is_between_them():
    few, many = (Timing(tuple(process(ratio, rounds) for ratio in (0.8, 0.84, 0.76))) for rounds in (2, 2000))
    assert few.ratio() == many.ratio()


@given(st.lists(st.floats(0.5, 2), min_size=3, max_size=8))
@settings(max_examples=25, deadline=None)
def test_the_interval_of_processes_holds_their_ratio(ratios):
    ratio, low, high = Timing(tuple(map(process, ratios))).ratio()
    assert low <= ratio * 1.000001 and ratio <= high * 1.000001 and min(ratios) * 0.999 <= ratio <= max(ratios) * 1.001


@pytest.mark.parametrize("measure", [
    lambda: interleaved(int, int, rounds=0),
    lambda: alone(int, rounds=0),
    lambda: alone(int, warmup=-1),
])
def test_too_few_to_measure(measure):
    with pytest.raises(ValueError, match="must be at least"):
        measure()


def test_peak_memory_is_read_where_linux_says_it(tmp_path):
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  3000 kB\nVmRSS:\t  2000 kB\n")
    with peak_memory(starting_bytes=1000 * 1024, proc=tmp_path) as peak:
        assert (tmp_path / "clear_refs").read_text() == "5"  # the peak begins anew
        (tmp_path / "status").write_text("VmHWM:\t  7000 kB\nVmRSS:\t  2000 kB\n")
    assert (peak.bytes, peak.source) == (6000 * 1024, "VmHWM")
    assert resident_bytes(proc=tmp_path) == 2000 * 1024


def test_without_a_resettable_peak_it_says_so(tmp_path):
    with peak_memory(proc=tmp_path / "nothing") as peak:
        pass
    assert peak.source == "ru_maxrss" and peak.bytes > 0
    assert resident_bytes(proc=tmp_path / "nothing") > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_a_tensor_that_came_and_went_is_in_the_peak():
    size = 64 * 2**20
    with peak_memory(starting_bytes=resident_bytes()) as peak:
        torch.ones(size // 4)
    if peak.source == "VmHWM":  # a container may forbid the reset
        assert 0.9 * size < peak.bytes < 2 * size
    else:
        assert peak.source == "ru_maxrss"


@pytest.mark.gpu
def test_peak_memory_of_a_gpu():
    held = torch.ones(2**20, device="cuda")
    with peak_memory("cuda") as peak:
        torch.ones(2**20, device="cuda")
    assert peak.source == "cuda allocator"
    assert peak.bytes >= 2 * held.numel() * 4


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another malloc than glibc's")
@pytest.mark.parametrize("keeps", [True, False])
def test_freed_memory_is_kept_where_that_is_asked(keeps):
    program = """if 1:
        import sys
        from slimdit.metrics.speed import keep_freed_memory, resident_bytes
        if sys.argv[1] == "True":
            keep_freed_memory()
        before = resident_bytes()
        block = bytearray(2**27)
        del block
        print(resident_bytes() - before)
    """
    plain = {name: value for name, value in os.environ.items() if name not in WORKER_ENVIRONMENT}
    told = subprocess.run([sys.executable, "-c", program, str(keeps)], env=plain, capture_output=True, text=True,
                          check=True)
    assert (int(told.stdout) > 2**26) == keeps


def test_workers_tune_malloc():
    assert set(WORKER_ENVIRONMENT) == {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"}
    assert all(value.isdigit() for value in WORKER_ENVIRONMENT.values())
