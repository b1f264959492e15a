"""Where a forward pass and a sampling run spend their time, against the best that this machine does with anything.

The roofline model (Williams, Waterman and Patterson, 2009): a program takes at least as long as its arithmetic at the
machine's peak, and at least as long as its bytes at the memory's. Both peaks are measured here, not looked up: products
of a size that suits the machine, and a copy too large for any cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

from .formats import load
from .methods.compile import Compile
from .metrics.cost import macs
from .metrics.speed import WORKER_ENVIRONMENT, alone
from .models.autoencoder import PixelSpace
from .models.dit import DiT, preset
from .models.presets import PATCHES, PRESETS
from .pipeline import DTYPES, Pipeline, Runtime
from .sampling.seeds import seeded
from .sampling.settings import Sampling
from .strict import build

MODELS = ("XS/4", "S/2", "B/2")
BATCHES = (1, 8, 32)
PEAK_SHAPE = (2048, 768, 3072)  # rows, features in, features out
COPIED = 2 ** 28  # bytes
PARTS = {"attention": re.compile(r"bmm|scaled_dot_product|slimdit::attend|softmax"),
         "products": re.compile(r"linear|mm\b|_mm|int8_product|conv")}
"""Operations by what they are part of, the first that fits; all else is norms, activations, copies, Python."""
AHEAD = re.compile(r"t_embedder|y_embedder|adaLN_modulation")
"""What is computed for all steps at once, before the first."""
PROFILED = 3  # calls
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a model is measured.

    Attributes:
        batches: images at a time, one row each.
        dtype: of weights and activations; None is the machine's best.
        compile: whether the model is compiled.
        steps: of the sampling run, whose solver is DDIM without guidance.
        rounds: timed calls, after three that do not count.

    Raises:
        ValueError: a number is below 1, or the dtype is unknown.
    """

    batches: tuple[int, ...] = BATCHES
    dtype: str | None = None
    compile: bool = True
    steps: int = 10
    rounds: int = 5

    def __post_init__(self) -> None:
        if not self.batches or min(*self.batches, self.steps, self.rounds) < 1:
            raise ValueError(f"roofline: batches, steps and rounds must be above 0, not {self.batches}, {self.steps} "
                             f"and {self.rounds}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"roofline: dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")


def measure_all(sources: Sequence[str], settings: Settings, report: Callable[[str], None]) -> list[Row]:
    """A row per model and batch, each model in a process of its own, in the environment of all that is timed.

    Args:
        sources: names of presets, whose weights are random then, or whatever `formats.load` takes.
        report: told what is being measured.

    Raises:
        OSError: a process ended badly; the sentence has its last line.
    """
    rows: list[Row] = []
    for source in sources:
        report(f"roofline: {source}")
        command = [sys.executable, "-m", "slimdit.roofline", json.dumps({"source": source, **asdict(settings)})]
        done = subprocess.run(command, env={**os.environ, **WORKER_ENVIRONMENT}, capture_output=True, text=True,
                              check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise OSError(f"roofline: measuring {source} failed: {last}")
        rows += json.loads(done.stdout.splitlines()[-1])
    return rows


def measure(source: str, settings: Settings) -> list[Row]:
    """The rows of one model, in this process.

    Returns:
        For each batch: `forward_ms`, of one step as a sampling run takes it, adaLN computed before; `of_peak`, its
        operations per second relative to `peak_gflops`; `roof`, the share of the time that arithmetic and weights
        cannot take less than; `products`, `attention` and `rest`, shares of a forward's time; `products_of_peak` and
        `attention_of_peak`; `run_ms`, of sampling that many images; `in_model`, the share of it in forwards.
    """
    pipeline = executed(source, settings)
    with torch.inference_mode():
        peak, bandwidth = peak_operations(DTYPES[pipeline.runtime.dtype]), peak_bandwidth()
        return [measured(source, pipeline, batch, settings, peak, bandwidth) for batch in settings.batches]


def executed(source: str, settings: Settings) -> Pipeline:
    """The model as it is to be run: in one dtype, compiled or not, sampled without guidance."""
    size, _, patch = source.partition("/")
    is_preset = size in PRESETS and patch in map(str, PATCHES) and not Path(source).exists()
    pipeline = Pipeline(random_model(source)) if is_preset else load(source)
    dtype = settings.dtype or Compile().precision("cpu")
    runtime = build(Runtime, {"dtype": dtype, "compile": settings.compile}, "roofline")
    # The decoder of latents is another model: a run ends before it.
    return pipeline.replace(runtime=runtime, sampling=Sampling(steps=settings.steps), autoencoder=PixelSpace())


def random_model(name: str) -> DiT:
    """A preset with weights of a trained model's size: zeros, as it begins, may be multiplied faster."""
    generator = seeded(0, "roofline")
    model = DiT(preset(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def measured(source: str, pipeline: Pipeline, batch: int, settings: Settings, peak: float, bandwidth: float) -> Row:
    """One row; peak in operations and bandwidth in bytes per second."""
    config = pipeline.model.config
    inputs = (torch.randn(batch, config.channels, *config.input_size, generator=seeded(0, "roofline", batch)),
              torch.full((batch,), 500), torch.arange(batch) % config.classes)
    ahead = pipeline.denoise.model.modulations(*inputs[1:])

    def forward() -> Tensor:
        return pipeline.denoise(*inputs, ahead)

    seconds = alone(forward, settings.rounds).variant_seconds
    run = alone(lambda: pipeline.sample(range(batch), batch=batch), max(1, settings.rounds // 3), 1)
    parts = shares(forward)
    counted = macs(config)
    operations = 2 * batch * (counted.total - counted.condition - counted.modulation)
    mixing = 2 * batch * counted.attention_mixing
    least = max(operations / peak, weight_bytes(pipeline) / bandwidth)
    return {"model": source, "batch": batch, "dtype": pipeline.runtime.dtype, "compiled": pipeline.runtime.compile,
            "forward_ms": 1e3 * seconds, "of_peak": of_peak(operations, seconds, peak), "roof": least / seconds,
            **parts,
            "products_of_peak": of_peak(operations - mixing, parts["products"] * seconds, peak),
            "attention_of_peak": of_peak(mixing, parts["attention"] * seconds, peak),
            "run_ms": 1e3 * run.variant_seconds, "in_model": settings.steps * seconds / run.variant_seconds,
            "threads": torch.get_num_threads(), "peak_gflops": peak / 1e9, "bandwidth_gb_s": bandwidth / 1e9}


def shares(call: Callable[[], Any]) -> dict[str, float]:
    """Shares of a call's time on this thread by part; they add up to 1."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(PROFILED):
            call()
    spent = dict.fromkeys((*PARTS, "rest"), 0.0)
    for event in profiled.key_averages():
        name = next((name for name, pattern in PARTS.items() if pattern.search(event.key)), "rest")
        spent[name] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {name: value / whole for name, value in spent.items()}


def of_peak(operations: float, seconds: float, peak: float) -> float | None:
    """Operations per second relative to the peak; None where no time was seen."""
    return operations / seconds / peak if seconds > 0 else None


def weight_bytes(pipeline: Pipeline) -> int:
    """Bytes of weights that one step reads at the least: without those that are needed once for all steps."""
    size = DTYPES[pipeline.runtime.dtype].itemsize
    return sum(tensor.numel() * (size if tensor.is_floating_point() else tensor.element_size())
               for name, tensor in pipeline.model.state_dict().items() if not AHEAD.search(name))


def peak_operations(dtype: torch.dtype, rounds: int = 20) -> float:
    """Operations per second of the fastest of PyTorch's products in a dtype, its weight packed where that can be."""
    rows, inner, outer = PEAK_SHAPE
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    calls: list[Callable[[], Tensor]] = [lambda: linear(x, weight)]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return 2 * rows * inner * outer / min(min(alone(call, rounds).variant_times) for call in calls)


def peak_bandwidth(rounds: int = 10) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.zeros(COPIED // 4)
    target = torch.empty_like(source)
    return 2 * COPIED / min(alone(lambda: target.copy_(source), rounds).variant_times)


def table(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """The rows in Markdown, and under them the peaks and where the numbers come from."""
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row["model"], "batch": lambda row: str(row["batch"]),
        "forward": lambda row: f"{row['forward_ms']:.3g} ms", "of peak": lambda row: percent(row["of_peak"]),
        "roof": lambda row: percent(row["roof"]), "products": lambda row: percent(row["products"]),
        "attention": lambda row: percent(row["attention"]), "rest": lambda row: percent(row["rest"]),
        "products, of peak": lambda row: percent(row["products_of_peak"]),
        "attention, of peak": lambda row: percent(row["attention_of_peak"]),
        "sampling run": lambda row: f"{row['run_ms']:.3g} ms", "in the model": lambda row: percent(row["in_model"])}
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1),
             *([cell(row) for cell in columns.values()] for row in rows)]
    peaks = {f"{'compiled' if row['compiled'] else 'eager'} {row['dtype']}, peak {row['peak_gflops']:.0f} GFLOP/s and "
             f"{row['bandwidth_gb_s']:.0f} GB/s in {row['model']}'s process": None for row in rows}
    origin = (f"`{provenance['command']}`, {provenance['date'][:10]}, torch {provenance['versions']['torch']}, "
              f"{provenance['cpu']}, {provenance['threads']} threads, commit {provenance['commit'][:7]}")
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", f"{origin}; {'; '.join(peaks)}."])


def percent(share: float | None) -> str:
    """A share for people."""
    return "" if share is None else f"{100 * share:.0f} %"


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(measure(given.pop("source"), build(Settings, given, "roofline"))) + "\n")
