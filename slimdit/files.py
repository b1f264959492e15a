"""Reading and writing files so that nothing is lost or half-written: write beside, fsync, rename."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # PyTorch takes seconds to import, and a report needs none of it
    from torch import Tensor

T = TypeVar("T", dict[str, Any], list[dict[str, Any]])
WORTH_A_MAPPING = 2**18  # numbers of a tensor


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, whole, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        sync(beside)
        beside.chmod(0o644)
        beside.replace(path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with writing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented for people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_kept(path: Path, kind: type[T], keys: Iterable[str] = ()) -> T:
    """What an interrupted run left in a JSON file of its own, for the run that goes on.

    Args:
        kind: `dict`, or `list` of such.
        keys: what the object, or each in the list, must have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not whole, or not of that kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}): remove {path.parent} to do its part again") from error
    each = value if isinstance(value, list) else [value]
    if not isinstance(value, kind) or not all(isinstance(one, dict) and one.keys() >= set(keys) for one in each):
        raise ValueError(f"{path} does not hold what a run leaves there: remove {path.parent} to do its part again")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: it cannot be written; the disk may be full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with writing(path) as beside:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside,
                      metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


Part = tuple[str, int, int]
"""The tensor that another is a part of, its place among the parts, and how many there are."""


def read_tensors(path: Path, *, mapped: bool = True, repeats: Callable[[str], str] = str,
                 part_of: Callable[[str], Part | None] = lambda name: None,
                 ) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Args:
        mapped: whether tensors are views of the mapped file, whose pages count as held from when they are read until
            the last view is gone. Else each is copied into memory of its own, but floats of half precision.
        repeats: a tensor's name to that of one it may repeat; what is copied is held once where the two are equal.
        part_of: a tensor's name to that of one it is part of, along the first axis, which is read in its place where
            the file has all parts and they are alike: joining them afterwards would hold them twice.

    Raises:
        ValueError: the file is truncated or not safetensors.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
            views = {name: file.get_tensor(name) for name in names if mapped}
        if mapped:
            return views, metadata
        copies = _joined(path, names, part_of)
        for name in names:
            if (part := part_of(name)) and part[0] in copies:
                continue
            copy, before = _copied(path, name), copies.get(repeats(name))
            copies[name] = before if before is not None and torch.equal(copy, before) else copy
        return copies, metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from error


def _joined(path: Path, names: list[str], part_of: Callable[[str], Part | None]) -> dict[str, Tensor]:
    """The tensors that a file has all parts of, each part read into its place."""
    from safetensors import safe_open

    wholes: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    for name in names:
        if part := part_of(name):
            whole, place, counts[whole] = part
            wholes.setdefault(whole, {})[place] = name
    made: dict[str, Tensor] = {}
    for whole, parts in wholes.items():
        with safe_open(path, framework="pt") as file:  # mapped for one at a time, as in `_copied`
            headers = {(tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype())
                       for name in parts.values()}
            if len(parts) < counts[whole] or len(headers) > 1 or not all(shape for shape, _ in headers):
                continue
            for place, name in parts.items():
                tensor = file.get_tensor(name)
                if whole not in made:
                    made[whole] = tensor.new_empty(counts[whole] * len(tensor), *tensor.shape[1:])
                made[whole][place * len(tensor):(place + 1) * len(tensor)] = tensor
    return made


def _copied(path: Path, name: str) -> Tensor:
    """One tensor of a file, which is mapped for it alone, so that no more than one is ever held twice.

    Large ones in half precision are left in their mapping: they take no memory until they are read, to be converted.
    Small ones, such as the scales of packed layers, are not worth one: of many, each would hold pages around it.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(name)
        halves = tensor.is_floating_point() and tensor.element_size() == 2
        return tensor if halves and tensor.numel() >= WORTH_A_MAPPING else tensor.clone()


def sync(path: Path) -> None:
    """See that a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
