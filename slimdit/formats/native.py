"""slimdit's own folder: `config.json` says what the model is, `model.safetensors` holds its weights as they are.

Weights with many zeros are stored without them (`formats/sparse.py`); the config's `sparse` names those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..files import write_json, write_tensors
from ..models.autoencoder import Autoencoder, autoencoder_from_dict
from ..models.dit import BlockConfig, DiTConfig
from ..models.packed import PackedLinear
from ..pipeline import Pipeline, Runtime
from ..sampling.process import NoiseProcess
from ..sampling.solvers import Sampling
from ..strict import build, nearest
from . import sparse
from .tensors import (
    LARGEST_DEPTH,
    FormatError,
    Loaded,
    build_model,
    check_limits,
    check_tensors,
    expected_tensors,
    read_json,
    read_safetensors,
    writing_folder,
)

VERSION = 1
StoredDtype = Literal["float32", "bfloat16"]


def recognises(path: Path) -> bool:
    """Whether a path is a native folder."""
    return (path / "config.json").is_file() and read_json(path / "config.json").get("format") == "slimdit"


def load(path: Path, *, weights: str = "ema", heads: int | None = None) -> Loaded:
    """The pipeline of a native folder; `weights` and `heads` have nothing to choose here.

    Raises:
        FormatError: a file is missing or damaged, or the config has an unknown key or a refused value.
    """
    where = path / "config.json"
    values = read_json(where)
    if values.get("version") != VERSION:
        raise FormatError(f"{where}: version {values.get('version')!r} is not {VERSION}, which this slimdit reads: "
                          f"update slimdit, or save the model again")
    config = model_config(values.get("model"), where)
    options = pipeline_options(values, where, also={"format", "version", "model", "sparse"})
    stored = path / "model.safetensors"
    tensors = read_safetensors(stored)
    check_tensors(tensors, stored)
    if "sparse" in values:
        tensors = sparse.unpack(tensors, values["sparse"], expected_tensors(config, stored), stored)
    return Loaded(Pipeline(build_model(config, tensors, stored), **options))


def save(pipeline: Pipeline, folder: Path, *, dtype: StoredDtype | None = None) -> None:
    """Write a pipeline as a native folder, all of it or nothing.

    Args:
        dtype: of the float weights on disk; None keeps the model's own.

    Raises:
        FormatError: the folder holds something else than a model, or the type is unknown.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise FormatError(f"weights are stored as float32 or bfloat16, not {dtype!r}")
    tensors, names = sparse.pack(stored_tensors(pipeline, dtype))
    with writing_folder(folder) as beside:
        write_tensors(beside / "model.safetensors", tensors, {"format": "pt"})
        write_json(beside / "config.json", {
            "format": "slimdit", "version": VERSION, "model": pipeline.model.config.to_dict(),
            **({"sparse": names} if names else {}), **pipeline_values(pipeline)})


def stored_tensors(pipeline: Pipeline, dtype: StoredDtype | None) -> dict[str, Tensor]:
    """The tensors to write: positions and what packed layers keep exactly stay as they are, as integers do."""
    tensors = pipeline.model.state_dict()
    if dtype is None:
        return tensors
    packed = ((name, layer) for name, layer in pipeline.model.named_modules() if isinstance(layer, PackedLinear))
    exact = {"pos_embed", *(f"{name}.{tensor}" for name, layer in packed for tensor in layer.EXACT)}
    return {name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() and name not in exact else tensor
            for name, tensor in tensors.items()}


def pipeline_values(pipeline: Pipeline) -> dict[str, Any]:
    """Everything of a pipeline but its model, JSON-ready."""
    return {"sampling": pipeline.sampling.to_dict(), "process": asdict(pipeline.process),
            "runtime": asdict(pipeline.runtime), "autoencoder": pipeline.autoencoder.to_dict(),
            "name": pipeline.name, "history": [dict(entry) for entry in pipeline.history]}


def pipeline_options(values: Mapping[str, Any], where: Path, also: set[str]) -> dict[str, Any]:
    """What `pipeline_values` described, as keywords of `Pipeline`; the keys in `also` are someone else's to read.

    Raises:
        FormatError: a key is unknown or missing, or a value is refused.
    """
    parts = {"sampling", "process", "runtime", "autoencoder", "name", "history"}
    for key in values:
        if key not in parts | also:
            raise FormatError(f"{where}: {key!r} is unknown; {nearest(key, parts | also)}")
    for key in sorted(parts - values.keys()):
        raise FormatError(f"{where}: {key!r} is missing: save the model again")
    name, history = values["name"], values["history"]
    if not isinstance(name, str) or not isinstance(history, list) or not all(isinstance(h, dict) for h in history):
        raise FormatError(f"{where}: name must be a text and history a list of objects")
    try:
        return {"sampling": build(Sampling, values["sampling"], f"{where}: sampling"),
                "process": build(NoiseProcess, values["process"], f"{where}: process"),
                "runtime": build(Runtime, values["runtime"], f"{where}: runtime"),
                "autoencoder": _autoencoder(values["autoencoder"], where), "name": name, "history": tuple(history)}
    except ValueError as error:
        raise error if isinstance(error, FormatError) else FormatError(str(error)) from error


def _autoencoder(values: Any, where: Path) -> Autoencoder:
    if not isinstance(values, dict):
        raise FormatError(f"{where}: autoencoder must be an object")
    try:
        return autoencoder_from_dict(values)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def model_config(values: Any, where: Path) -> DiTConfig:
    """A DiTConfig from JSON, strictly, refused where its sizes are beyond anything that fits.

    Raises:
        FormatError: as said.
    """
    if not isinstance(values, dict) or not isinstance(values.get("blocks"), list):
        raise FormatError(f"{where}: 'model' must be an object with a list of blocks")
    if not 0 < len(values["blocks"]) <= LARGEST_DEPTH:
        raise FormatError(f"{where}: {len(values['blocks'])} blocks are not in 1..{LARGEST_DEPTH}: refused", 3)
    try:
        blocks = [build(BlockConfig, block, f"{where}: model: block {i}") for i, block in enumerate(values["blocks"])]
        config = build(DiTConfig, {**values, "blocks": blocks}, f"{where}: model")
    except ValueError as error:
        raise FormatError(str(error)) from error
    check_limits(config, where)
    return config
