"""What a model costs by computation, not by clock: multiply-accumulates, parameters and bytes.

MACs are exact, counted from the config alone, attention included. What the literature calls "GFLOPs" of a DiT are
GMACs (DiT-XL/2 at 256x256: 118.6); a FLOP count is twice the MACs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from ..models.dit import FREQUENCIES, BlockConfig, DiT, DiTConfig
from ..sampling.process import NoiseProcess
from ..sampling.solvers import Sampling, evaluations, skipped


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass of one image, by the part that makes them.

    Attributes:
        embedding: patches to tokens.
        condition: the two linear layers of the timestep embedding; the label is a look-up.
        modulation: the adaLN layers of the blocks and of the final layer, once per image.
        attention_linears: qkv and the output projection.
        attention_mixing: scores and weighted sums, fused or not, and a convolution of the values.
        mlp: both linear layers of every block; of experts, those that tokens are put through.
        routing: scores of experts.
        output: the final linear layer.
    """

    embedding: int
    condition: int
    modulation: int
    attention_linears: int
    attention_mixing: int
    mlp: int
    routing: int
    output: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiplication and an addition for every MAC."""
        return 2 * self.total


def macs(config: DiTConfig) -> Macs:
    """Multiply-accumulates of one forward pass of one image.

    Norms, activations, averages, biases and additions are left out, as is the field's custom. A layer of packed
    integers counts as the layer it replaced.

    Raises:
        ValueError: a block has an attention kind that this count does not know.
    """
    width, tokens, patch_area = config.width, config.tokens, config.patch**2
    attention = [_attention_macs(block, width, tokens) for block in config.blocks]
    feed_forward = [_feed_forward_macs(block, width, tokens) for block in config.blocks]
    return Macs(
        embedding=tokens * patch_area * config.channels * width,
        condition=FREQUENCIES * width + width * width,
        modulation=sum(_modulation_macs(width, 6 * width, block.adaln_rank) for block in config.blocks)
        + _modulation_macs(width, 2 * width, config.final_adaln_rank),
        attention_linears=sum(linears for linears, _ in attention),
        attention_mixing=sum(mixing for _, mixing in attention),
        mlp=sum(mlp for mlp, _ in feed_forward),
        routing=sum(routing for _, routing in feed_forward),
        output=tokens * width * patch_area * config.out_channels,
    )


def run_macs(config: DiTConfig, process: NoiseProcess, sampling: Sampling) -> int:
    """Multiply-accumulates of a whole sampling run of one image: every step, guidance counted.

    A step whose blocks are foretold takes what is around them.
    """
    one = macs(config)
    around = one.total - one.attention_linears - one.attention_mixing - one.mlp - one.routing
    return one.total * evaluations(process, sampling) + around * skipped(process, sampling)


def parameters(config: DiTConfig) -> int:
    """Numbers that make up the model, whatever precision stores them.

    As in the literature's counts, the fixed position embedding (tokens x width) is among them: the original DiT holds
    it as a frozen parameter.
    """
    with torch.device("meta"):
        model = DiT(replace(config, linears={}))
    return sum(p.numel() for p in model.parameters()) + config.tokens * config.width


def file_bytes(saved: Path) -> int:
    """Size of a saved model: bytes of its .safetensors files, anywhere in the folder, or of the one file.

    Raises:
        FileNotFoundError: there are none.
    """
    files = [saved] if saved.is_file() else sorted(saved.rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{saved} holds no .safetensors file: name the folder of a saved model")
    return sum(file.stat().st_size for file in files)


def _modulation_macs(width: int, outputs: int, rank: int | None) -> int:
    return width * outputs if rank is None else rank * (width + outputs)


def _attention_macs(block: BlockConfig, width: int, tokens: int) -> tuple[int, int]:
    """MACs of the two linear layers, and of everything between them."""
    if block.attention not in MIXING_MACS:
        raise ValueError(f"cost: attention {block.attention!r} has no MAC count; add one to MIXING_MACS")
    inner, shared = block.heads * block.head_dim, (block.kv_heads or block.heads) * block.head_dim
    convolution = tokens * shared * block.conv ** 2 if block.conv else 0
    return tokens * width * (2 * inner + 2 * shared), MIXING_MACS[block.attention](block, tokens) + convolution


def _feed_forward_macs(block: BlockConfig, width: int, tokens: int) -> tuple[int, int]:
    if block.experts:
        return block.experts.macs(block.mlp_width, width, tokens)
    return 2 * tokens * width * block.mlp_width, 0


def _softmax_macs(block: BlockConfig, tokens: int) -> int:
    """Every token asks every other: scores, then weighted sums. That heads share keys changes nothing here."""
    return 2 * tokens * tokens * block.heads * block.head_dim


def _mediated_macs(block: BlockConfig, tokens: int) -> int:
    """Mediators ask the tokens, and tokens the mediators."""
    rows, columns = block.mediators or (0, 0)
    return 4 * rows * columns * tokens * block.heads * block.head_dim


def _focused_macs(block: BlockConfig, tokens: int) -> int:
    """Sums of keys times values, what each query takes of them, and its denominator."""
    state, query = block.head_dim ** 2, block.head_dim ** 2 + block.head_dim
    return tokens * ((block.kv_heads or block.heads) * state + block.heads * query)


MIXING_MACS: Mapping[str, Callable[[BlockConfig, int], int]] = {
    "softmax": _softmax_macs, "mediated": _mediated_macs, "focused": _focused_macs,
}
"""MACs of the mixing of tokens by attention kind, from (block, tokens)."""
