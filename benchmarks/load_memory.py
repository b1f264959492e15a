"""Memory that loading a saved model takes at its most, alone and with one forward pass: float32, int8, int4.

    python -m benchmarks.load_memory

Every number is of a process of its own that loads one model of random weights, less what the process held after it had
loaded and run a tiny one: interpreter and libraries. No full-precision copy is made on the way where `load` is at most
`file`, as in the row of float32. It can be less: the file is mapped, and loading looks at its floats alone. What the
model holds while it runs is `load_and_forward`, with activations and the one layer that is being dequantized. File
sizes are those of `.safetensors`, relative to float32's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from slimdit.formats import load, save
from slimdit.methods.quantize import Quantize
from slimdit.metrics.cost import file_bytes
from slimdit.metrics.speed import peak_memory, resident_bytes
from slimdit.models.dit import DiT, DiTConfig, preset, uniform
from slimdit.models.surgery import pack_linears, packable_linears
from slimdit.pipeline import Pipeline

from .result import show

TINY = uniform(depth=1, width=16, heads=2, patch=2, input_size=(4, 4), channels=1, classes=3)
MODELS = {"float32": None, "int8": Quantize(), "int4": Quantize(weights="int4"),
          "int4 with adaLN": Quantize(weights="int4", protect=("t_embedder.*", "final_layer.*"))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the peak memory of loading a model, and the sizes of files.")
    parser.add_argument("--preset", default="S/2")
    parser.add_argument("--repeats", type=int, default=3, help="processes per number; the median counts")
    parser.add_argument("--measure", type=Path, nargs=2, metavar=("MODEL", "TINY"), help=argparse.SUPPRESS)
    parser.add_argument("--forward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.forward)))
        return
    with tempfile.TemporaryDirectory() as folder:
        show("load_memory", rows(options.preset, options.repeats, Path(folder)))


def rows(name: str, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """A row per kind of weights, float32 first."""
    write(TINY, None, folder / "tiny")
    found: list[dict[str, Any]] = []
    for kind, method in MODELS.items():
        write(preset(name), method, folder / kind)
        row: dict[str, Any] = {"preset": name, "weights": kind, "file_bytes": file_bytes(folder / kind)}
        for what in ("load", "load_and_forward"):
            peaks = sorted(fresh(folder / kind, folder / "tiny", what) for _ in range(repeats))
            row[f"{what}_bytes"] = peaks[len(peaks) // 2]
        for column in ("file", "load", "load_and_forward"):
            row[f"{column}_ratio"] = round(row[f"{column}_bytes"] / (found[0] if found else row)[f"{column}_bytes"], 4)
        found.append(row)
    return found


@torch.no_grad()
def write(config: DiTConfig, method: Quantize | None, folder: Path) -> None:
    """Save a model of random weights, packed as a method would."""
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    if method:
        chosen = {name: method.kind(name) for name in packable_linears(model)}
        pack_linears(model, {name: kind for name, kind in chosen.items() if kind})
    save(Pipeline(model), folder)


def fresh(model: Path, tiny: Path, what: str) -> int:
    """`measure` in a new process."""
    command = [sys.executable, "-m", "benchmarks.load_memory", "--measure", str(model), str(tiny)]
    command += ["--forward"] if what == "load_and_forward" else []
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure(model: Path, tiny: Path, forward: bool) -> int:
    """Bytes that this process holds at most while it loads a model and, if asked, runs it once on one image."""
    use(tiny, forward=True)  # what is imported and reserved on first use is no model's own
    with peak_memory(starting_bytes=resident_bytes()) as peak:
        use(model, forward)
    return peak.bytes


@torch.inference_mode()
def use(folder: Path, forward: bool) -> None:
    """Load a model, and run it once."""
    pipeline = load(folder)
    config = pipeline.model.config
    if forward:
        pipeline.denoise(torch.zeros(1, config.channels, *config.input_size), torch.tensor([500]), torch.tensor([0]))


if __name__ == "__main__":
    main()
