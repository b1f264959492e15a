"""Memory that loading a saved model takes at its most, alone and with one forward pass, in every form of file.

    python -m benchmarks.load_memory

Every number is of a process of its own that loads one model of random weights, less what the process held after it had
loaded and run a tiny one: interpreter and libraries. `load_of_weights` is that peak relative to the bytes of the loaded
model's tensors: nothing was copied twice on the way where it is near 1. What the model holds while it runs is
`load_and_forward`, with activations, what a layer packs for its products, and the one layer that is being dequantized.
The `_ratio` columns are relative to the first row, native float32.

`half` is float32 in memory and bfloat16 on disk. `checkpoint` is the `.pt` of a training run, with last weights,
averaged ones and two optimizer moments in it, of which one is loaded. `int4, adaLN too` leaves no layer in floats: what
int4 spares is int8 there. A diffusers folder repeats the embedders in every block: its file is larger than what is
loaded of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from operator import itemgetter
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
MODELS: dict[str, Callable[[DiTConfig, Path], None]] = {
    "float32": lambda config, path: save(random_model(config), path),
    "half": lambda config, path: save(random_model(config), path, dtype="bfloat16"),
    "int8": lambda config, path: save(random_model(config, Quantize()), path),
    "int4": lambda config, path: save(random_model(config, Quantize(weights="int4")), path),
    "int4, adaLN too": lambda config, path: save(random_model(config, Quantize(
        weights="int4", protect=("t_embedder.*: int8", "final_layer.*: int8"))), path),
    "diffusers": lambda config, path: save(random_model(config), path, format="diffusers"),
    "checkpoint": lambda config, path: write_checkpoint(random_model(config), path.with_suffix(".pt")),
}
"""What writes a model of random weights in each form."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the peak memory of loading a model, and the sizes of files.")
    parser.add_argument("--presets", nargs="+", default=["S/2", "B/2"])
    parser.add_argument("--repeats", type=int, default=3, help="processes per number; the median counts")
    parser.add_argument("--measure", type=Path, nargs=2, metavar=("MODEL", "TINY"), help=argparse.SUPPRESS)
    parser.add_argument("--forward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.forward)))
        return
    found = []
    for name in options.presets:
        with tempfile.TemporaryDirectory() as folder:
            found += rows(name, options.repeats, Path(folder))
    show("load_memory", found)


def rows(name: str, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """A row per form, float32 first."""
    found: list[dict[str, Any]] = []
    for form, write in MODELS.items():
        write(TINY, folder / f"tiny {form}")
        write(preset(name), folder / form)
        model, tiny = ((folder / what).with_suffix(".pt" if form == "checkpoint" else "")
                       for what in (form, f"tiny {form}"))
        row: dict[str, Any] = {"preset": name, "weights": form, "file_bytes": file_bytes(model)}
        for what in ("load", "load_and_forward"):
            measured = sorted((fresh(model, tiny, what) for _ in range(repeats)), key=itemgetter("peak"))
            row[f"{what}_bytes"] = measured[len(measured) // 2]["peak"]
            row["weights_bytes"] = measured[0]["weights"]
        row["load_of_weights"] = round(row["load_bytes"] / row["weights_bytes"], 4)
        for column in ("file", "load", "load_and_forward"):
            row[f"{column}_ratio"] = round(row[f"{column}_bytes"] / (found[0] if found else row)[f"{column}_bytes"], 4)
        found.append(row)
    return found


@torch.no_grad()
def random_model(config: DiTConfig, method: Quantize | None = None) -> Pipeline:
    """A model of random weights, packed as a method would."""
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    if method:
        chosen = {name: method.kind(name) for name in packable_linears(model)}
        pack_linears(model, {name: kind for name, kind in chosen.items() if kind})
    return Pipeline(model)


def write_checkpoint(pipeline: Pipeline, path: Path) -> None:
    """What fast-DiT's training saves: the last weights, the averaged ones, and Adam's two moments of each."""
    states = [{name: tensor.clone() for name, tensor in pipeline.model.state_dict().items()} for _ in range(4)]
    torch.save({"model": states[0], "ema": states[1], "opt": {"state": states[2:]}, "args": Namespace()}, path)


def fresh(model: Path, tiny: Path, what: str) -> dict[str, int]:
    """`measure` in a new process."""
    command = [sys.executable, "-m", "benchmarks.load_memory", "--measure", str(model), str(tiny)]
    command += ["--forward"] if what == "load_and_forward" else []
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(model: Path, tiny: Path, forward: bool) -> dict[str, int]:
    """Bytes that this process holds at most while it loads a model and, if asked, runs it once on one image.

    Returns:
        `peak`, those bytes, and `weights`, the bytes of the loaded model's tensors.
    """
    use(load(tiny, heads=TINY.blocks[0].heads))  # what is imported and reserved on first use is no model's own
    with peak_memory(starting_bytes=resident_bytes()) as peak:
        pipeline = load(model)
        if forward:
            use(pipeline)
    tensors = pipeline.model.state_dict().values()
    return {"peak": peak.bytes, "weights": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}


@torch.inference_mode()
def use(pipeline: Pipeline) -> None:
    """Run a model once."""
    config = pipeline.model.config
    pipeline.denoise(torch.zeros(1, config.channels, *config.input_size), torch.tensor([500]), torch.tensor([0]))


if __name__ == "__main__":
    main()
