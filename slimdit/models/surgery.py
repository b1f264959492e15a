"""Changing a model's layers in place: the only code that does, so that its config always says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .dit import DiT
from .linear import pack_linear

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


@torch.no_grad()
def zero_weights(model: nn.Module, removed: Mapping[str, Tensor]) -> None:
    """Set weights of float linear layers to zero in place: by layer, where a mask of the weight's shape is true."""
    for name, mask in removed.items():
        model.get_submodule(name).get_parameter("weight").masked_fill_(mask, 0)  # a product could give -0.0


@torch.no_grad()
def pruned_weights(model: nn.Module, least: float = 0.1) -> dict[str, Tensor]:
    """Where the weights of float linear layers were pruned to zero: by layer, a mask of the weight's shape.

    Args:
        least: share of zeros above which a layer counts as pruned. One that is zero throughout does not: that is a
            layer which has yet to learn (adaLN-Zero), not a pruned one.
    """
    masks = {name: module.weight == 0 for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: mask for name, mask in masks.items() if least * mask.numel() < int(mask.sum()) < mask.numel()}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of everything a saved model stores."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
