"""The diffusion transformer: an image of noise, a timestep and a class go in, the noise to remove comes out.

"Scalable Diffusion Models with Transformers" (Peebles and Xie, arXiv 2212.09748), the adaLN-Zero variant. Read this
file first: `DiTConfig` says everything about a model's structure, and `DiT(config)` has exactly its names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention, AttentionForm, FocusedAttention, MediatedAttention, SoftmaxAttention
from .experts import Experts, feed_forward
from .experts_config import ExpertsConfig, experts_config
from .feedforward import MLP
from .linear import LowRank, replace_linear
from .presets import PATCHES, PRESETS

FREQUENCIES = 256  # features of the sinusoidal timestep embedding, fixed in every published DiT
NORM_EPS = 1e-6

ATTENTION: Mapping[str, Callable[..., Attention]] = {
    "softmax": SoftmaxAttention, "mediated": MediatedAttention, "focused": FocusedAttention,
}
"""Attention kinds by the name that `BlockConfig.attention` gives; `attention_of` builds them."""
CONVOLUTIONS = (3, 5)


@dataclass(frozen=True)
class BlockConfig:
    """The structure of one block. Blocks of a model may differ from each other.

    Attributes:
        mlp_width: hidden units of the MLP, or of its experts and the shared units together.
        adaln_rank: rank of the pair of linear layers that adaLN's one was replaced by; None is the one layer.
        experts: how the hidden units are shared out among experts; None is one MLP for every token.
        kv_heads: heads of keys and values where groups of heads share them; None is one for each head.
        conv: side of the depth-wise convolution of the values that attention adds, 3 or 5; None is none.
        mediators: rows and columns of mediators, of `"mediated"` attention alone.

    Raises:
        ValueError: a size is not positive, the attention kind is unknown, an option does not go with it, or the hidden
            units cannot be shared out.
    """

    heads: int
    head_dim: int
    mlp_width: int
    attention: str = "softmax"
    adaln_rank: int | None = None
    experts: ExpertsConfig | None = None
    kv_heads: int | None = None
    conv: int | None = None
    mediators: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "mlp_width"):
            _require_positive("block", name, getattr(self, name))
        for name in ("adaln_rank", "kv_heads"):
            if getattr(self, name) is not None:
                _require_positive("block", name, getattr(self, name))
        if self.attention not in ATTENTION:
            raise ValueError(f"block: attention {self.attention!r} is unknown; use one of {', '.join(ATTENTION)}")
        if self.experts is not None:
            self.experts.units(self.mlp_width)  # refuses what cannot be shared out
        if self.kv_heads is not None and (self.heads % self.kv_heads or self.kv_heads == self.heads):
            raise ValueError(f"block: {self.kv_heads} heads of keys and values do not divide {self.heads} heads into "
                             "groups: use a smaller number that divides them, or leave kv_heads out")
        if self.conv is not None and self.conv not in CONVOLUTIONS:
            raise ValueError(f"block: conv is the side of the convolution, 3 or 5, not {self.conv!r}")
        if (self.mediators is not None) != (self.attention == "mediated"):
            raise ValueError(f"block: mediators go with mediated attention and only with it, and this is "
                             f"{self.attention} with {self.mediators}")
        for side in self.mediators or ():
            _require_positive("block", "mediators", side)
        if self.mediators is not None and len(self.mediators) != 2:
            raise ValueError(f"block: mediators are rows and columns, not {self.mediators}")


@dataclass(frozen=True)
class DiTConfig:
    """The structure of a DiT.

    Attributes:
        input_size: height and width of what the model sees (pixels or latent cells).
        channels: channels of that input.
        classes: number of class labels; the null class of guidance is label `classes`.
        patch: side of the square patch that becomes one token; divides both input sizes.
        width: features of a token.
        blocks: one `BlockConfig` per block, first to last.
        learn_sigma: whether the model also predicts the variance (twice the output channels).
        label_dropout: share of labels replaced by the null class in training; 0 has no null class.
        frequency_shift: how the 128 timestep frequencies are spaced: 10000^(-k / (128 - shift)). The original DiT
            uses 0, diffusers' DiTTransformer2DModel uses 1; the weights of one are not exact in the other.
        mlp_norm_eps: epsilon of the norm before the MLP (diffusers may keep 1e-5 there).
        linears: linear layers that are not plain float ones, by module name, with their kind in `models/linear.py`.
        final_adaln_rank: as `BlockConfig.adaln_rank`, of the final layer.

    Raises:
        ValueError: a size is not positive, the patch does not divide the input, the width is not a multiple of 4, a
            rank of adaLN is not below the width, or there are too many mediators.
    """

    input_size: tuple[int, int]
    channels: int
    classes: int
    patch: int
    width: int
    blocks: tuple[BlockConfig, ...]
    learn_sigma: bool = True
    label_dropout: float = 0.1
    frequency_shift: int = 0
    mlp_norm_eps: float = NORM_EPS
    linears: Mapping[str, str] = field(default_factory=dict)
    final_adaln_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "classes", "patch", "width"):
            _require_positive("model", name, getattr(self, name))
        for side in self.input_size:
            _require_positive("model", "input_size", side)
            if side % self.patch:
                raise ValueError(f"model: patch {self.patch} does not divide the input size {self.input_size}")
        if self.width % 4:
            raise ValueError(f"model: width {self.width} is not a multiple of 4, which the position embedding needs")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"model: label_dropout {self.label_dropout} is outside 0..1")
        if self.final_adaln_rank is not None:
            _require_positive("model", "final_adaln_rank", self.final_adaln_rank)
        for rank in (self.final_adaln_rank, *(block.adaln_rank for block in self.blocks)):
            if rank is not None and rank >= self.width:
                raise ValueError(f"model: an adaLN rank of {rank} is not below the width {self.width}: leave it out "
                                 "for the one full layer")
        for block in self.blocks:
            _require_few_mediators(block.mediators, self.grid)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.input_size[0] // self.patch, self.input_size[1] // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def out_channels(self) -> int:
        """Channels the model predicts: eps, and the variance where it is learned."""
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def label_rows(self) -> int:
        """Rows of the label table: the classes, and the null class where labels were dropped."""
        return self.classes + (1 if self.label_dropout > 0 else 0)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description from which `from_dict` builds the same config."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DiTConfig:
        """The config that `to_dict` described.

        Raises:
            ValueError: a key is missing, unknown, or its value is refused.
        """
        try:
            values = dict(data)
            values["input_size"] = tuple(values["input_size"])
            values["blocks"] = tuple(_block_from_dict(block) for block in values["blocks"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"model config: {error}") from error


def preset(name: str, *, input_size: tuple[int, int] = (32, 32), channels: int = 4, classes: int = 1000,
           **options: Any) -> DiTConfig:
    """The config of a preset such as `"S/2"`: size XS, S, B, L or XL at patch 2, 4 or 8.

    Raises:
        ValueError: the name is not a preset.
    """
    size, _, patch = name.removeprefix("DiT-").partition("/")
    if size not in PRESETS or patch not in {str(p) for p in PATCHES}:
        raise ValueError(f"preset {name!r} is unknown: use {', '.join(PRESETS)} with a patch of 2, 4 or 8, as in S/2")
    shape = PRESETS[size]
    return uniform(depth=shape.depth, width=shape.width, heads=shape.heads, patch=int(patch), input_size=input_size,
                   channels=channels, classes=classes, **options)


def uniform(*, depth: int, width: int, heads: int, mlp_ratio: float = 4.0, **options: Any) -> DiTConfig:
    """A config whose blocks are all alike.

    Raises:
        ValueError: the heads do not divide the width, or a size is refused.
    """
    if width % heads:
        raise ValueError(f"model: {heads} heads do not divide the width {width}")
    block = BlockConfig(heads, width // heads, int(width * mlp_ratio))
    return DiTConfig(width=width, blocks=(block,) * depth, **options)


def preset_name(config: DiTConfig) -> str | None:
    """The preset that a config is, or None."""
    for size, shape in PRESETS.items():
        if config.width == shape.width and config.patch in PATCHES:
            expected = uniform(depth=shape.depth, width=shape.width, heads=shape.heads, patch=config.patch,
                               input_size=config.input_size, channels=config.channels, classes=config.classes)
            if config.blocks == expected.blocks:
                return f"{size}/{config.patch}"
    return None


def twin(config: DiTConfig, head_dim: int = 4) -> DiTConfig:
    """The tiny twin: same depth, heads, classes and tokens in a model that runs in milliseconds."""
    width = max(block.heads for block in config.blocks) * head_dim if config.blocks else config.width
    shrink = width / config.width

    def small(block: BlockConfig) -> BlockConfig:
        experts, units = block.experts, max(1, round(block.mlp_width * shrink))
        if experts:
            shared = experts.shared and max(1, round(experts.shared * shrink))
            units = shared + experts.count * max(1, round(experts.units(block.mlp_width) * shrink))
            experts = replace(experts, shared=shared)
        return replace(block, head_dim=head_dim, mlp_width=units, experts=experts, adaln_rank=rank(block.adaln_rank))

    def rank(full: int | None) -> int | None:
        return full and min(max(1, round(full * shrink)), width - 1)

    return replace(config, width=width, blocks=tuple(small(block) for block in config.blocks),
                   final_adaln_rank=rank(config.final_adaln_rank))


class DiT(nn.Module):
    """A diffusion transformer of the given structure, initialised as the paper does (adaLN-Zero).

    Parameters carry the names of the original DiT's checkpoints.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedder(config.channels, config.width, config.patch)
        self.t_embedder = TimestepEmbedder(config.width, config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.label_rows, config.width)
        self.register_buffer("pos_embed", position_embedding(config.grid, config.width)[None])
        self.blocks = nn.ModuleList(Block(config.width, block, config.mlp_norm_eps, config.grid)
                                    for block in config.blocks)
        self.final_layer = FinalLayer(config.width, config.patch, config.out_channels, config.final_adaln_rank)
        self.initialise()
        for name, kind in config.linears.items():
            replace_linear(self, name, kind)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None = None) -> Tensor:
        """Predict noise (and variance, where learned).

        Args:
            x: (batch, channels, height, width), the noisy input.
            t: (batch,), timesteps in 0..999, whole or fractional.
            y: (batch,), integer labels; `config.classes` is the null class.
            modulations: what `modulations(t, y)` returns, where it is known already.

        Returns:
            (batch, out_channels, height, width).
        """
        *of_blocks, of_final = self._split(t, y, modulations)
        return self._image(self._through_blocks(self._tokens(x), of_blocks, t, y), of_final)

    def with_change(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `forward`, and what all blocks together changed: (batch, tokens, width)."""
        *of_blocks, of_final = self._split(t, y, modulations)
        before = self._tokens(x)
        after = self._through_blocks(before, of_blocks, t, y)
        return self._image(after, of_final), after - before

    def without_blocks(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None, change: Tensor) -> Tensor:
        """As `forward`, with a change given in the place of what the blocks would change."""
        *_, of_final = self._split(t, y, modulations)
        return self._image(self._tokens(x) + change, of_final)

    def _tokens(self, x: Tensor) -> Tensor:
        return self.x_embedder(x) + self.pos_embed  # (batch, tokens, width)

    def _through_blocks(self, tokens: Tensor, modulations: Sequence[Tensor], t: Tensor, y: Tensor) -> Tensor:
        for block, modulation in zip(self.blocks, modulations, strict=True):
            tokens = block(tokens, modulation, t, y == self.config.classes)
        return tokens

    def _image(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        return unpatchify(self.final_layer(tokens, modulation), self.config)

    def _split(self, t: Tensor, y: Tensor, modulations: Tensor | None) -> Sequence[Tensor]:
        """The modulations of each block, and of the final layer."""
        return self._modulations(t, y) if modulations is None else modulations.split(self.modulation_sizes, dim=-1)

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """adaLN's shifts, scales and gates of all blocks and the final layer, which no token has a part in.

        Args:
            t, y: as `forward` takes them, (batch,).

        Returns:
            (batch, sum of `modulation_sizes`): 6 * width for every block, then 2 * width.
        """
        return torch.cat(self._modulations(t, y), dim=-1)

    @property
    def modulation_sizes(self) -> list[int]:
        """How many of the modulations belong to each block, and to the final layer."""
        return [*(6 * self.config.width for _ in self.blocks), 2 * self.config.width]

    def _modulations(self, t: Tensor, y: Tensor) -> list[Tensor]:
        condition = self.t_embedder(t) + self.y_embedder(y)  # (batch, width)
        return [branch.adaLN_modulation(condition) for branch in (*self.blocks, self.final_layer)]

    def initialise(self) -> None:
        """The paper's initialisation: Xavier linears, and zeros wherever a block could speak before it has learned."""
        if self.pos_embed.device.type == "meta":
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                _zero(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        _zero(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in self.t_embedder.mlp:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for branch in (*self.blocks, self.final_layer):
            *_, speaks = branch.adaLN_modulation.modules()  # the last layer alone: a pair of zeros would never learn
            for parameter in speaks.parameters():
                _zero(parameter)
        for parameter in self.final_layer.linear.parameters():
            _zero(parameter)

    def use_attention(self, form: AttentionForm) -> None:
        """Choose how softmax attention is executed in every block, and with `"native"` GELU between integers too."""
        for block in self.blocks:
            # Called before every evaluation: to set an attribute of a module takes far longer than to look at it.
            if isinstance(block.attn, Attention) and block.attn.form != form:
                block.attn.form = form
            if isinstance(block.mlp, MLP) and block.mlp.native != (form == "native"):
                block.mlp.native = form == "native"


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (the paper's figure 3, adaLN-Zero)."""

    def __init__(self, width: int, config: BlockConfig, mlp_norm_eps: float, grid: tuple[int, int]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn = attention_of(width, config, grid)
        self.norm2 = nn.LayerNorm(width, eps=mlp_norm_eps, elementwise_affine=False)
        self.mlp = feed_forward(width, config.mlp_width, config.experts)
        self.adaLN_modulation = modulation(width, 6 * width, config.adaln_rank)

    def forward(self, x: Tensor, modulation: Tensor, t: Tensor, unlabelled: Tensor) -> Tensor:
        """(batch, tokens, width) and what adaLN says, (batch, 6 * width), to (batch, tokens, width).

        Experts also look at the timesteps (batch,), and at whether the label is the null class (batch,).
        """
        parts = modulation[:, None].chunk(6, dim=-1)  # each (batch, 1, width)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        given = modulate(self.norm2(x), shift_mlp, scale_mlp)
        return x + gate_mlp * (self.mlp(given, t, unlabelled) if isinstance(self.mlp, Experts) else self.mlp(given))


class FinalLayer(nn.Module):
    """The last modulated norm and the projection from a token to the pixels of its patch."""

    def __init__(self, width: int, patch: int, out_channels: int, adaln_rank: int | None) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = modulation(width, 2 * width, adaln_rank)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """(batch, tokens, width) and what adaLN says, (batch, 2 * width), to patches.

        Returns:
            (batch, tokens, patch * patch * out_channels).
        """
        shift, scale = modulation[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def attention_of(width: int, block: BlockConfig, grid: tuple[int, int]) -> Attention:
    """The attention that a block's config describes, on a grid of tokens, with new weights."""
    only = {"mediators": block.mediators} if block.mediators else {}
    return ATTENTION[block.attention](width, block.heads, block.head_dim, kv_heads=block.kv_heads, conv=block.conv,
                                      grid=grid, **only)


def modulation(width: int, outputs: int, rank: int | None) -> nn.Sequential:
    """What computes shifts, scales and gates from the condition: one linear layer, or a pair of low rank."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, outputs) if rank is None else LowRank(width, outputs, rank))


class PatchEmbedder(nn.Module):
    """Each patch of the input to one token.

    A convolution, as published, whose patches do not overlap. `execution.prepack` puts the linear layer in its place
    that it amounts to: a convolution of few channels took a fifth of a small model's time on a CPU.
    """

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, tokens, width), row by row."""
        if isinstance(self.proj, nn.Conv2d):
            return self.proj(x).flatten(2).transpose(1, 2)
        patches = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        return self.proj(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


class TimestepEmbedder(nn.Module):
    """A timestep to a vector: cosines and sines of 128 frequencies, then two linear layers."""

    def __init__(self, width: int, frequency_shift: int) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(batch,) to (batch, width)."""
        return self.mlp(timestep_features(t, self.frequency_shift).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A class to a vector; the last row, where labels were dropped in training, is the null class."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        """(batch,) to (batch, width)."""
        return self.embedding_table(y)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def timestep_features(t: Tensor, frequency_shift: int = 0) -> Tensor:
    """cos and sin of t times geometric frequencies: (batch,) to (batch, 256), float32."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / (half - frequency_shift))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed sine-cosine positions of a token grid: (rows * columns, width), columns in the first half.

    MAE's table, which DiT uses (arXiv 2111.06377); any grid, square or not.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def encode(position: Tensor) -> Tensor:
        angles = position[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (tokens, width / 2)

    rows, columns = torch.meshgrid(torch.arange(grid[0], dtype=torch.float64),
                                   torch.arange(grid[1], dtype=torch.float64), indexing="ij")
    return torch.cat([encode(columns.flatten()), encode(rows.flatten())], dim=-1).float()


def unpatchify(tokens: Tensor, config: DiTConfig) -> Tensor:
    """(batch, tokens, patch * patch * out_channels) to (batch, out_channels, height, width)."""
    rows, columns = config.grid
    patches = tokens.view(-1, rows, columns, config.patch, config.patch, config.out_channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, config.out_channels, *config.input_size)


def _zero(parameter: Tensor | None) -> None:
    if parameter is not None:
        nn.init.zeros_(parameter)


def _block_from_dict(data: Mapping[str, Any]) -> BlockConfig:
    """JSON knows lists alone."""
    values = dict(data)
    if values.get("mediators") is not None:
        values["mediators"] = tuple(values["mediators"])
    return BlockConfig(**{**values, "experts": experts_config(values.get("experts"))})


def _require_few_mediators(mediators: tuple[int, int] | None, grid: tuple[int, int]) -> None:
    """Mediators cost 2 m / n of softmax's scores: with half as many as tokens nothing is saved."""
    if mediators is None:
        return
    count, tokens = mediators[0] * mediators[1], grid[0] * grid[1]
    if 2 * count >= tokens or mediators[0] > grid[0] or mediators[1] > grid[1]:
        raise ValueError(f"model: {mediators[0]}x{mediators[1]} mediators for {grid[0]}x{grid[1]} tokens save nothing: "
                         f"use fewer than {-(-tokens // 2)}, no more along a side than there are tokens")


def _require_positive(where: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {name} must be a whole number above 0, not {value!r}")
