"""Store linear layers in 8 or 4 bits, and multiply 8-bit numbers too where asked: a quarter of the bytes, or a seventh.

int8 weights are symmetric per output channel, activations per token as they come ("LLM.int8()", arXiv 2208.07339):
activations change their range along the timesteps, so no range is fixed beforehand (Q-DiT, arXiv 2406.17343, section
3) unless `int8_static` asks for one, which is what OpenVINO multiplies fastest. int4 weights have a scale and a zero
per group and are multiplied as floats. fp8 is for GPUs that multiply it; layers too narrow to gain by it run in the
runtime's precision. Where a choice needs inputs (GPTQ, SmoothQuant, ranges), they are those of the pipeline's own
sampling runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from ..context import Context, require

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.dit import DiT
    from ..pipeline import Pipeline
    from ..training.calibration import Call

KINDS = {("int8", None): "int8_weight_only", ("int8", "int8"): "int8_dynamic", ("int8", "int8_static"): "int8_static",
         ("int4", None): "int4_weight_only", ("fp8", "fp8"): "fp8_dynamic"}
ROUNDINGS = {"int8": ("nearest", "gptq"), "int4": ("nearest", "hqq", "gptq"), "fp8": ("nearest",)}
GROUP, SMALLEST_GROUP = 128, 16
SMALLEST_FACTOR = 1e-3
PROTECTED = ("t_embedder.*", "final_layer.*", "*adaLN_modulation*: int8")
FINER = {"int4_weight_only": "int8_weight_only", "int8_dynamic": "int8_weight_only",
         "int8_static": "int8_weight_only"}
KEPT_AS = {"": None, "int8": "int8_weight_only"}  # what a protected layer is stored as, by what follows the pattern


@dataclass(frozen=True)
class Quantize:
    """Round linear layers to few bits.

    Attributes:
        weights: numbers the weights are stored as.
        activations: numbers the layers' inputs are rounded to, or None to multiply in the runtime's precision. `"int8"`
            looks at every token for its range as it comes; `"int8_static"` has one range a layer, calibrated.
        group: how many int4 weights of a row share a scale; must divide every row. None is 128 where it divides a row,
            else the largest number below that does.
        rounding: how integers are chosen: `"nearest"`; `"hqq"` moves int4's zeros to where most weights are closer;
            `"gptq"` keeps the layers' outputs close on calibrated inputs, block after block.
        smooth: 0..1, how much of their inputs' range qkv, proj and fc1 hand to their weights (SmoothQuant's alpha;
            0.5 is its authors'), or None for nothing. Folded into the layers before: it costs nothing to run. fc2
            stands behind a GELU, which lets no factor through, and is left alone.
        protect: patterns of module names to spare; the first that matches decides. A layer stays float, or, where
            `: int8` follows the pattern, has int8 weights and is multiplied in float. The default spares what runs
            once per image or not at all in most of the time, and amplifies errors: the embedding of the timestep, the
            final layer, and, with int8 weights because it is a third of the bytes, adaLN. `[]` spares nothing.
        images: how many sampled images to calibrate on, where rounding, smoothing or static ranges need it.
        sensitivity: file or folder that `slimdit sensitivity` wrote for the model as it is here, or None. The fewest
            layers that cause the share `spare` of its errors then become one kind finer than the others: int8 weights
            multiplied in float instead of int4 weights or int8 activations, and float instead of int8 weights.
        spare: that share.

    Raises:
        ValueError: an option, or the two kinds of number together, are not supported.
    """

    weights: Literal["int8", "int4", "fp8"] = "int8"
    activations: Literal["int8", "int8_static", "fp8"] | None = None
    group: int | None = None
    rounding: Literal["nearest", "hqq", "gptq"] = "nearest"
    smooth: float | None = None
    protect: tuple[str, ...] = PROTECTED
    images: int = 32
    sensitivity: str | None = None
    spare: float = 0.3

    def __post_init__(self) -> None:
        if (self.weights, self.activations) not in KINDS:
            raise ValueError(f"quantize: weights {self.weights!r} with activations {self.activations!r} are not "
                             'supported; use weights "int8" with activations "int8", "int8_static" or left out, "int4" '
                             'with activations left out, or "fp8" with "fp8"')
        if self.rounding not in ROUNDINGS[self.weights]:
            raise ValueError(f"quantize: rounding {self.rounding!r} does not go with {self.weights}; use one of "
                             f"{', '.join(ROUNDINGS[self.weights])}")
        if self.group is not None and (self.weights != "int4" or not 1 <= self.group < 10 ** 6):
            raise ValueError(f"quantize: group {self.group!r} must be a number of weights above 0, and only int4 has "
                             "groups: leave it out with other weights")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ValueError(f"quantize: smooth {self.smooth!r} is outside 0..1")
        if self.images < 1:
            raise ValueError(f"quantize: images must be at least 1 to calibrate on, not {self.images}")
        if not 0 <= self.spare <= 1:
            raise ValueError(f"quantize: spare {self.spare!r} is outside 0..1")
        for pattern in self.protect:
            if split(pattern)[1] not in KEPT_AS:
                raise ValueError(f"quantize: protect pattern {pattern!r} must be a pattern of names, alone or followed "
                                 "by ': int8'")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Pack the layers that are not spared."""
        from ..models.surgery import packable_linears, weight_bytes

        model = pipeline.model
        require(not model.config.linears, f"quantize needs float weights, and {len(model.config.linears)} layers are "
                                          "packed already: quantize once, from the float model")
        if self.weights == "fp8":
            require_float8(context)
        names = packable_linears(model)
        self.require_patterns(names)
        spared = self.most_sensitive(names, context)
        finer = FINER.get(self.coarse_kind.partition(":")[0])
        wanted = {name: finer if name in spared else self.kind(name) for name in names}
        kinds = {name: kind for name, kind in wanted.items() if kind is not None}
        if not context.rehearsal:  # the twin's rows are of other lengths
            self.require_groups(model, kinds)
        before, calibrated = weight_bytes(model), {}
        if kinds and (self.smooth is not None or self.rounding == "gptq" or self.activations == "int8_static"):
            calibrated = self.calibrate_and_pack(pipeline, kinds, context)
        else:
            self.pack(model, kinds)
        context.witness(layers=dict(Counter(kinds.values())), layers_left_float=len(names) - len(kinds),
                        layers_spared=spared, bytes_before=before, bytes_after=weight_bytes(model),
                        rounding=self.rounding, **calibrated)
        return pipeline.replace(model=model)

    def kind(self, name: str) -> str | None:
        """The kind of layer that `models/linear.py` has for this one, or None where it stays float."""
        for pattern, kept in map(split, self.protect):
            if fnmatchcase(name, pattern):
                return KEPT_AS[kept]
        return self.coarse_kind

    @property
    def coarse_kind(self) -> str:
        """The kind of the layers that nothing spares."""
        kind = KINDS[self.weights, self.activations]
        return f"{kind}:{self.group or GROUP}" if self.weights == "int4" else kind

    def most_sensitive(self, names: list[str], context: Context) -> list[str]:
        """The layers among those of the coarsest kind that cause most of the measured error, the worst first."""
        from ..allocation import measured_errors, protected

        errors = measured_errors("quantize", self.sensitivity)
        if context.rehearsal or not errors:  # the twin has other layers
            return []
        coarse = [name for name in names if not any(fnmatchcase(name, split(pattern)[0]) for pattern in self.protect)]
        missing = [name for name in coarse if name not in errors]
        require(not missing, f"quantize: {self.sensitivity} says nothing of {''.join(missing[:1])!r}: measure this "
                             "model with `slimdit sensitivity MODEL --perturb int8`")
        return protected({name: errors[name] for name in coarse}, self.spare)

    def require_patterns(self, names: list[str]) -> None:
        """Refuse a pattern that spares nothing: a slip of the pen would go unseen."""
        for pattern in set(self.protect) - set(PROTECTED):
            wanted = split(pattern)[0]
            nearest = get_close_matches(wanted, names, 1, 0)
            require(any(fnmatchcase(name, wanted) for name in names),
                    f"quantize: protect pattern {pattern!r} matches no linear layer that can be packed"
                    + "".join(f"; the nearest is {near!r}" for near in nearest))

    def require_groups(self, model: DiT, kinds: dict[str, str]) -> None:
        """Refuse groups that do not divide every row, and rows that only tiny groups divide."""
        from ..models.int4 import fitting_group
        from ..models.linear import float_linear

        rows: dict[int, str] = {}  # their lengths, each with the first layer that has it
        for name, kind in kinds.items():
            if ":" in kind:
                rows.setdefault(float_linear(model, name).in_features, name)
        fitting = [size for size in range(1, min(rows, default=0) + 1) if not any(row % size for row in rows)]
        for row, name in rows.items():
            require(not self.group or row % self.group == 0,
                    f"quantize: groups of {self.group} do not divide the {row} inputs of {name}: use a group of "
                    f"{', '.join(map(str, fitting))}, or leave group out")
            require(self.group or fitting_group(row, GROUP) >= min(row, SMALLEST_GROUP),
                    f"quantize: no group of {SMALLEST_GROUP} to {GROUP} divides the {row} inputs of {name}: protect "
                    "it, or use int8")

    def calibrate_and_pack(self, pipeline: Pipeline, kinds: dict[str, str], context: Context) -> dict[str, Any]:
        """Smooth, pack and fix ranges on the inputs that the pipeline's own sampling gives; what it was, to witness."""
        from ..training.calibration import (
            absolute_maxima,
            deployed_calls,
            described,
            input_grids,
            output_error,
            outputs,
        )

        model, images = pipeline.model, 1 if context.rehearsal else self.images
        context.report(f"quantize: sampling {images} images to calibrate on")
        calls = deployed_calls(pipeline, images=images, seed=context.seed)
        expected = outputs(model, calls)
        maxima = absolute_maxima(model, calls, kinds)
        smoothed = 0 if self.smooth is None else smooth(model, kinds, maxima, self.smooth)
        grids = input_grids(model, calls, [name for name, kind in kinds.items() if kind == "int8_static"], context.seed)
        for block, names in groupby(kinds, key=block_of):
            context.report(f"quantize: {block}")
            self.pack(model, {name: kinds[name] for name in names}, calls)
        for name, (step, zero) in grids.items():
            fix_range(model, name, step, zero)
        return {"layers_smoothed": smoothed, "output_error": float(f"{output_error(model, calls, expected):.3g}"),
                "calibration": described(pipeline, calls, maxima, context.seed)}

    def pack(self, model: DiT, kinds: dict[str, str], calls: Sequence[Call] = ()) -> None:
        """Pack layers; gptq on the inputs they have by now, in a model whose earlier blocks are packed."""
        from ..models.linear import float_linear
        from ..models.rounding import gptq, hqq
        from ..models.surgery import integer_grid, pack_linears
        from ..training.calibration import hessians

        sums = hessians(model, calls, kinds) if self.rounding == "gptq" else {}
        rounded = {}
        for name, kind in kinds.items():
            grid, group = integer_grid(model, name, kind) or (None, 0)
            weight = float_linear(model, name).weight
            if self.rounding == "gptq" and grid:
                rounded[name] = gptq(weight, sums[name], grid, group)
            elif self.rounding == "hqq" and grid and not grid.symmetric:
                rounded[name] = hqq(weight, grid, group)
        pack_linears(model, kinds, rounded)


def fix_range(model: DiT, name: str, step: float, zero: int) -> None:
    """Let a static layer round its inputs to round(x / step) + zero."""
    layer = model.get_submodule(name)
    layer.get_buffer("step").fill_(step)
    layer.get_buffer("zero").fill_(zero)


def require_float8(context: Context) -> None:
    """Refuse fp8 where nothing multiplies it."""
    import torch

    from ..models.fp8 import CAPABILITY

    newest = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    require(newest and newest >= CAPABILITY and (context.rehearsal or context.device.startswith("cuda")),
            f"quantize: fp8 needs a CUDA device of compute capability {'.'.join(map(str, CAPABILITY))} or newer, and "
            f"this is {context.device}{' of ' + '.'.join(map(str, newest)) if newest else ' without one'}: use "
            'weights "int8" with activations "int8"')


def smooth(model: DiT, kinds: dict[str, str], maxima: dict[str, Tensor], alpha: float) -> int:
    """Fold SmoothQuant's factors for every layer to be packed that can take them; how many could."""
    from ..models.linear import float_linear
    from ..models.surgery import SMOOTHABLE, smooth_inputs, unsmoothable

    chosen = list(smoothable(kinds, SMOOTHABLE))
    for block, layer in chosen:
        reason = unsmoothable(model, block, layer)
        require(not reason, f"quantize: {reason}")
    for block, layer in chosen:
        name = f"blocks.{block}.{layer}"
        smooth_inputs(model, block, layer, divisor(maxima[name].amax(0), float_linear(model, name).weight, alpha))
    return len(chosen)


def smoothable(kinds: dict[str, str], layers: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Block and name of the layers to be packed that are among `layers`, in the order of those within a block."""
    blocks = sorted({int(name.split(".")[1]) for name in kinds if name.startswith("blocks.")})
    return ((block, layer) for block in blocks for layer in layers if f"blocks.{block}.{layer}" in kinds)


def divisor(inputs: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's s = max|x|^alpha / max|W|^(1 - alpha) per input channel (arXiv 2211.10438, equation 4).

    Only ratios between channels matter, since every token and every row has a scale of its own; so the largest is made
    1. Smaller ones then enlarge what adaLN adds to 1, which bfloat16 keeps; larger ones would leave a small difference
    from -1, which it does not. A channel silent on the calibrated inputs is not enlarged without limit.
    """
    inputs, columns = inputs.clamp(min=1e-5), weight.abs().amax(0).clamp(min=1e-5)
    factor = inputs ** alpha / columns ** (1 - alpha)
    return (factor / factor.amax()).clamp(min=SMALLEST_FACTOR)


def block_of(name: str) -> str:
    """The part of the model that runs as one: blocks.3, final_layer, t_embedder."""
    return ".".join(name.split(".")[:2 if name.startswith("blocks.") else 1])


def split(pattern: str) -> tuple[str, str]:
    """A pattern of names, and what follows it."""
    names, _, kept = pattern.partition(":")
    return names.strip(), kept.strip()
