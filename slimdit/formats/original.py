"""Checkpoints of the original DiT and of fast-DiT: one `.pt` (or `.safetensors`) whose tensors say what the model is.

Both keep the names of the reference implementation of arXiv 2212.09748. DiT publishes a bare state dict; fast-DiT's
training saves {"model", "ema", "opt", "args"}, the last an argparse.Namespace.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.autoencoder import Autoencoder, KLAutoencoder, PixelSpace
from ..models.dit import PRESETS, BlockConfig, DiTConfig, position_embedding, preset_name
from ..pipeline import Pipeline
from .tensors import FormatError, Loaded, build_model, check_tensors, read_pickled, read_safetensors

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel and torch.compile put into names
LATENT_CHANNELS = 4  # of Stable Diffusion's autoencoder, which every published 4-channel DiT was trained behind
log = logging.getLogger(__name__)


def recognises(path: Path) -> bool:
    """Whether a path is one file of weights."""
    return path.is_file() and path.suffix in SUFFIXES


def load(path: Path, *, weights: str = "ema", heads: int | None = None) -> Loaded:
    """The pipeline of an original checkpoint.

    Args:
        weights: `"ema"` for the averaged weights, `"model"` for the last step's, where the file has both.
        heads: attention heads, where neither the file nor a preset of its width and depth says.

    Raises:
        FormatError: the file is damaged, foreign or refused, or the heads are unknown.
    """
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    chosen, args, notes = choose_weights(content, weights, path)
    tensors = strip_wrappers(chosen, path)
    del content, chosen  # so that `build_model` holds nothing twice
    check_tensors(tensors, path)
    config, more = read_config(tensors, args, heads, path)
    tensors["pos_embed"] = position_embedding(config.grid, config.width)[None]
    notes += more
    autoencoder: Autoencoder = PixelSpace()
    if config.channels == LATENT_CHANNELS:
        autoencoder = KLAutoencoder("stabilityai/sd-vae-ft-ema", scale=0.18215, factor=8)
        notes.append(f"4 channels: taken for latents of {autoencoder.source}, which is fetched when images are decoded")
    for note in notes:
        log.info("%s: %s", path, note)
    name = getattr(args, "model", None) or preset_name(config) or path.stem
    return Loaded(Pipeline(build_model(config, tensors, path), autoencoder=autoencoder, name=str(name)), tuple(notes))


def choose_weights(content: Any, weights: str,
                   path: Path) -> tuple[Mapping[str, Tensor], argparse.Namespace, list[str]]:
    """The state dict to use, the training arguments where there are any, and what was chosen."""
    if weights not in ("ema", "model"):
        raise FormatError(f"weights are 'ema' or 'model', not {weights!r}")
    if not isinstance(content, Mapping) or not content:
        raise FormatError(f"{path} holds a {type(content).__name__}, not weights by name: is it a DiT checkpoint?")
    args = content.get("args")
    args = args if isinstance(args, argparse.Namespace) else argparse.Namespace()
    states = {name: content[name] for name in ("ema", "model") if _is_state(content.get(name))}
    if not states:
        if not _is_state(content):
            raise FormatError(f"{path} is not a DiT checkpoint: it holds {_names(content)}, neither weights by name "
                              f"nor 'model' and 'ema'")
        return content, args, []
    if weights not in states:
        other = next(iter(states))
        raise FormatError(f"{path} has no {weights!r} weights, only {other!r}: add --weights {other}")
    both = " rather than the last step's (--weights model)" if weights == "ema" and len(states) == 2 else ""
    return states[weights], args, [f"the {'averaged (EMA)' if weights == 'ema' else 'last'} weights were chosen{both}"]


def _is_state(value: Any) -> bool:
    return (isinstance(value, Mapping) and bool(value)
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()))


def _names(content: Mapping[Any, Any]) -> str:
    return ", ".join(str(name) for name in list(content)[:3]) + (", ..." if len(content) > 3 else "")


def strip_wrappers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under the names they have without `module.` and `_orig_mod.`, wherever those stand."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise FormatError(f"{path} holds {short} twice, with and without a wrapper's prefix: save it with one")
        plain[short] = tensor
    return plain


def read_config(tensors: Mapping[str, Tensor], args: argparse.Namespace, heads: int | None,
                path: Path) -> tuple[DiTConfig, list[str]]:
    """The structure that the shapes of the tensors spell, and what had to be assumed."""
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, path)
    numbered = (re.match(r"blocks\.(\d{1,6})\.", name) for name in tensors)
    depth = 1 + max((int(found[1]) for found in numbered if found), default=-1)
    if not depth or depth > len(tensors):
        raise FormatError(f"{path} is not a DiT: its blocks are not numbered from 0 on")
    out_channels = _shape(tensors, "final_layer.linear.weight", 2, path)[0] / patch ** 2
    if out_channels not in (channels, 2 * channels):
        raise FormatError(f"{path}: the last layer makes {out_channels:g} channels, neither {channels} (noise) nor "
                          f"{2 * channels} (noise and variance)")
    rows = _shape(tensors, "y_embedder.embedding_table.weight", 2, path)[0]
    classes, note = read_classes(rows, args, path)
    heads = heads or find_heads(args, width, depth, path)
    try:
        grid = find_grid(tensors, width, path)
        if heads < 1 or width % heads:
            raise FormatError(f"{path}: {heads} heads do not divide the width {width}: give the right --heads")
        blocks = tuple(BlockConfig(heads, width // heads, _shape(tensors, f"blocks.{i}.mlp.fc1.weight", 2, path)[0])
                       for i in range(depth))
        config = DiTConfig((grid[0] * patch, grid[1] * patch), channels, classes, patch, width, blocks,
                           learn_sigma=out_channels == 2 * channels, label_dropout=0.1 if rows > classes else 0.0)
    except ValueError as error:
        raise error if isinstance(error, FormatError) else FormatError(f"{path}: {error}") from error
    return config, note


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    if name not in tensors:
        raise FormatError(f"{path} is not a DiT: it has no {name}, but {_names(tensors)}")
    if tensors[name].ndim != dimensions or not tensors[name].numel():
        raise FormatError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, which no DiT has")
    return tuple(tensors[name].shape)


def read_classes(rows: int, args: argparse.Namespace, path: Path) -> tuple[int, list[str]]:
    """Classes of a label table: what the training arguments say, else all rows but the last, the null class."""
    classes = getattr(args, "num_classes", None)
    if classes is None:
        if rows < 2:
            raise FormatError(f"{path}: a label table of {rows} row has no class beside the null class")
        return rows - 1, [f"{rows - 1} classes: the last of {rows} label rows is taken for the null class"]
    if classes not in (rows, rows - 1):
        raise FormatError(f"{path}: its arguments say {classes} classes, its label table has {rows} rows")
    return classes, []


def find_heads(args: argparse.Namespace, width: int, depth: int, path: Path) -> int:
    """Heads by the model's name in the arguments, else by the one preset of that width and depth."""
    size = str(getattr(args, "model", "")).removeprefix("DiT-").partition("/")[0]
    if size in PRESETS and PRESETS[size].width == width:
        return PRESETS[size].heads
    for preset in PRESETS.values():
        if (preset.width, preset.depth) == (width, depth):
            return preset.heads
    raise FormatError(f"{path}: {depth} blocks of width {width} are no preset, and the tensors do not tell how many "
                      f"attention heads there are: give --heads")


def find_grid(tensors: Mapping[str, Tensor], width: int, path: Path) -> tuple[int, int]:
    """Rows and columns of tokens: those whose position table is the one in the file, the squarest first."""
    _, tokens, table_width = _shape(tensors, "pos_embed", 3, path)
    table = tensors["pos_embed"][0].float()
    if table_width != width or width % 4:
        raise FormatError(f"{path}: pos_embed is {table_width} wide in a model of width {width}, which no DiT is")
    tolerance = 1e-4 if tensors["pos_embed"].dtype in (torch.float32, torch.float64) else 1e-2
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    for grid in sorted(grids, key=lambda grid: abs(grid[0] - grid[1])):
        if torch.allclose(position_embedding(grid, width), table, rtol=0, atol=tolerance):
            return grid
    raise FormatError(f"{path}: pos_embed is not DiT's sine-cosine table for any grid of {tokens} tokens: this model "
                      f"was changed in a way that slimdit does not know", 3)
