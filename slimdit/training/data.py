"""Images to learn from: folders, `.npz` and IDX files, data sets of the Hub, encoded latents.

`open_data` turns what a person names into an `ImageData`; the caller's generator decides what is random in a batch.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .encode import INDEX, EncodedLatents

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package dataset-fashion-mnist puts it
BUNDLED = Path(__file__).parents[1] / "assets" / "fashion_mnist" / "t10k.npz"
MNIST_SIZE = 32  # the side MNIST-like images are padded to by default: every patch of the presets divides it
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
GRAY_MODES = {"1", "L", "LA", "La"}
DEEP_MODES = ("I", "F")  # more than 8 bits a channel, which a conversion would clip without a word
LARGEST_ARRAY = 16 << 30  # bytes of an array that is read into memory whole
LARGEST_LABEL = 1 << 20


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


def open_data(source: str, *, size: int | None = None, split: str = "train", flip: bool = False) -> ImageData:
    """The labelled images that a name or a path stands for.

    Args:
        source: `"bundled"` (Fashion-MNIST's test split, whatever the split asked for), `"fashion-mnist"`, `"hf:NAME"`
            (a data set of the Hugging Face Hub or a folder of its files), or the path of an `.npz` file (ADM's arr_0
            and arr_1, or images and labels), a folder of IDX files, a folder of encoded latents, or a folder with a
            sub-folder of images per class (in sorted order, with the split's name in between or not).
        size: side of the square images: MNIST-like ones are centred on black, others centre-cropped and resized. None
            keeps images as they are, which must then be of one size; the two named sets become 32 pixels wide.
        split: `"train"` or `"test"`, where the source has splits.
        flip: mirror half of the images, at random. Latents have their mirrored copies from when they were encoded.

    Raises:
        FileNotFoundError: there is nothing under that name or path.
        ValueError: what is there is not labelled images; the message says what is wrong and what to do.
    """
    if size is not None and size < 1:
        raise ValueError(f"data: size must be at least 1 pixel, not {size}")
    if source == "bundled":
        return padded(*read_npz(BUNDLED), size or MNIST_SIZE, flip)
    if source == "fashion-mnist":
        if not FASHION_MNIST.is_dir():
            raise FileNotFoundError(f"{FASHION_MNIST} does not exist: install the Debian package dataset-fashion-mnist "
                                    f"or name the folder of its four IDX files instead of fashion-mnist")
        return read_idx_images(FASHION_MNIST, split, size=size or MNIST_SIZE, flip=flip)
    if source.startswith("hf:"):
        return hub_images(source.removeprefix("hf:"), split, size, flip)
    return _open_path(Path(source), size, split, flip)


def _open_path(path: Path, size: int | None, split: str, flip: bool) -> ImageData:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name an .npz file, a folder of images, IDX files or latents, "
                                f"hf:NAME, fashion-mnist or bundled")
    if path.is_file():
        if path.suffix != ".npz":
            raise ValueError(f"{path} is not data to learn from: name an .npz file or a folder of images, IDX files or "
                             f"latents")
        return resized(*read_npz(path), size, flip)
    if (path / INDEX).exists() or any(path.glob("shard-*.safetensors")):
        latents = EncodedLatents(path)
        if flip and not latents.flips:
            raise ValueError(f"{path} was encoded without mirrored copies: encode it with flips, or train without")
        if size not in (None, *latents.shape[1:]):
            raise ValueError(f"{path} holds latents of {latents.shape[1]}x{latents.shape[2]}, which cannot be resized "
                             f"to {size}: leave the size out, or encode the images again")
        return latents
    if any(path.glob("*-idx3-ubyte*")):
        return read_idx_images(path, split, size=size, flip=flip)
    return folder_images(path, split, size, flip)


class ArrayImages:
    """Images held in memory as uint8, (images, channels, height, width), with their labels.

    Raises:
        ValueError: there are no images, or they and their labels do not fit together.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, flip: bool = False) -> None:
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 of 4 dimensions, not {images.dtype} of {images.ndim}")
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.labels = checked_labels(labels, len(images), "images in memory")
        self.flip = flip

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images in -1..1, half of them mirrored where `flip` is set, and their labels."""
        images = to_signal(self.images[indices])
        return mirrored(images, generator) if self.flip else images, self.labels[indices]


class LazyImages:
    """Pictures opened when a batch asks for them: cropped to a centred square, resized, gray or RGB throughout.

    Args:
        read: the picture of an index.
        name: names the picture of an index to people.
        classes: how many labels there are.
        size: side of the images; None keeps the size of the first, which all must then have.

    Raises:
        ValueError: a picture cannot be read (now, or when its batch comes), or is not like the others.
    """

    def __init__(self, read: Callable[[int], Image.Image], name: Callable[[int], str], labels: Tensor, classes: int, *,
                 size: int | None = None, flip: bool = False) -> None:
        self.read, self.name, self.labels, self.classes, self.flip = read, name, labels, classes, flip
        looked_at = [self._open(i) for i in range(0, len(labels), math.ceil(len(labels) / 64))]
        self.gray = all(image.mode in GRAY_MODES for image in looked_at)
        self.size = (size, size) if size else looked_at[0].size  # width and height, as Pillow has it
        self.resize = size is not None
        self.threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return 1 if self.gray else 3, self.size[1], self.size[0]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images in -1..1, half of them mirrored where `flip` is set, and their labels."""
        pixels = np.stack(list(self.threads.map(self._pixels, indices.tolist())))  # (batch, height, width, channels)
        images = to_signal(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        return mirrored(images, generator) if self.flip else images, self.labels[indices]

    def _pixels(self, index: int) -> np.ndarray:
        image = self._open(index)
        if self.gray and image.mode not in GRAY_MODES:
            raise ValueError(f"{self.name(index)} is coloured but the images looked at first are gray: convert it, or "
                             f"keep the two kinds apart")
        image = image.convert("L" if self.gray else "RGB")
        if self.resize:
            image = ImageOps.fit(image, self.size, Image.Resampling.LANCZOS)
        elif image.size != self.size:
            raise ValueError(f"{self.name(index)} is {image.width}x{image.height} where the first image is "
                             f"{self.size[0]}x{self.size[1]}: name a size to crop and resize all images to")
        return np.asarray(image).reshape(self.size[1], self.size[0], -1)

    def _open(self, index: int) -> Image.Image:
        with reading_picture(self.name(index)):
            image = self.read(index)
            # Pillow refuses at twice its limit and only warns from there down: here the limit is the limit.
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels are over Pillow's limit")
            if image.mode.startswith(DEEP_MODES):
                raise OSError(f"it has more than 8 bits a channel (mode {image.mode})")
            image.load()
            return image


@contextmanager
def reading_picture(name: str) -> Iterator[None]:
    """Turn what Pillow has to say of a bad file into a sentence."""
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError, UnidentifiedImageError) as error:
        raise ValueError(f"{name} cannot be read as an 8-bit picture: {error}; repair or remove it") from error


def to_signal(images: Tensor) -> Tensor:
    """uint8 to float32 in -1..1."""
    return images.float() / 127.5 - 1


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images, (batch, channels, height, width), half of them left for right at random."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def checked_labels(labels: np.ndarray, images: int, where: str) -> Tensor:
    """Labels as (images,) int64.

    Raises:
        ValueError: there are none, or not one per image, or one that is no class number.
    """
    if labels.shape != (images,) or not images:
        raise ValueError(f"{where}: {images} images have labels of shape {labels.shape}: there must be one label per "
                         f"image, and an image")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: labels must be whole numbers, not {labels.dtype}")
    for label in (labels.min(), labels.max()):
        if not 0 <= label <= LARGEST_LABEL:
            raise ValueError(f"{where}: label {label} is not a class number (0 to {LARGEST_LABEL}): number the classes "
                             f"from 0, and leave out images without a class")
    return torch.from_numpy(labels.astype(np.int64))


def folder_images(folder: Path, split: str = "train", size: int | None = None, flip: bool = False) -> LazyImages:
    """A folder with a sub-folder of PNG, JPEG or WebP images per class; classes are numbered in sorted order."""
    inner = folder / split
    if inner.is_dir() and any(child.is_dir() for child in inner.iterdir()):
        folder = inner
    kinds = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not kinds:
        raise ValueError(f"{folder} has no sub-folders: put the images of each class in a sub-folder of their own")
    files: list[Path] = []
    labels: list[int] = []
    for label, kind in enumerate(kinds):
        found = sorted(path for path in kind.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise ValueError(f"{kind} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): remove that class or fill "
                             f"it")
        files += found
        labels += [label] * len(found)
    return LazyImages(lambda i: Image.open(files[i]), lambda i: str(files[i]), torch.tensor(labels), len(kinds),
                      size=size, flip=flip)


def hub_images(name: str, split: str = "train", size: int | None = None, flip: bool = False) -> LazyImages:
    """A split of a data set of the Hugging Face Hub: its first column of images and its first of classes."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("hf: data sets need the package datasets: pip install 'slimdit[datasets]'") from error
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library's own errors have no common parent
        raise ValueError(f"hf:{name} split {split} cannot be opened: {' '.join(str(error).split())}") from error
    images = _column(table.features, datasets.Image, ("image", "img"))
    kind = _column(table.features, datasets.ClassLabel, ("label", "fine_label")) or _integers(table.features)
    if not images or not kind:
        raise ValueError(f"hf:{name} has no column of {'classes' if images else 'images'} among "
                         f"{', '.join(table.features)}: choose a data set of labelled images")
    labels = checked_labels(table.data.column(kind).to_numpy(), len(table), f"hf:{name} column {kind}")
    classes = getattr(table.features[kind], "num_classes", None) or int(labels.max()) + 1
    return LazyImages(lambda i: table[i][images], lambda i: f"hf:{name} {split} image {i}", labels, classes,
                      size=size, flip=flip)


def _column(features: Any, kind: type, preferred: tuple[str, ...]) -> str | None:
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    return next((name for name in preferred if name in found), found[0] if found else None)


def _integers(features: Any) -> str | None:
    """The column called label, where it is of plain whole numbers."""
    return "label" if getattr(features.get("label"), "dtype", "").lstrip("u").startswith("int") else None


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, height, width, channels) and labels (n,) of an `.npz`: arr_0 and arr_1 (ADM's), or images and labels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or too large, or its arrays are not images and labels.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _require_modest("it", max((entry.file_size for entry in archive.infolist()), default=0))
        with np.load(path, allow_pickle=False) as arrays:
            names = [pair for pair in (("arr_0", "arr_1"), ("images", "labels")) if set(pair) <= set(arrays)]
            if not names:
                raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}, not arr_0 and arr_1 or images and labels")
            images, labels = (arrays[name] for name in names[0])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an .npz of images and their labels: {error}") from error
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        raise ValueError(f"{path}: images must be uint8 of shape (images, height, width, 1 or 3), not {images.dtype} "
                         f"of {images.shape}")
    return images, checked_labels(labels, len(images), str(path)).numpy()


def resized(images: np.ndarray, labels: np.ndarray, size: int | None, flip: bool) -> ArrayImages:
    """Images (n, height, width, channels), centre-cropped and resized where a size is asked for."""
    if size is not None and images.shape[1:3] != (size, size):
        planes = images.squeeze(-1) if images.shape[3] == 1 else images  # as Pillow has gray images
        small = [np.asarray(ImageOps.fit(Image.fromarray(image), (size, size), Image.Resampling.LANCZOS))
                 for image in planes]
        images = np.stack(small).reshape(len(images), size, size, -1)
    return ArrayImages(images.transpose(0, 3, 1, 2), labels, flip=flip)


def padded(images: np.ndarray, labels: np.ndarray, size: int | None, flip: bool = False) -> ArrayImages:
    """Images (n, height, width, channels), centred on black in squares of `size` pixels."""
    if size is not None:
        rows, columns = size - images.shape[1], size - images.shape[2]
        if min(rows, columns) < 0:
            raise ValueError(f"data: images of {images.shape[1]}x{images.shape[2]} do not fit in {size} pixels: name a "
                             f"larger size")
        images = np.pad(images, ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0)))
    return ArrayImages(images.transpose(0, 3, 1, 2), labels, flip=flip)


def read_idx_images(folder: Path, split: str = "train", *, size: int | None = None, flip: bool = False) -> ArrayImages:
    """A split (`"train"`, or `"t10k"`, also called `"test"`) of a folder of MNIST-like IDX files, padded to `size`.

    Raises:
        FileNotFoundError: the folder has no such split.
        ValueError: a file is damaged, or the images are larger than `size`.
    """
    split = {"test": "t10k"}.get(split, split)

    def find(kind: str) -> Path:
        found = sorted(folder.glob(f"{split}-{kind}-ubyte*"))
        if not found:
            raise FileNotFoundError(f"{folder} has no {split}-{kind}-ubyte(.gz): is it a folder of IDX files?")
        return found[0]

    images, labels = read_idx(find("images-idx3")), read_idx(find("labels-idx1"))
    if images.ndim != 3:
        raise ValueError(f"{find('images-idx3')} holds an array of {images.ndim} dimensions, not images of one channel")
    return padded(images[..., None], checked_labels(labels, len(images), str(folder)).numpy(), size, flip)


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file, gzipped or not (the format of MNIST's site: two zero bytes, type, dimensions, sizes).

    No more is unzipped than the header claims, and no more is believed than `LARGEST_ARRAY`.

    Raises:
        ValueError: the file is not IDX of unsigned bytes, is truncated, or goes on after its end.
    """
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            return _idx_array(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error


def _idx_array(path: Path, file: BinaryIO | gzip.GzipFile) -> np.ndarray:
    magic = file.read(4)
    dimensions = magic[3] if len(magic) == 4 else 0
    header = file.read(4 * dimensions)
    if magic[:3] != b"\0\0\x08" or not dimensions or len(header) != 4 * dimensions:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: name a file of MNIST's format")
    sizes = struct.unpack(f">{dimensions}I", header)
    claimed = math.prod(sizes)
    _require_modest(str(path), claimed)
    body = np.frombuffer(bytearray(file.read(claimed + 1)), np.uint8)  # of a bytearray, as tensors want it writable
    if body.size != claimed:
        problem = "goes on after the" if body.size > claimed else f"is truncated: {body.size} bytes of"
        raise ValueError(f"{path} {problem} {claimed} bytes its header claims: copy or download it again")
    return body.reshape(sizes)


def _require_modest(where: str, size: int) -> None:
    if size > LARGEST_ARRAY:
        raise ValueError(f"{where} claims {size / 2**30:.0f} GiB unzipped, over the limit of "
                         f"{LARGEST_ARRAY / 2**30:.0f} GiB: use a folder of images or latents, read as needed")
