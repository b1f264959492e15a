"""Made-up records, for tests of the report only: none of these numbers was measured."""

from __future__ import annotations

from typing import Literal, NamedTuple

from slimdit.report.record import AA, BASELINE, Images, Record, Value


class Metric(NamedTuple):
    unit: str
    better: Literal["lower", "higher"]


METRICS = {"fd_lite0": Metric("", "lower"), "kid": Metric("", "lower"), "psnr": Metric("dB", "higher"),
           "ssim": Metric("", "higher"), "throughput": Metric("images/s", "higher"),
           "size": Metric("bytes", "lower"), "peak_memory": Metric("bytes", "lower"),
           "run_macs": Metric("MACs", "lower")}
PROTOCOL = {"images": 2000, "seed": 0, "solver": "ddim", "steps": 20, "margin": 2.0}
PROVENANCE = {"command": "slimdit bench --images 2000 --seed 0", "date": "2030-01-02T03:04:05.000+00:00",
              "commit": "0123456789abcdef", "dirty": False, "versions": {"slimdit": "0.1.0", "torch": "2.13.0"},
              "cpu": "An Example Processor", "threads": 2, "dtype": "float32", "seeds": {"images": 0}, "schema": 1}


def made_up(name: str, fd: float, speed: float, *, size: float = 7.6e6, psnr: float = 28.0, verdict: str = "",
            remarks: tuple[str, ...] = (), recipe: dict | None = None) -> Record:
    own = {"fd_lite0": Value(fd, fd - 1.4, fd + 1.6, 2000), "throughput": Value(41.0 * speed, n=12, unit="images/s"),
           "peak_memory": Value(9.1e7 * (1 + size / 2e7), unit="bytes"), "size": Value(size, unit="bytes"),
           "run_macs": Value(3.1e9 / max(1.0, speed), unit="MACs"), "kid": Value(fd / 4e4, fd / 5e4, fd / 3e4, 2000)}
    compared = {} if name == BASELINE else {
        "fd_lite0_difference": Value(fd - 38.2, fd - 39.1, fd - 37.3, 2000),
        "psnr": Value(psnr, psnr - 0.2, psnr + 0.2, 2000, "dB"), "ssim": Value(0.95, 0.94, 0.96, 2000),
        "throughput_ratio": Value(speed, speed * 0.97, speed * 1.04, 12, "x"),
        "latency_ratio_batch1": Value(speed * 0.9, speed * 0.86, speed * 0.95, 30, "x")}
    return Record(name, recipe=recipe or {}, protocol=PROTOCOL, metrics=own, verdict=verdict, remarks=remarks,
                  against_baseline=compared,
                  witness=[{"method": name, "layers_changed": 25}], provenance=PROVENANCE,
                  seconds={"sample": 51.2, "timing": 12.0}, images=Images(f"{name}.png", "ab" * 32))


def example_records() -> list[Record]:
    """Baseline, A/A, rows of every kind of verdict, one refused and one that failed; not in the order of a report."""
    return [
        made_up("fewer-steps", 39.0, 1.97, verdict="no loss within 2.0", recipe={"reduce_steps": {"steps": 10}}),
        made_up(BASELINE, 38.2, 1.0),
        made_up("int8-weight-only", 38.3, 0.91, size=2.1e6, psnr=41.2, verdict="no loss within 2.0",
                remarks=("slower",), recipe={"quantize": {"weights": "int8"}}),
        made_up("int8-dynamic", 38.9, 1.21, size=2.1e6, psnr=33.0, verdict="too few images: 1500 more"),
        made_up("lean", 39.4, 2.36, size=2.1e6, psnr=26.4, verdict="no loss within 2.0",
                recipe={"reduce_steps": {"steps": 10, "solver": "unipc"}, "quantize": {"weights": "int8"}}),
        made_up("two-steps", 71.5, 6.2, psnr=17.1, verdict="loss"),
        made_up(AA, 38.6, 1.01, psnr=12.1, verdict="no loss within 2.0"),
        Record("wide", status="refused", reason="prune_width needs float weights: put it before quantize",
               protocol=PROTOCOL, provenance=PROVENANCE),
        Record("<script>alert(1)</script>", status="out_of_memory", reason="needed 9 GB | had 4 GB",
               protocol=PROTOCOL, provenance=PROVENANCE),
    ]
