"""Images to learn from: Fashion-MNIST's IDX files, `.npz` files, folders, data sets of the Hub, encoded latents."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ImageData(Protocol):
    """Labelled images of one size, fetched by index."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image (or latent)."""

    @property
    def classes(self) -> int:
        """How many labels there are."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (batch, channels, height, width) in -1..1 and labels (batch,); all randomness from `generator`."""


class ArrayImages:
    """Images held in memory as uint8, (images, channels, height, width), with their labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, flip: bool = False) -> None:
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 of 4 dimensions, not {images.dtype} of {images.ndim}")
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images have {len(labels)} labels")
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.flip = flip

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return tuple(self.images.shape[1:])

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images in -1..1, half of them mirrored where `flip` is set, and their labels."""
        images = self.images[indices].float() / 127.5 - 1
        if self.flip:
            mirrored = torch.rand(len(indices), generator=generator) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        return images, self.labels[indices]


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file, gzipped or not (the format of MNIST's site: two zero bytes, type, dimensions, sizes).

    Raises:
        ValueError: the file is not IDX of unsigned bytes, or is truncated.
    """
    raw = path.read_bytes()
    data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    sizes = struct.unpack_from(f">{data[3]}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != np.prod(sizes):
        raise ValueError(f"{path} is truncated: {body.size} bytes of {np.prod(sizes)}")
    return body.reshape(sizes)


def read_idx_images(folder: Path, split: str = "train", *, size: int | None = None) -> ArrayImages:
    """A split ("train" or "t10k") of an MNIST-like folder, centred on black in squares of `size` pixels."""

    def find(kind: str) -> Path:
        found = sorted(folder.glob(f"{split}-{kind}-ubyte*"))
        if not found:
            raise FileNotFoundError(f"{folder} has no {split}-{kind}-ubyte(.gz): is it a folder of IDX files?")
        return found[0]

    images = read_idx(find("images-idx3"))
    if size is not None:
        rows, columns = size - images.shape[1], size - images.shape[2]
        images = np.pad(images, ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)))
    return ArrayImages(images[:, None], read_idx(find("labels-idx1")))
