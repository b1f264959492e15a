"""Operators of our own for CPUs with AVX-512's bfloat16 products, and how they come to be there.

Attention and GELU before a rounding to 8 bits are written by hand, because nothing that PyTorch and its compiler offer
comes near on such a CPU; products with weights in oneDNN's own layout are oneDNN's, called without Python in between,
which took a fifth of a small model's time: docs/log.md has what was tried. `kernels.cpp` and `operators.cpp` are
compiled on first use, kept in the user's cache, and loaded from there; without a compiler, or on another CPU, models
run as before.
"""

from __future__ import annotations

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

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
SOURCES = (HERE / "kernels.cpp", HERE / "operators.cpp")
FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared", "-mavx2", "-mfma", "-mavx512f", "-mavx512bw",
         "-mavx512vl", "-mavx512dq", "-mavx512bf16", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
log = logging.getLogger(__name__)


def missing() -> str:
    """Why there are no kernels here; nothing where there are. They are loaded by asking."""
    return loaded()


def take(x: Tensor) -> bool:
    """Whether the kernels are for this input: bfloat16 on a CPU, and no gradient asked for."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not x.requires_grad


@cache
def loaded() -> str:
    """Load the operators; why they cannot be had, or nothing. A failure to compile is logged, once."""
    if reason := unsuitable():
        return reason
    try:
        torch.ops.load_library(compiled())
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        told = next((line for line in lines if "error" in line), lines[-1])
        log.warning("models run slower than they could: %s was not compiled: %s", SOURCES[0].name, told)
        return f"{SOURCES[0].name} was not compiled: {told}"
    return ""


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
    """The operators' file in the user's cache, compiled unless it is there; its name tells what it was made of."""
    program, places = compiler(), (str(TORCH / "include"), str(TORCH / "lib"))
    made_of = ([source.read_bytes() for source in SOURCES], FLAGS, program, torch.__version__, places)
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimdit"
    path = folder / f"kernels-{name}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "kernels.so"
            # -isystem: warnings of PyTorch's own headers are not ours to mend.
            subprocess.run([str(program), *FLAGS, *map(str, SOURCES), "-isystem", places[0], "-L", places[1], "-lc10",
                            "-ltorch_cpu", "-o", str(made)], check=True, capture_output=True, text=True, timeout=300)
            made.replace(path)
    return path


torch.library.define("slimdit::attend", "(Tensor qkv, Tensor? steps, Tensor? bias, int images, int heads) -> Tensor")
torch.library.define("slimdit::gelu_levels", "(Tensor x, Tensor steps, Tensor? bias) -> (Tensor, Tensor)")
torch.library.define("slimdit::prepack_int8", "(Tensor weight, Tensor scale, Tensor? bias, Tensor handle) -> ()")
torch.library.define("slimdit::static_linear", "(Tensor levels, Tensor handle, int zero, int outputs) -> Tensor")
torch.library.define("slimdit::static_gelu_levels", "(Tensor levels, Tensor handle, int zero, int outputs, "
                                                    "float step, int step_zero) -> Tensor")
torch.library.define("slimdit::prepack_linear", "(Tensor weight, Tensor handle) -> ()")
torch.library.define("slimdit::prepacked_linear",
                     "(Tensor rows, Tensor handle, Tensor? bias, int outputs, bool gelu) -> Tensor")


@torch.library.register_fake("slimdit::attend")
def attend(qkv: Tensor, steps: Tensor | None, bias: Tensor | None, images: int, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of every head, from what the layer of q, k and v gives.

    Args:
        qkv: (images * tokens, 3 * heads * head_dim), bfloat16.
        steps: (images * tokens, 1) float32, by which rows are still to be multiplied, or None.
        bias: (3 * heads * head_dim,) bfloat16 to be added then, or None.

    Returns:
        (images * tokens, heads * head_dim), bfloat16.
    """
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3, dtype=torch.bfloat16)


@torch.library.register_fake("slimdit::gelu_levels")
def gelu_levels(x: Tensor, steps: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """gelu(x * steps + bias) rounded to 8 bits row by row, around 128: uint8 as `x`, and steps float32 (rows, 1).

    Args:
        x: (rows, width), bfloat16.
        steps: (rows, 1), float32.
        bias: (width,) bfloat16, or None.
    """
    return x.new_empty(x.shape, dtype=torch.uint8), steps.new_empty(x.shape[0], 1)


@torch.library.register_fake("slimdit::static_linear")
def static_linear(levels: Tensor, handle: Tensor, zero: int, outputs: int) -> Tensor:
    """(levels - zero) W^T + bias, with what `prepack_int8` was given with this handle and keeps as long as it lives.

    `prepack_int8` takes W as int8 (outputs, d) with a float32 scale per row, (outputs,), by which a level's step is
    multiplied already.

    Args:
        levels: uint8 (n, d).

    Returns:
        (n, outputs), bfloat16.
    """
    return levels.new_empty(levels.shape[0], outputs, dtype=torch.bfloat16)


@torch.library.register_fake("slimdit::static_gelu_levels")
def static_gelu_levels(levels: Tensor, handle: Tensor, zero: int, outputs: int, step: float, step_zero: int) -> Tensor:
    """The tanh-approximated GELU of `static_linear`, as the levels of the next layer: round(. / step) + step_zero.

    Returns:
        uint8, (n, outputs).
    """
    return levels.new_empty(levels.shape[0], outputs)


@torch.library.register_fake("slimdit::prepacked_linear")
def prepacked_linear(rows: Tensor, handle: Tensor, bias: Tensor | None, outputs: int, gelu: bool) -> Tensor:
    """rows W^T + bias, and GELU of that where asked for, with the W that `prepack_linear` was given with this handle.

    `prepack_linear` keeps W, (outputs, d), in oneDNN's own layout for as long as the handle, any tensor, lives.

    Args:
        rows: (n, d), bfloat16.
        bias: (outputs,) bfloat16, or None.
        gelu: its tanh approximation.

    Returns:
        (n, outputs), bfloat16.
    """
    return rows.new_empty(rows.shape[0], outputs)
