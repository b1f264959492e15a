"""Changing a model's layers in place: the only code that does, so that its config always says what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .attention import SoftmaxAttention
from .dit import DiT
from .linear import float_linear, linear_kind, pack_linear, set_linear
from .rounding import Grid, Rounded

SMOOTHABLE = ("attn.proj", "attn.qkv", "mlp.fc1")
"""Layers of a block whose inputs `smooth_inputs` can scale, in the order to do it in: proj's changes qkv's weights."""


def packable_linears(model: DiT) -> list[str]:
    """Names of the float linear layers, in the order the model runs them in."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def pack_linears(model: DiT, kinds: Mapping[str, str], rounded: Mapping[str, Rounded] | None = None) -> None:
    """Quantize layers in place to the kinds of `models/linear.py`, by name.

    Args:
        rounded: the integers of some of them, where they are not the nearest ones.

    Raises:
        ValueError: a kind is unknown, or a name is not a float linear layer.
    """
    for name, kind in kinds.items():
        pack_linear(model, name, kind, (rounded or {}).get(name))
    model.config = replace(model.config, linears={**model.config.linears, **kinds})


def integer_grid(model: DiT, name: str, kind: str) -> tuple[Grid, int] | None:
    """The grid and the group of a float layer's weights in a kind, or None where they become no integers.

    Raises:
        ValueError: the kind is unknown.
    """
    layer, options = linear_kind(name, kind)
    with torch.device("meta"):
        packed = layer(float_linear(model, name).in_features, 1, **options)
    return (layer.GRID, packed.group) if layer.GRID else None


@torch.no_grad()
def smooth_inputs(model: DiT, block: int, layer: str, divisor: Tensor) -> None:
    """Divide a layer's inputs by a number per channel and multiply its weights' columns by it: the same outputs.

    SmoothQuant (arXiv 2211.10438, equation 3) at no cost. The norms before qkv and fc1 have no weights, so that the
    division goes where their input is shifted and scaled, into the adaLN rows: x (1 + scale) + shift, divided by s,
    is x (1 + scale') + shift' with scale' = scale / s + (1 / s - 1) and shift' = shift / s. Attention mixes values
    channel by channel, so that proj's goes into the value rows of qkv. fc2 stands behind a GELU, which no division
    passes through.

    Args:
        layer: one of `SMOOTHABLE`.
        divisor: (in_features,), above 0.

    Raises:
        ValueError: `unsmoothable` says why not.
    """
    if reason := unsmoothable(model, block, layer):
        raise ValueError(reason)
    where = model.blocks[block]
    linear, source = float_linear(where, layer), float_linear(where, _source(layer))
    linear.weight.mul_(divisor)
    if layer == "attn.proj":
        _divide_rows(source, 2, divisor)
        return
    first = 0 if layer == "attn.qkv" else 3  # adaLN's six parts: shift, scale and gate of attention, then of the MLP
    _divide_rows(source, first, divisor)
    _divide_rows(source, first + 1, divisor)
    width = len(divisor)
    source.bias[(first + 1) * width:(first + 2) * width] += 1 / divisor - 1


def unsmoothable(model: DiT, block: int, layer: str) -> str:
    """Why the inputs of a block's layer cannot be divided, in a sentence with its remedy; empty where they can."""
    where, part = model.blocks[block], f"blocks.{block}.{layer}"
    if layer not in SMOOTHABLE:
        return f"no division of the inputs of {part} can be folded: use one of {', '.join(SMOOTHABLE)}"
    if layer.startswith("attn.") and type(where.attn) is not SoftmaxAttention:
        return f"smoothing is worked out for softmax attention alone: protect {part}, or leave smooth out"
    modules = dict(where.named_modules())
    for name in (layer, _source(layer)):
        if type(modules.get(name)) is not nn.Linear:
            return (f"smoothing {part} needs blocks.{block}.{name} to be a plain float linear layer, and it is not: "
                    "leave smooth out")
    return ""


def _source(layer: str) -> str:
    """The layer of a block that the division of another's inputs goes into."""
    return "attn.qkv" if layer == "attn.proj" else "adaLN_modulation.1"


def _divide_rows(linear: nn.Linear, part: int, divisor: Tensor) -> None:
    """Divide the outputs of one of a layer's parts, each as long as the divisor."""
    rows = slice(part * len(divisor), (part + 1) * len(divisor))
    linear.weight[rows] /= divisor[:, None]
    linear.bias[rows] /= divisor


def weight_bytes(model: nn.Module) -> int:
    """Bytes of everything a saved model stores."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@contextmanager
def other_weight(model: DiT, name: str, weight: Tensor) -> Iterator[None]:
    """While inside, the float linear layer called `name` has another weight; then its own again, to the bit.

    Raises:
        ValueError: it is not a float linear layer of the model.
    """
    linear = float_linear(model, name)
    own = linear.weight
    linear.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        linear.weight = own


@contextmanager
def without_block(model: DiT, name: str) -> Iterator[None]:
    """While inside, the block called `name` (`blocks.3`) is the identity; then it stands in its place again."""
    block = model.get_submodule(name)
    set_linear(model, name, Passage())
    try:
        yield
    finally:
        set_linear(model, name, block)


class Passage(nn.Module):
    """What is left of a block that is taken out: tokens pass as they are."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        return x
