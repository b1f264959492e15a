"""Attention, and GELU before a rounding to 8 bits, written by hand for CPUs with AVX-512's bfloat16 products.

Everything else is left to PyTorch and its compiler. These two are not, because nothing they offer comes near on such a
CPU: docs/log.md has what was tried. `kernels.cpp` is compiled on first use, kept in the user's cache, and loaded from
there; without a compiler, or on another CPU, models run as before.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-mavx2", "-mfma", "-mavx512f", "-mavx512bw",
         "-mavx512vl", "-mavx512dq", "-mavx512bf16")
log = logging.getLogger(__name__)


def missing() -> str:
    """Why there are no kernels here; nothing where there are."""
    found = loaded()
    return found if isinstance(found, str) else ""


def take(x: Tensor) -> bool:
    """Whether the kernels are for this input: bfloat16 on a CPU, and no gradient asked for."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not x.requires_grad


@cache
def loaded() -> ctypes.CDLL | str:
    """The compiled kernels, or why they cannot be had; a failure to compile is logged, once."""
    if reason := unsuitable():
        return reason
    try:
        return ctypes.CDLL(str(compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        log.warning("attention and int8 run slower than they could: %s was not compiled: %s", SOURCE.name, told)
        return f"{SOURCE.name} was not compiled: {told}"


def unsuitable() -> str:
    """Why the kernels are not for this machine; nothing where they are."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they are for Linux on x86_64, and this is {platform.system()} on {platform.machine()}"
    if not torch.cpu._is_avx512_bf16_supported():
        return "the CPU has no bfloat16 products of AVX-512"
    return "" if compiler() else "no C++ compiler was found: name one in the variable CXX"


def compiler() -> str | None:
    """The path of the C++ compiler."""
    return shutil.which(os.environ.get("CXX") or "c++")


def compiled() -> Path:
    """The kernels' file in the user's cache, compiled unless it is there; its name tells source, flags and compiler."""
    source = SOURCE.read_bytes()
    program = compiler()
    name = hashlib.sha256(repr((source, FLAGS, program)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimdit"
    path = folder / f"kernels-{name}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "kernels.so"
            subprocess.run([str(program), *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True,
                           text=True, timeout=300)
            made.replace(path)
    return path


torch.library.define("slimdit::attend", "(Tensor qkv, Tensor? steps, Tensor? bias, int images, int heads) -> Tensor")
torch.library.define("slimdit::gelu_levels", "(Tensor x, Tensor steps, Tensor? bias) -> (Tensor, Tensor)")


@torch.library.impl("slimdit::attend", "cpu")
def attend(qkv: Tensor, steps: Tensor | None, bias: Tensor | None, images: int, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of every head, from what the layer of q, k and v gives.

    Args:
        qkv: (images * tokens, 3 * heads * head_dim), bfloat16.
        steps: (images * tokens, 1) float32, by which rows are still to be multiplied, or None.
        bias: (3 * heads * head_dim,) bfloat16 to be added then, or None.

    Returns:
        (images * tokens, heads * head_dim), bfloat16.
    """
    rows, inner = qkv.shape[0], qkv.shape[1] // 3
    out = torch.empty(rows, inner, dtype=torch.bfloat16)
    call("attend", (qkv.bfloat16(), steps, bias, out), images, rows // images, heads, inner // heads)
    return out


@torch.library.impl("slimdit::gelu_levels", "cpu")
def gelu_levels(x: Tensor, steps: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """gelu(x * steps + bias) rounded to 8 bits row by row, around 128: uint8 as `x`, and steps float32 (rows, 1).

    Args:
        x: (rows, width), bfloat16.
        steps: (rows, 1), float32.
        bias: (width,) bfloat16, or None.
    """
    levels, level_steps = torch.empty(x.shape, dtype=torch.uint8), steps.new_empty(x.shape[0], 1)
    call("gelu_levels", (x.bfloat16(), steps, bias, levels, level_steps), *x.shape)
    return levels, level_steps


@torch.library.register_fake("slimdit::attend")
def _(qkv: Tensor, steps: Tensor | None, bias: Tensor | None, images: int, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3, dtype=torch.bfloat16)


@torch.library.register_fake("slimdit::gelu_levels")
def _(x: Tensor, steps: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), steps.new_empty(x.shape[0], 1)


def call(name: str, tensors: tuple[Tensor | None, ...], *sizes: int) -> None:
    """Call a kernel on the memory of tensors; a None is a null pointer."""
    kernels = loaded()
    if isinstance(kernels, str):
        raise RuntimeError(f"slimdit::{name} cannot be had: {kernels}")
    kept = [None if tensor is None else tensor.contiguous() for tensor in tensors]  # alive until the call returns
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in kept]
    getattr(kernels, name)(*pointers, *map(ctypes.c_long, sizes))
