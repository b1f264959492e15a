"""Files of weights: what they are, in and out of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..models.dit import preset_name
from ..pipeline import Pipeline
from . import diffusers, native, openvino, original
from .tensors import FormatError, Loaded

__all__ = ["FORMATS", "FormatError", "describe", "load", "save"]

FORMATS: Mapping[str, ModuleType] = {"native": native, "diffusers": diffusers, "openvino": openvino,
                                     "original": original}
"""Formats by name, in the order in which they are tried."""

BUNDLED = Path(__file__).parents[1] / "assets" / "bundled"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = [f"{folder}{name}" for folder in ("", "transformer/", "vae/") for name in (
    "config.json", "model.safetensors", "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*-of-*.safetensors", "diffusion_pytorch_model.safetensors.index.json")]
HUB_FILES += ["model_index.json", "scheduler/scheduler_config.json", "slimdit.json", "slimdit.safetensors"]


def load(source: str | Path, *, weights: str = "ema", heads: int | None = None) -> Pipeline:
    """The pipeline of a model.

    Args:
        source: `"bundled"`, a native or diffusers folder, a `.pt` or `.safetensors` of DiT or fast-DiT, or a Hub id
            (`"facebook/DiT-XL-2-256"`), which downloads.
        weights: `"ema"` or `"model"`, for files that hold both.
        heads: attention heads, for a bare file whose width and depth are no preset's.

    Raises:
        FormatError: there is no such model, or the file is damaged, foreign or refused.
    """
    return read(source, weights=weights, heads=heads)[2].pipeline


def save(pipeline: Pipeline, folder: str | Path, *, format: str = "native", **options: Any) -> None:
    """Write a pipeline to a folder, all of it or nothing.

    Args:
        format: `"native"`, `"diffusers"` for a folder that plain diffusers loads, or `"openvino"` for one that
            OpenVINO runs.
        options: the format's own, such as native's dtype="bfloat16".

    Raises:
        FormatError: the format cannot hold this model, or the folder holds other files.
        ImportError: the format needs what is not installed.
    """
    writers = {name: module.save for name, module in FORMATS.items() if hasattr(module, "save")}
    if format not in writers:
        raise FormatError(f"format {format!r} cannot be written: use one of {', '.join(writers)}")
    writers[format](pipeline, Path(folder), **options)


def describe(source: str | Path, *, weights: str = "ema", heads: int | None = None) -> dict[str, Any]:
    """What a model is, JSON-ready: format, preset, structure, sampling, parameters, bytes on disk, and notes.

    Raises:
        FormatError: as `load`.
    """
    name, path, loaded = read(source, weights=weights, heads=heads)
    pipeline = loaded.pipeline
    return {"source": str(source), "format": name, "name": pipeline.name, "preset": preset_name(pipeline.model.config),
            "model": pipeline.model.config.to_dict(), **native.pipeline_values(pipeline),
            "parameters": sum(p.numel() for p in pipeline.model.parameters()),
            "bytes": size_on_disk(path), "notes": list(loaded.notes)}


def read(source: str | Path, *, weights: str, heads: int | None) -> tuple[str, Path, Loaded]:
    """The name of the format, where the files are, and what they hold."""
    path = locate(str(source))
    for name, module in FORMATS.items():
        if module.recognises(path):
            return name, path, module.load(path, weights=weights, heads=heads)
    kind = "folder" if path.is_dir() else "file"
    raise FormatError(f"{path} is not a {kind} of weights that slimdit knows: give a slimdit or diffusers folder, or a "
                      f".pt or .safetensors file")


def locate(source: str) -> Path:
    """The local file or folder that a source names; a Hub id is downloaded, weights and JSON only."""
    path = BUNDLED if source == "bundled" else Path(source).expanduser()
    if path.exists():
        return path
    if source == "bundled":
        raise FormatError("this installation has no bundled model: install slimdit again, or name a model of your own")
    if not HUB_ID.fullmatch(source):
        raise FormatError(f"{source} does not exist: give a folder, a .pt or .safetensors file, 'bundled', or a Hub id")
    return download(source)


def download(hub_id: str) -> Path:
    """A local copy of a Hub repository's safetensors and JSON files."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # a download fails in as many ways as there are networks
        reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
        raise FormatError(f"{hub_id} is no local path, and the Hub did not give it ({reason}): check the name and the "
                          f"connection, or download the folder and give its path") from error


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
