"""On a GPU: what 8-bit and 2:4 sparse layers, whole models of them, and CUDA graphs gain over compiled bfloat16.

    python -m benchmarks.gpu --presets S/2 XL/2 --images 1 32

`ratio` is how many times faster b is than a. A layer's time is the GPU's alone, of `--rows` tokens, rounding of the
input included, for 8-bit floats without a look at its size; `models/execution.py` runs the kinds that lose otherwise. A
model's is one forward of guided sampling, two rows an image, adaLN computed ahead; the baseline is the compiled model
with CUDA graphs.
Weights are random: `error` is numerical, relative to the float32 model of the same weights (of 2:4, the pruned ones).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimdit.context import Context
from slimdit.methods.compile import Compile
from slimdit.methods.prune_weights import PruneWeights, outside_best
from slimdit.methods.quantize import Quantize
from slimdit.models.execution import SparseLinear, captured, quickest
from slimdit.models.feedforward import gelu
from slimdit.models.fp8 import Fp8Dynamic
from slimdit.models.linear import GeluLinear, Int8Dynamic
from slimdit.models.surgery import weight_bytes
from slimdit.pipeline import Pipeline, Runtime

from .int8 import random_model, relative
from .result import compare, settle, show

REPEATS = 20  # of a layer's call in a CUDA graph
FORMS: dict[str, Callable[[], Any]] = {
    "fp8": lambda: Quantize(weights="fp8", activations="fp8"),
    "2:4": lambda: PruneWeights(pattern="2:4", layers=("blocks.*.attn.*", "blocks.*.mlp.*"))}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time layers and models on a GPU.")
    parser.add_argument("--widths", type=int, nargs="*", default=[384, 1152])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--presets", nargs="*", default=["S/2", "XL/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rows = [row for width in options.widths for row in layers(width, options.rows, options.rounds)]
    for preset, images in product(options.presets, options.images):
        rows += models(preset, images, options.forms, options.rounds)
    show("gpu", rows)


def layers(width: int, rows: int, rounds: int) -> Iterator[Row]:
    """Rows of a block's linear layers at a width."""
    for inside, outside in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
        linear = nn.Linear(inside, outside)
        linear.weight[outside_best(linear.weight.abs(), 2, 4)] = 0
        x = torch.randn(rows, inside, device="cuda", dtype=torch.bfloat16)
        packed = {"fp8": Fp8Dynamic.of(linear), "int8": Int8Dynamic.of(linear)}
        packed["fp8"].ordinary = True
        calls = {kind: compiled(layer.to("cuda", torch.bfloat16), x) for kind, layer in packed.items()}
        linear = linear.to("cuda", torch.bfloat16)
        calls["2:4"] = partial(quickest(SparseLinear(linear), x), x)
        plain = compiled(linear, x)
        for kind, call in calls.items():
            yield of_layer(f"{inside} x {outside}", rows, "bfloat16", plain, kind, call, rounds)
        if outside == 4 * width:
            apart, inside_it = (compiled(one, x) for one in (GeluApart(linear), GeluInside(linear)))
            yield of_layer(f"{inside} x {outside} and GELU", rows, "bfloat16", apart, "GELU inside", inside_it, rounds)


def of_layer(what: str, rows: int, a: str, plain: Callable[[], Tensor], b: str, call: Callable[[], Tensor],
             rounds: int) -> Row:
    """A row of two calls of a layer, launched as CUDA graphs."""
    times = compare(captured(plain, REPEATS).replay, captured(call, REPEATS).replay, rounds)
    seconds = {key: float(f"{times[key] / REPEATS:.4g}") for key in ("a_seconds", "b_seconds")}
    return {"what": f"layer {what}", "batch": rows, "a": a, "b": b, **times, **seconds,
            "b_error": relative(call(), plain().float())}


class GeluApart(nn.Module):
    """A layer, and a pass over its output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in_features) to (rows, out_features)."""
        return gelu(self.linear(x))


class GeluInside(nn.Module):
    """A layer that computes the GELU of its output itself."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = GeluLinear.of(linear)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in_features) to (rows, out_features)."""
        return self.linear(x, gelu=True)


def compiled(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call of the compiled layer."""
    torch.compiler.reset()
    return partial(torch.compile(layer, dynamic=False), x)


def models(preset: str, images: int, forms: list[str], rounds: int) -> Iterator[Row]:
    """Rows of a preset's forward for so many guided images."""
    torch.compiler.reset()
    plain = Pipeline(random_model(preset, "cuda"))
    baseline = plain.copy().replace(runtime=Compile().apply(plain, context(plain)).runtime)
    config = plain.model.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * images, config.channels, *config.input_size, generator=generator).cuda()
    t = torch.randint(0, 1000, (2 * images,), generator=generator).cuda()
    y = torch.randint(0, config.classes + 1, (2 * images,), generator=generator).cuda()
    forward, expected = call_of(baseline, x, t, y), call_of(plain, x, t, y)()
    best = f"compiled {baseline.runtime.dtype}"
    others = {"eager float32": plain, f"eager {baseline.runtime.dtype}": plain.replace(
        runtime=Runtime(baseline.runtime.dtype))}
    calls = {name: call_of(pipeline, x, t, y) for name, pipeline in others.items()}
    calls[f"{best} without CUDA graphs"] = without_graphs(baseline, x, t, y)
    for name, call in calls.items():
        yield {"what": preset, "batch": f"{images} guided", "a": name, "b": best, **compare(call, forward, rounds),
               "b_error": relative(forward(), expected), "b_mib": held(baseline)}
    for form in forms:
        changed = FORMS[form]().apply(plain.copy(), context(plain))
        exact = call_of(changed, x, t, y)() if form == "2:4" else expected
        ours = changed.replace(runtime=baseline.runtime)
        call = call_of(ours, x, t, y)
        sparse = sum(isinstance(layer, SparseLinear) for layer in ours.denoise.model.modules())
        yield {"what": preset, "batch": f"{images} guided", "a": best,
               "b": f"{form}, {sparse} layers" if sparse else form, **compare(forward, call, rounds),
               "b_error": relative(call(), exact), "b_mib": held(ours)}


def context(pipeline: Pipeline) -> Context:
    """A context on the GPU that writes nothing."""
    return Context(pipeline, Path("unused"), device="cuda")


def call_of(pipeline: Pipeline, x: Tensor, t: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """A forward as sampling runs it: adaLN computed ahead."""
    denoise = pipeline.denoise
    return partial(denoise, x, t, y, denoise.model.modulations(t, y))


def without_graphs(pipeline: Pipeline, x: Tensor, t: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """The same forward compiled, its kernels launched one by one."""
    model, dtype = pipeline.denoise.model, pipeline.denoise.dtype
    return partial(torch.compile(model, dynamic=False), x.to(dtype), t, y, model.modulations(t, y))


def held(pipeline: Pipeline) -> int:
    """MiB of the weights that are executed."""
    return round(weight_bytes(pipeline.denoise.model) / 2**20)


if __name__ == "__main__":
    settle()
    with torch.inference_mode():
        main()
