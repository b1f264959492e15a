"""Changing a model's layers in place: the only code that does, so that its config always says what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention, is_plain
from .dit import Block, BlockConfig, DiT, DiTConfig, FinalLayer, PatchEmbedder, attention_of, position_embedding
from .experts import TimestepExperts, TokenExperts, feed_forward
from .experts_config import ExpertsConfig
from .feedforward import MLP
from .linear import LowRank, float_linear, linear_kind, pack_linear, set_linear
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
    is x (1 + scale') + shift' with scale' = scale / s + (1 / s - 1) and shift' = shift / s. Attention of any kind mixes
    values channel by channel, so that proj's goes into the value rows of qkv. fc2 stands behind a GELU, which no
    division passes through.

    Args:
        layer: one of `SMOOTHABLE`.
        divisor: (in_features,), above 0.

    Raises:
        ValueError: `unsmoothable` says why not.
    """
    if reason := unsmoothable(model, block, layer):
        raise ValueError(reason)
    where: Any = model.blocks[block]
    linear, source = float_linear(where, layer), float_linear(where, _source(layer))
    linear.weight.mul_(divisor)
    if layer == "attn.proj":
        _divide_rows(source, 2, divisor)
        if where.attn.conv is not None:  # whose weights meet the divided values
            where.attn.conv.bias /= divisor
        return
    first = 0 if layer == "attn.qkv" else 3  # adaLN's six parts: shift, scale and gate of attention, then of the MLP
    _divide_rows(source, first, divisor)
    _divide_rows(source, first + 1, divisor)
    width = len(divisor)
    source.bias[(first + 1) * width:(first + 2) * width] += 1 / divisor - 1


def unsmoothable(model: DiT, block: int, layer: str) -> str:
    """Why the inputs of a block's layer cannot be divided, in a sentence with its remedy; empty where they can."""
    where: Any = model.blocks[block]
    part = f"blocks.{block}.{layer}"
    if layer not in SMOOTHABLE:
        return f"no division of the inputs of {part} can be folded: use one of {', '.join(SMOOTHABLE)}"
    if layer.startswith("attn.") and not isinstance(where.attn, Attention):
        return f"smoothing is worked out for softmax attention alone: protect {part}, or leave smooth out"
    if layer == "attn.proj" and not where.attn.is_whole:
        return f"the inputs of {part} share their values between heads: protect it, or leave smooth out"
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
        ValueError: layers are packed, the attention is not plain softmax, or the heads are not ascending and in range.
    """
    attention = _cuttable(model, block).attn
    if not is_plain(attention):
        raise ValueError(f"block {block}: only heads of plain softmax attention can be cut, and it has "
                         f"another ({type(attention).__name__})")
    kept = _chosen(heads, attention.heads, f"block {block}: heads")
    inner = attention.heads * attention.head_dim
    columns = torch.arange(inner).view(attention.heads, attention.head_dim)[kept].flatten()
    _keep_rows(attention.qkv, torch.cat([columns, columns + inner, columns + 2 * inner]))
    _keep_columns(attention.proj, columns)
    attention.heads = attention.kv_heads = len(kept)
    _describe(model, block, heads=len(kept))


def put_attention(model: DiT, block: int, config: BlockConfig, attention: Attention) -> None:
    """Put another attention in the place of a block's, as a config of the block describes it.

    Raises:
        ValueError: layers are packed, or the attention does not have the names and shapes that the config says.
    """
    place = _cuttable(model, block)
    with torch.device("meta"):
        expected = attention_of(model.config.width, config, model.config.grid).state_dict()
    if {name: tensor.shape for name, tensor in expected.items()} != {
            name: tensor.shape for name, tensor in attention.state_dict().items()}:
        raise ValueError(f"block {block}: the attention is not the one that {config} describes")
    place.attn = attention
    blocks = list(model.config.blocks)
    blocks[block] = config
    model.config = replace(model.config, blocks=tuple(blocks))


def keep_blocks(model: DiT, blocks: Sequence[int]) -> None:
    """Leave out all blocks but these.

    Raises:
        ValueError: layers are packed, or the blocks are not ascending and in range.
    """
    _require_float(model)
    kept = _chosen(blocks, len(model.blocks), "blocks").tolist()
    model.blocks = nn.ModuleList(model.blocks[number] for number in kept)
    model.config = replace(model.config, blocks=tuple(model.config.blocks[number] for number in kept))


def even_blocks(depth: int, keep: int) -> list[int]:
    """Which of `depth` blocks to keep: the first, the last, and what is evenly between; one block is the first."""
    last = depth - 1
    return [(2 * place * last + keep - 1) // (2 * (keep - 1)) if place else 0 for place in range(keep)]


def block_macs(config: DiTConfig, units: Sequence[int], heads: Sequence[int]) -> int:
    """Multiply-accumulates of an image's tokens in the blocks with so many units and heads; adaLN is left out."""
    total = 0
    for block, mlp_width, count in zip(config.blocks, units, heads):
        inner = count * block.head_dim
        total += config.tokens * (config.width * (4 * inner + 2 * mlp_width) + 2 * config.tokens * inner)
    return total


@torch.no_grad()
def enlarge_patch(model: DiT, patch: int) -> None:
    """Let one token stand for a square of tokens, every block as it is.

    A token becomes the mean of the tokens that it replaces: the embedder's kernel is repeated over the larger patch and
    divided by their number. What the final layer said of one small patch it says of every one in the square: its rows
    are repeated. Positions are those of the new grid.

    Args:
        patch: side of the new patch, a multiple of the old one.

    Raises:
        ValueError: layers are packed, or the patch is no multiple of the old one or does not divide the input.
    """
    _require_float(model)
    before = model.config
    times, left = divmod(patch, before.patch)
    if left or not times:
        raise ValueError(f"patch {patch} is no multiple of the model's {before.patch}, so that no token stands for "
                         "whole ones")
    config = replace(before, patch=patch)  # refuses what does not divide the input
    small, final = model.x_embedder.proj, model.final_layer.linear
    model.x_embedder = PatchEmbedder(config.channels, config.width, patch).to(small.weight)
    repeated = small.weight.repeat(1, 1, times, times) / times**2
    model.x_embedder.proj.load_state_dict({**small.state_dict(), "weight": repeated})
    rows = torch.arange(final.out_features).view(before.patch, before.patch, config.out_channels)
    _keep_rows(final, rows.repeat(times, times, 1).flatten())
    model.pos_embed = position_embedding(config.grid, config.width)[None].to(model.pos_embed)
    for block in model.blocks:
        setattr(block.attn, "grid", config.grid)  # noqa: B010 (to mypy a block's part may be a tensor)
    model.config = config


@torch.no_grad()
def put_experts(model: DiT, block: int, config: ExpertsConfig, shared: Sequence[int], groups: Sequence[Sequence[int]],
                absent: Tensor | None = None) -> None:
    """Put experts made of a block's hidden units in the place of its MLP: fc1's rows, fc2's columns.

    A token that uses every unit once is answered as before. The routers are to be set afterwards.

    Args:
        shared: the units that every token uses.
        groups: the units of each expert, equally many each; experts may be copies of one another.
        absent: (experts, width), what a token is given in place of an expert's answer where it does not use it; no
            more than one MLP can give it to every token, so there must be shared units. None is nothing.

    Raises:
        ValueError: layers are packed, the feed-forward is another, or the units do not fit the config.
    """
    mlp = _cuttable(model, block).mlp
    if not isinstance(mlp, MLP):
        raise ValueError(f"block {block}: only an MLP can become experts, and this is {type(mlp).__name__}")
    total = len(shared) + sum(map(len, groups))
    if len(shared) != config.shared or [len(group) for group in groups] != [config.units(total)] * config.count:
        raise ValueError(f"block {block}: {len(shared)} shared units and experts of {[len(g) for g in groups]} are not "
                         f"the {config.count} experts beside {config.shared} shared units that the config says")
    if absent is not None and not shared:
        raise ValueError(f"block {block}: what stands for absent experts needs shared units to give it")
    made = feed_forward(model.config.width, total, config).to(mlp.fc1.weight)
    biases = (torch.zeros_like(mlp.fc2.bias) if shared else mlp.fc2.bias).repeat(config.count, 1)
    if absent is not None:
        biases -= absent
    for number, group in enumerate(groups):
        _give_units(made, number, mlp, list(group), biases[number])
    if shared:
        made.shared = _part(mlp, list(shared), mlp.fc2.bias if absent is None else mlp.fc2.bias + absent.sum(0))
    model.blocks[block].mlp = made.train(mlp.training)
    _describe(model, block, mlp_width=total, experts=config)


def _give_units(experts: nn.Module, number: int, mlp: MLP, units: list[int], bias: Tensor) -> None:
    """Let an expert be some of an MLP's units."""
    part = _part(mlp, units, bias)
    if isinstance(experts, TokenExperts):
        experts.experts[number] = part
    elif isinstance(experts, TimestepExperts):
        stacked = experts.experts
        for weights, given in ((stacked.fc1, part.fc1.weight), (stacked.fc1_bias, part.fc1.bias),
                               (stacked.fc2, part.fc2.weight.t()), (stacked.fc2_bias, part.fc2.bias)):
            weights[number] = given


def _part(mlp: MLP, units: list[int], bias: Tensor) -> MLP:
    """An MLP of some of another's units, with this bias at its end."""
    part = MLP(mlp.fc1.in_features, len(units)).to(mlp.fc1.weight)
    part.load_state_dict({"fc1.weight": mlp.fc1.weight[units], "fc1.bias": mlp.fc1.bias[units],
                          "fc2.weight": mlp.fc2.weight[:, units], "fc2.bias": bias})
    return part


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

    def __init__(self) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Identity()

    def forward(self, x: Tensor, modulation: Tensor, t: Tensor, unlabelled: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        return x


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
