"""Changing a model's layers in place: the only code that does, so that its config always says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import SoftmaxAttention
from .dit import Block, DiT, FinalLayer
from .feedforward import MLP
from .linear import LowRank, pack_linear

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


def keep_units(model: DiT, block: int, units: Sequence[int]) -> None:
    """Cut a block's MLP down to these hidden units: rows of fc1, columns of fc2.

    Raises:
        ValueError: layers are packed, the feed-forward is another, or the units are not ascending and in range.
    """
    mlp = _cuttable(model, block).mlp
    if not isinstance(mlp, MLP):
        raise ValueError(f"block {block}: only the units of an MLP can be cut, and this is {type(mlp).__name__}")
    kept = _chosen(units, mlp.fc1.out_features, f"block {block}: units")
    _keep_rows(mlp.fc1, kept)
    _keep_columns(mlp.fc2, kept)
    _describe(model, block, mlp_width=len(kept))


def keep_heads(model: DiT, block: int, heads: Sequence[int]) -> None:
    """Cut a block's attention down to these heads: their rows of q, k and v, their columns of the projection.

    Raises:
        ValueError: layers are packed, the attention is not softmax, or the heads are not ascending and in range.
    """
    attention = _cuttable(model, block).attn
    if type(attention) is not SoftmaxAttention:
        raise ValueError(f"block {block}: only heads of softmax attention can be cut, and this is "
                         f"{type(attention).__name__}")
    kept = _chosen(heads, attention.heads, f"block {block}: heads")
    inner = attention.heads * attention.head_dim
    columns = torch.arange(inner).view(attention.heads, attention.head_dim)[kept].flatten()
    _keep_rows(attention.qkv, torch.cat([columns, columns + inner, columns + 2 * inner]))
    _keep_columns(attention.proj, columns)
    attention.heads = len(kept)
    _describe(model, block, heads=len(kept))


def keep_blocks(model: DiT, blocks: Sequence[int]) -> None:
    """Leave out all blocks but these.

    Raises:
        ValueError: layers are packed, or the blocks are not ascending and in range.
    """
    _require_float(model)
    kept = _chosen(blocks, len(model.blocks), "blocks").tolist()
    model.blocks = nn.ModuleList(model.blocks[number] for number in kept)
    model.config = replace(model.config, blocks=tuple(model.config.blocks[number] for number in kept))


def put_modulation(model: DiT, block: int | None, pair: LowRank) -> None:
    """Put a pair in the place of adaLN's linear layer in a block, or in the final layer where `block` is None.

    Raises:
        ValueError: layers are packed, there is a pair already, or the pair is of other sizes.
    """
    _require_float(model)
    owner: Block | FinalLayer = model.final_layer if block is None else model.blocks[block]  # type: ignore[assignment]
    full = owner.adaLN_modulation[1]
    sizes = pair.up.out_features, pair.down.in_features
    if not isinstance(full, nn.Linear) or full.weight.shape != sizes:
        raise ValueError(f"adaLN: a pair from {sizes[1]} to {sizes[0]} features cannot stand for {full}")
    owner.adaLN_modulation[1] = pair.to(full.weight)
    if block is None:
        model.config = replace(model.config, final_adaln_rank=pair.down.out_features)
    else:
        _describe(model, block, adaln_rank=pair.down.out_features)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of everything a saved model stores."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _cuttable(model: DiT, block: int) -> Block:
    _require_float(model)
    found = model.blocks[block]
    assert isinstance(found, Block)
    return found


def _require_float(model: DiT) -> None:
    """Packed layers hold a scale per row and are named in the config: cutting comes before packing."""
    if model.config.linears:
        raise ValueError(f"{len(model.config.linears)} layers are packed integers: cut the float model, then pack it")


def _chosen(numbers: Sequence[int], count: int, what: str) -> Tensor:
    """What is kept, as an index; its order is the model's own."""
    listed = [int(number) for number in numbers]
    if not listed or listed != sorted(set(listed)) or not 0 <= listed[0] <= listed[-1] < count:
        raise ValueError(f"{what} to keep must be at least one of 0..{count - 1}, ascending, not {listed}")
    return torch.tensor(listed)


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    rows = rows.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach()[rows])
    linear.bias = nn.Parameter(linear.bias.detach()[rows])
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[:, columns.to(linear.weight.device)].contiguous())
    linear.in_features = len(columns)


def _describe(model: DiT, block: int, **changes: Any) -> None:
    """Let the config say what a block now is."""
    blocks = list(model.config.blocks)
    blocks[block] = replace(blocks[block], **changes)
    model.config = replace(model.config, blocks=tuple(blocks))
