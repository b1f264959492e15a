"""ADM's `.npz` files of samples and statistics, which other evaluators of generated images read and write too.

Samples: `arr_0` uint8 (n, height, width, 3) and, where known, `arr_1` labels (n,). Statistics: `mu`, `sigma` of
the pool features, `mu_s`, `sigma_s` of the spatial ones. A reference batch may hold both. Nothing is unpickled.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from ..files import writing
from .features import check_images
from .quality import Statistics

LIMIT = 32 * 2 ** 30  # bytes of one file's arrays; 50,000 images of 256 x 256 are 9.8e9
INFLATION = 200  # times its compressed size that a file may claim to hold; real images compress 10 times at most
SMALL = 64 * 2 ** 20  # bytes that need no such suspicion
# What zipfile, zlib and numpy raise on a file that is not whole.
BROKEN = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError, NotImplementedError, RuntimeError)
SYMMETRY = 1e-6  # relative difference of a covariance from its transpose


def read_samples(path: Path, *, limit: int = LIMIT) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 (n, h, w, c) and labels (n,) int64 or None.

    Raises:
        ValueError: the file is not such a file, or claims more than `limit` bytes.
    """
    arrays = read_arrays(path, ("arr_0", "arr_1"), limit)
    if "arr_0" not in arrays:
        raise ValueError(f"{path} holds no samples: an ADM sample file has uint8 images under arr_0")
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    try:
        check_images(images)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: arr_1 must be one whole number per image, not {labels.dtype} of {labels.shape}")
    return images, None if labels is None else labels.astype(np.int64)


def sample_blocks(path: Path, rows: int, *, limit: int = LIMIT) -> Iterator[np.ndarray]:
    """The images of a sample file, uint8 (rows, h, w, c) at a time and fewer at the end: never all in memory at once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a file, or claims more than `limit` bytes. What is damaged behind the header
            is found when it is reached.
    """
    with _opened(path, ("arr_0",), limit) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise _ClaimError(f"{path} holds no samples: an ADM sample file has uint8 images under arr_0")
        with archive.open("arr_0.npy") as file:
            shape, by_columns, dtype = _header(file)
            try:
                check_images(np.empty((0, *shape[1:]), dtype))
            except ValueError as error:
                raise _ClaimError(f"{path}: {error}") from error
            if by_columns:
                raise _ClaimError(f"{path} holds its images with columns first: write them anew with numpy.savez")
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                yield np.frombuffer(file.read(count * math.prod(shape[1:])), np.uint8).reshape(count, *shape[1:])


def write_samples(path: Path, images: np.ndarray, labels: Sequence[int] | np.ndarray | None = None) -> None:
    """Write images uint8 (n, h, w, c) and their labels, atomically and compressed.

    Raises:
        ValueError: the images are not such an array, or the labels are not one per image.
    """
    check_images(images)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} images have {len(labels)} labels: give one label per image")
    write_arrays(path, {"arr_0": images} | ({} if labels is None else {"arr_1": np.asarray(labels, np.int64)}))


def read_statistics(path: Path, *, limit: int = LIMIT) -> tuple[Statistics, Statistics | None]:
    """Statistics of the pool features, and of the spatial ones where the file has them.

    ADM's own files do not say of how many images: `n` is then None.

    Raises:
        ValueError: the file is not such a file, or claims more than `limit` bytes.
    """
    arrays = read_arrays(path, ("mu", "sigma", "mu_s", "sigma_s", "n"), limit)
    n = int(arrays["n"]) if "n" in arrays and arrays["n"].shape == () else None
    pool, spatial = (_statistics(path, arrays, suffix, n) for suffix in ("", "_s"))
    if pool is None:
        raise ValueError(f"{path} holds no statistics: an ADM statistics file has mu and sigma")
    return pool, spatial


def write_statistics(path: Path, pool: Statistics, spatial: Statistics | None = None) -> None:
    """Write statistics atomically; `n`, where known, is an array of its own that other readers ignore."""
    arrays: dict[str, np.ndarray] = {"mu": pool.mu, "sigma": pool.sigma}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mu, "sigma_s": spatial.sigma}
    if pool.n is not None:
        arrays["n"] = np.array(pool.n, np.int64)
    write_arrays(path, arrays)


def read_arrays(path: Path, names: Sequence[str], limit: int = LIMIT) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` that are among `names`, after a look at what their headers claim.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole `.npz` of plain numbers, or claims more than `limit` bytes.
    """
    with _opened(path, names, limit), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names if name in file.files}


@contextmanager
def _opened(path: Path, names: Sequence[str], limit: int) -> Iterator[zipfile.ZipFile]:
    """The archive, after a look at what the headers of `names` claim; what is wrong with it becomes one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: name an .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_claims(path, archive, names, limit)
            yield archive
    except _ClaimError as error:
        raise ValueError(str(error)) from None
    except BROKEN as error:
        raise ValueError(f"{path} is not a whole .npz file ({error}): copy or download it again") from error


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed `.npz` atomically; the same arrays give the same bytes."""
    with writing(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


class _ClaimError(ValueError):
    """What the headers claim is not to be read."""


def _check_claims(path: Path, archive: zipfile.ZipFile, names: Sequence[str], limit: int) -> None:
    wanted = {f"{name}.npy" for name in names}
    members = [member for member in archive.infolist() if member.filename in wanted]
    claimed = sum(member.file_size for member in members)
    if claimed > limit:
        raise _ClaimError(f"{path} claims {claimed / 1e9:.1f} GB of arrays, more than the {limit / 1e9:.1f} GB "
                          "allowed: split it")
    if claimed > max(SMALL, INFLATION * path.stat().st_size):
        raise _ClaimError(f"{path} claims {claimed / 1e9:.1f} GB in a file of {path.stat().st_size:,} bytes, which no "
                          "images do: it is damaged or malicious")
    for member in members:
        with archive.open(member) as file:
            shape, _, dtype = _header(file)
            if dtype.kind not in "uif":
                raise _ClaimError(f"{path}: {member.filename} holds {dtype}, not plain numbers")
            size = file.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
            if size != member.file_size:
                raise _ClaimError(f"{path}: {member.filename} claims {shape} of {dtype} but holds {member.file_size:,} "
                                  "bytes: it is damaged or malicious")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type of a `.npy`, which is read up to its numbers."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _statistics(path: Path, arrays: dict[str, np.ndarray], suffix: str, n: int | None) -> Statistics | None:
    mu, sigma = arrays.get(f"mu{suffix}"), arrays.get(f"sigma{suffix}")
    if mu is None or sigma is None:
        return None
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise ValueError(f"{path}: mu{suffix} of {mu.shape} and sigma{suffix} of {sigma.shape} are no mean and "
                         "covariance")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: mu{suffix} or sigma{suffix} is not finite: compute the statistics again")
    if np.abs(sigma - sigma.T).max() > SYMMETRY * np.abs(sigma).max():
        raise ValueError(f"{path}: sigma{suffix} is not symmetric, so it is no covariance")
    return Statistics(mu, sigma, n)
