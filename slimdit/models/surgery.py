"""Changing a model's layers in place: the only code that does, so that its config always says what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from .dit import DiT
from .linear import float_linear, pack_linear, set_linear

# The embedders stay float: they are a handful of rows, and every token's numbers begin with them.
PACKABLE = ("blocks.", "final_layer.")


def packable_linears(model: DiT) -> list[str]:
    """Names of the float linear layers that can be packed, in the order the model runs them in."""
    return [name for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(PACKABLE)]


def pack_linears(model: DiT, kinds: Mapping[str, str]) -> None:
    """Quantize layers in place to the kinds of `models/linear.py`, by name.

    Raises:
        ValueError: a kind is unknown, or a name is not a float linear layer.
    """
    for name, kind in kinds.items():
        pack_linear(model, name, kind)
    model.config = replace(model.config, linears={**model.config.linears, **kinds})


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
