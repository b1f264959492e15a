"""Files that nobody vouches for: read without running their code, refused with one sentence, never half-written."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import Part, read_tensors
from ..models.dit import DiT, DiTConfig
from ..models.experts import TimestepExperts
from ..pipeline import Pipeline

GIB = 2 ** 30
LARGEST_FILE = 64 * GIB  # bytes; DiT-XL/2 with its EMA and optimizer is about 11 GiB
ALIGNMENT = 64  # bytes, PyTorch's own on a CPU; a mapped file begins its tensors anywhere
LARGEST_JSON = 16 * 2 ** 20  # bytes
LARGEST_DEPTH = 4096  # blocks
LARGEST_SIDE = 2 ** 20  # of any other size in a config
MODEL_FILES = frozenset({"config.json", "model.safetensors", "recipe.toml", "evidence.json", "README.md",
                         "transformer", "scheduler", "vae", "model_index.json", "slimdit.json", "slimdit.safetensors",
                         "model.xml", "model.bin"})


class FormatError(ValueError):
    """A file of weights that cannot be used: one sentence with what is wrong, where, and what to do.

    Attributes:
        exit_code: 1 for a bad file, 3 for one that a rule refuses (it would run code, it is oversized, ...).
    """

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Loaded:
    """A pipeline from a file, and what the reader had to choose or assume on the way, a sentence each."""

    pipeline: Pipeline
    notes: tuple[str, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FormatError: the file is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise FormatError(f"{path} is {path.stat().st_size:,} bytes, too large for a config: refused", 3)
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): copy or download the folder again") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a JSON {type(value).__name__} where an object belongs")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def read_safetensors(path: Path, repeats: Callable[[str], str] = str,
                     part_of: Callable[[str], Part | None] = lambda name: None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which cannot declare more bytes than it has, in memory of their own.

    Args:
        repeats, part_of: as `read_tensors` takes them.

    Raises:
        FormatError: the file is missing, truncated, foreign or oversized.
    """
    check_size(path)
    try:
        return read_tensors(path, mapped=False, repeats=repeats, part_of=part_of)[0]
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        sentence = str(error) if isinstance(error, ValueError) else f"{path} cannot be read ({error})"
        raise FormatError(sentence) from error


def read_pickled(path: Path) -> Any:
    """What a `.pt` file holds, allowing tensors, plain containers and argparse.Namespace: nothing in it is run.

    The file is mapped where PyTorch can: of the last step's weights, the averaged ones and the optimizer's state, what
    is not looked at takes no memory.

    Raises:
        FormatError: the file is truncated, foreign, compressed or oversized (1 or 3), or would run code (3).
    """
    check_size(path)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except Exception as error:  # a directory of damaged bytes
            raise FormatError(_unreadable(path, error)) from error
        if unpacked > path.stat().st_size:
            raise FormatError(f"{path} unpacks to more than its size, which PyTorch never writes: refused", 3)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|function|class) `?([A-Za-z_][\w]*(?:\.\w+)+)`?", str(error))
        if found:
            raise FormatError(f"{path} asks to run or build {found[1]}, which is more than weights need: refused; take "
                              f"a safetensors copy from someone you trust", 3) from None
        raise FormatError(_unreadable(path, error)) from error
    except Exception as error:  # torch.load on damaged bytes raises nearly anything
        raise FormatError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0].strip()[:120] or type(error).__name__
    if reason.startswith("Weights only load failed"):  # a paragraph of advice to programmers follows
        reason = "its bytes are not those of saved tensors"
    return f"{path} is not a whole PyTorch checkpoint ({reason}): copy or download it again"


def check_size(path: Path) -> None:
    """Refuse what is not a file, is empty, or is larger than any DiT."""
    if not path.is_file():
        raise FormatError(f"{path} is missing: copy or download the folder again")
    size = path.stat().st_size
    if size == 0:
        raise FormatError(f"{path} is empty: copy or download it again")
    if size > LARGEST_FILE:
        raise FormatError(f"{path} is {size / GIB:.0f} GiB, more than {LARGEST_FILE // GIB} GiB: refused", 3)


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that claim more bytes than their file has, odd types, and values that are not finite."""
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if declared > path.stat().st_size:
        raise FormatError(f"{path} declares {declared:,} bytes of tensors but has {path.stat().st_size:,}: refused", 3)
    for name, tensor in tensors.items():
        if tensor.is_sparse or tensor.is_quantized or tensor.is_complex() or tensor.dtype is torch.bool:
            raise FormatError(f"{path}: {name} is {tensor.dtype}, which no DiT stores: convert it to float32")
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise FormatError(f"{path}: {name} holds NaN or infinite values: the training run behind it diverged, use "
                              f"an earlier checkpoint")


def check_limits(config: DiTConfig, path: Path) -> None:
    """Refuse sizes that no DiT has, before anything of that size is built."""
    sizes = {"blocks": len(config.blocks) * (LARGEST_SIDE // LARGEST_DEPTH), "channels": config.channels,
             "classes": config.classes, "patch": config.patch, "width": config.width,
             "input_size": max(config.input_size), "tokens": config.tokens}
    for block in set(config.blocks):
        sizes["heads * head_dim"] = max(sizes.get("heads * head_dim", 0), block.heads * block.head_dim)
        sizes["mlp_width"] = max(sizes.get("mlp_width", 0), block.mlp_width)
    for name, size in sizes.items():
        if size > LARGEST_SIDE:
            raise FormatError(f"{path}: {name} is beyond anything slimdit builds (at most {LARGEST_DEPTH} blocks and "
                              f"{LARGEST_SIDE:,} of any size): refused", 3)


def build_model(config: DiTConfig, tensors: dict[str, Tensor], path: Path) -> DiT:
    """The DiT of a config with these tensors as its parameters: floats as float32, packed numbers as they are.

    The dictionary is emptied, so that a tensor that is converted is not held in both types.

    Raises:
        FormatError: a tensor is missing, unexpected, or of another shape or kind than the config says.
    """
    model = empty_model(config, path)
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise FormatError(f"{path} does not fit its structure: {_list('missing', missing)}"
                          f"{' and ' if missing and unexpected else ''}{_list('unexpected', unexpected)}; "
                          f"is this another kind of model?")
    for name, want in expected.items():
        have = tensors[name]
        if have.shape != want.shape:
            raise FormatError(f"{path}: {name} has shape {tuple(have.shape)}, the structure says {tuple(want.shape)}")
        # Floats come in any precision; what a packed layer stores means something in its own type alone.
        if have.dtype != want.dtype and not (want.dtype == torch.float32 and have.is_floating_point()):
            raise FormatError(f"{path}: {name} is {have.dtype} where the structure says {want.dtype}")
    ready = {name: _placed(tensors.pop(name), want.dtype) for name, want in expected.items()}
    model.load_state_dict(ready, assign=True)
    check_tables(model, path)
    return model.eval()


def check_tables(model: DiT, path: Path) -> None:
    """Refuse tables of experts that name one which is not there: a device would read what lies beyond."""
    for name, layer in model.named_modules():
        if isinstance(layer, TimestepExperts):
            last = layer.config.count - 1
            if layer.table.min() < 0 or layer.table.max() > last:
                raise FormatError(f"{path}: {name}.table names an expert outside 0..{last}: copy or download it again")


def _placed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a type, placed as PyTorch would: thin products sum in another order elsewhere, to other bits.

    What is of half precision and stays so is still in its file: it gets memory of its own.
    """
    if tensor.dtype != dtype:
        return tensor.to(dtype)
    return tensor if tensor.element_size() != 2 and tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def expected_tensors(config: DiTConfig, path: Path) -> dict[str, Tensor]:
    """The tensors that a config asks for, without their values.

    Raises:
        FormatError: a size is beyond anything that fits, or the config names layers that the structure has not.
    """
    return empty_model(config, path).state_dict()


def empty_model(config: DiTConfig, path: Path) -> DiT:
    """The DiT of a config in shapes only: the tensors of a file become its parameters, with no second copy."""
    check_limits(config, path)
    try:
        with torch.device("meta"):
            return DiT(config)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error


def _list(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}"


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place, whole, when the block ends without an error.

    Raises:
        FormatError: the folder holds something else than a model.
    """
    if folder.is_dir():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in MODEL_FILES)
        if others:
            raise FormatError(f"{folder} holds other files ({', '.join(others[:3])}): name an empty or a new folder", 3)
    elif folder.exists():
        raise FormatError(f"{folder} is a file: name a folder to save into", 3)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
    beside.chmod(0o755)
    replaced = beside.with_suffix(".replaced")
    try:
        yield beside
        if folder.exists():
            folder.replace(replaced)
        try:
            beside.replace(folder)
        except OSError:
            if replaced.exists():
                replaced.replace(folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
