"""Weights of which many are zero, stored as a bit per weight and the values of the others.

The file of a pruned model is then really smaller, and gives the same tensors back to the bit: 2:4 of float32 takes
1/2 + 1/32 of the dense bytes. How a weight is stored is no part of a model's structure: loading fills dense tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tensors import GIB, LARGEST_FILE, FormatError

MASK, VALUES = ".mask", ".values"
ENTRY = 256  # bytes: what a second tensor and a name in the config take, so that no small weight grows
BITS: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as a number of so many bytes."""


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors to write, and the names of those that are stored sparse: the weights that get smaller by it.

    A sparse weight becomes two tensors: `name.mask`, uint8 (ceil(size / 8),), whose bit i % 8 of byte i // 8 says
    whether value i of the flattened weight is kept, and `name.values`, the kept ones in order, in the weight's type.
    """
    packed: dict[str, Tensor] = {}
    names = []
    for name, tensor in tensors.items():
        if is_smaller(name, tensor):
            packed[name + MASK], packed[name + VALUES] = encode(tensor)
            names.append(name)
        else:
            packed[name] = tensor
    return packed, names


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors that `pack` would write, without the file's header and without packing them."""
    return sum(sparse_bytes(tensor) if is_smaller(name, tensor) else dense_bytes(tensor)
               for name, tensor in tensors.items())


def is_smaller(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a weight that gets smaller by being stored sparse."""
    return name.endswith(".weight") and tensor.ndim > 1 and sparse_bytes(tensor) + ENTRY < dense_bytes(tensor)


def dense_bytes(tensor: Tensor) -> int:
    """Bytes of every value of a tensor."""
    return tensor.numel() * tensor.element_size()


def sparse_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's mask and of its values that are not zero."""
    return -(-tensor.numel() // 8) + int(kept(tensor).count_nonzero()) * tensor.element_size()


def kept(tensor: Tensor) -> Tensor:
    """Which values are not a zero of all bits 0, bool and flat: -0.0 is kept, so that it comes back as it was."""
    return tensor.detach().contiguous().flatten().view(BITS[tensor.element_size()]) != 0


def encode(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The mask, uint8 (ceil(size / 8),), and the kept values, (kept,)."""
    chosen = kept(tensor).cpu()
    mask = torch.from_numpy(np.packbits(chosen.numpy(), bitorder="little"))
    return mask, tensor.detach().cpu().flatten()[chosen]


def unpack(tensors: Mapping[str, Tensor], names: Any, expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file with the named ones dense again.

    Args:
        names: what the config lists as stored sparse; anything, as nobody vouches for it.
        expected: the tensors that the structure asks for, whose shapes are believed.
        path: of the tensors, for the sentence.

    Raises:
        FormatError: the list, a mask or its values are not what `pack` writes, or would unpack to more than any file
            may hold (exit code 3).
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise FormatError(f"{path}: 'sparse' in its config must be a list of different names: save the model again")
    dense = dict(tensors)
    total = 0
    for name in names:
        mask, values = (_part(dense, name + suffix, path) for suffix in (MASK, VALUES))
        if name not in expected or name in dense:
            raise FormatError(f"{path}: {name} is stored sparse, and "
                              f"{'dense too' if name in dense else 'is no weight of this structure'}: save the model "
                              f"again")
        size = expected[name].numel()
        if mask.dtype is not torch.uint8 or mask.ndim != 1 or values.ndim != 1 or len(mask) != -(-size // 8):
            raise FormatError(f"{path}: {name}{MASK} is {mask.dtype} {tuple(mask.shape)} where {size:,} weights take "
                              f"torch.uint8 ({-(-size // 8)},): save the model again")
        total += size * values.element_size()
        if total > LARGEST_FILE:
            raise FormatError(f"{path} unpacks to more than {LARGEST_FILE // GIB} GiB: refused", 3)
        dense[name] = decode(mask, values, expected[name].shape, f"{path}: {name}")
    return dense


def _part(tensors: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in tensors:
        raise FormatError(f"{path} has no {name}, which its config says it stores: copy or save the model again")
    return tensors.pop(name)


def decode(mask: Tensor, values: Tensor, shape: torch.Size, where: str) -> Tensor:
    """The dense tensor of a mask, uint8 (ceil(size / 8),), and its values.

    Raises:
        FormatError: the mask keeps another number of values, or values beyond the last.
    """
    size = shape.numel()
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    if bits[size:].any() or int(bits.sum(dtype=np.int64)) != len(values):
        raise FormatError(f"{where}{MASK} keeps {int(bits.sum(dtype=np.int64)):,} of {size:,} weights, and "
                          f"{len(values):,} values are stored: copy or save the model again")
    dense = torch.zeros(size, dtype=values.dtype)
    dense[torch.from_numpy(bits[:size]).bool()] = values
    return dense.view(shape)
