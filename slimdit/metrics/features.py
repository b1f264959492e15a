"""Images to features: the networks that quality is measured with, and the reference sets that come with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling.seeds import seeded
from ..shards import Shards
from . import inception, lite0
from .balls import radii
from .quality import Statistics, mean_kernel

ASSETS = Path(__file__).parents[1] / "assets"
DITHER = 8.0  # standard deviation, of 255: see `dithered`
BATCH = 64


@dataclass(frozen=True)
class Features:
    """What a network sees in images.

    Attributes:
        pool: (n, d) float64, the features of the distances.
        spatial: (n, d) float64, with the positions kept, for sFID; None where the network has none.
        logits: (n, classes) float64, without bias, for the inception score; None where the network has none.
    """

    pool: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None


Forward = Callable[[Tensor], tuple[Tensor, ...]]
"""RGB images (n, 3, h, w) on the scale 0..255 to pool features and, where there are any, spatial ones and logits."""


class Extractor:
    """A feature network as a function of images and their ids.

    Attributes:
        name: its key in `FEATURES`; a distance measured with it says so (`fd_<name>`).
        weights: hash of its weights.
        dither: standard deviation of the noise added to every image, of 255.
        resize: how images come to the network's size.
        definition: the sentence to print with its numbers.
    """

    def __init__(self, name: str, definition: str, forward: Forward, *, weights: str, dither: float, resize: str,
                 device: str) -> None:
        self.name, self.definition, self.weights, self.dither, self.resize = name, definition, weights, dither, resize
        self._forward, self._device = forward, torch.device(device)

    def __call__(self, images: np.ndarray, ids: Sequence[int], *, batch: int = BATCH,
                 progress: Callable[[int], None] | None = None) -> Features:
        """Features of uint8 images (n, height, width, 1 or 3), the same in any batch but for float32 rounding.

        Args:
            ids: image ids (n,), the seeds of the dither. Give the two sides of a pair the same ids.
            progress: called with the number of images done after every batch.

        Raises:
            ValueError: the images are not such an array, or the ids are not one per image.
        """
        check_images(images)
        if len(ids) != len(images):
            raise ValueError(f"{len(images)} images have {len(ids)} ids: give one id per image")
        if not len(images):
            raise ValueError("there are no images to take features of: give at least one")
        parts = []
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            parts.append(self._features(images[part], ids[part]))
            if progress:
                progress(min(start + batch, len(images)))
        return Features(*(np.concatenate(outputs) for outputs in zip(*parts, strict=True)))

    def stream(self, blocks: Iterable[np.ndarray]) -> Iterator[Features]:
        """Features of blocks of images, one block after another and in memory for one; their ids count on from 0.

        Raises:
            ValueError: a block is not an array of images.
        """
        first = 0
        for images in blocks:
            yield self(images, range(first, first + len(images)), batch=len(images))
            first += len(images)

    @torch.inference_mode()
    def _features(self, images: np.ndarray, ids: Sequence[int]) -> tuple[np.ndarray, ...]:
        x = dithered(images, ids, self.dither) if self.dither else torch.from_numpy(images.astype(np.float32))
        x = x.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # (n, 3, h, w): gray is repeated
        # A GPU's TF32 convolutions would round the features to 10 bits.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return tuple(output.double().cpu().numpy() for output in self._forward(x.to(self._device)))


@dataclass(frozen=True)
class FeatureSet:
    """The features of images 0 to count - 1, in shards of `BATCH`: the same to the bit for any number of workers.

    Attributes:
        images: a hash of the images; those of others in the folder are replaced.
    """

    folder: Path
    count: int
    network: Extractor
    images: str

    def make(self, images: Callable[[range], np.ndarray], progress: Callable[[int], None] | None = None, *,
             worker: int = 0, workers: int = 1) -> None:
        """Compute this worker's part of what is not there yet, from `images` of ids; see `Shards.fill`."""
        def extract(ids: range) -> dict[str, np.ndarray]:
            return {name: array for name, array in vars(self.network(images(ids), ids)).items() if array is not None}

        self._shards.fill(self.count, BATCH, extract, worker=worker, workers=workers, progress=progress)

    def read(self) -> Features:
        """All features.

        Raises:
            ValueError: some are missing or damaged.
        """
        return Features(**self._shards.read(range(self.count)))

    @property
    def _shards(self) -> Shards:
        return Shards(self.folder, {"features": self.network.definition, "images": self.images})


def extractor(name: str, *, weights: str | Path | None = None, device: str = "cpu") -> Extractor:
    """A feature network by its name.

    Args:
        name: `"lite0"`, bundled, or `"inception"`, whose weights you have.
        weights: the path of Inception's weights, or `"download"` to fetch them.

    Raises:
        ValueError: the name is unknown, or the weights are missing or not this network's.
        FileNotFoundError: there is no such file of weights.
        ConnectionError: the download failed.
    """
    if name not in FEATURES:
        raise ValueError(f"feature network {name!r} is unknown: use one of {', '.join(FEATURES)}")
    return FEATURES[name](weights, device)


def lite0_extractor(weights: str | Path | None, device: str) -> Extractor:
    """The bundled network. Its resize is bilinear, half pixel centres (align_corners=False), antialias=False."""
    path = Path(weights) if weights else lite0.WEIGHTS
    network = lite0.load_lite0(path).to(device)

    def forward(images: Tensor) -> tuple[Tensor, ...]:
        return (network(F.interpolate(images, (lite0.SIDE, lite0.SIDE), mode="bilinear", align_corners=False,
                                      antialias=False)),)

    resize = f"{lite0.SIDE} x {lite0.SIDE} (bilinear, no antialias)"
    definition = (f"lite0: spatial mean of block 10 of EfficientNet-Lite0 (ImageNet), {lite0.WIDTH} features; images "
                  f"dithered with noise of standard deviation {DITHER:g} of 255 seeded by image id, clipped, resized "
                  f"to {resize}. Not FID, nor to be set beside it.")
    return Extractor("lite0", definition, forward, weights=short_hash(path), dither=DITHER, resize=resize,
                     device=device)


def inception_extractor(weights: str | Path | None, device: str) -> Extractor:
    """FID's own network, from a file the user has."""
    if weights is None:
        raise ValueError("the inception features need their weights: give the path of "
                         f"{Path(inception.URL).name}, or 'download' to fetch it")
    path = inception.download() if weights == "download" else Path(weights)
    network = inception.load_inception(path).to(device)
    digest, resize = short_hash(path), "299 x 299 as TensorFlow 1 did (bilinear, no antialias)"
    definition = (f"inception: pool3 of Inception-v3 (TensorFlow 2015, PyTorch port, weights sha256 {digest}), "
                  f"2048 features; spatial: mixed_6/conv channels 0..6; images resized to {resize}, no dither.")
    return Extractor("inception", definition, network, weights=digest, dither=0.0, resize=resize, device=device)


def short_hash(path: Path) -> str:
    """The first 8 digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


FEATURES: Mapping[str, Callable[[str | Path | None, str], Extractor]] = {
    "lite0": lite0_extractor,
    "inception": inception_extractor,
}
"""Feature networks by name, each built with (weights, device)."""


def dithered(images: np.ndarray, ids: Sequence[int], std: float = DITHER) -> Tensor:
    """Images (n, h, w, c) with Gaussian noise of their own ids, clipped to 0..255, float32.

    Backgrounds of real images are often exactly 0, and a network notices noise there that no eye can see: on
    Fashion-MNIST, invisible noise of standard deviation 2 scored 119 where real images score 3. A little noise on both
    sides makes the distance see what people see.
    """
    noise = [torch.randn(images.shape[1:], generator=seeded(0, "dither", int(image_id))) for image_id in ids]
    return (torch.from_numpy(images.astype(np.float32)) + std * torch.stack(noise)).clamp(0, 255)


def check_images(images: np.ndarray) -> None:
    """Refuse what is not an array of images."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be uint8 of (images, height, width, 1 or 3), not {images.dtype} of "
                         f"{images.shape}")


@dataclass(frozen=True, eq=False)
class Reference:
    """The real images that others are measured against, as features.

    Attributes:
        pool: (n, d) features, float16 in the bundled file; None where only their statistics are known.
        labels: (n,) classes, or None where they are unknown (then there is no class accuracy).
        statistics: mean and covariance of the pool features.
        name: what is printed beside the numbers.
        features: name of the feature network.
        spatial: statistics of the spatial features, or None.
    """

    pool: np.ndarray | None
    labels: np.ndarray | None
    statistics: Statistics
    name: str
    features: str
    spatial: Statistics | None = None

    @classmethod
    def from_images(cls, images: np.ndarray, extract: Extractor, name: str, *, labels: np.ndarray | None = None,
                    progress: Callable[[int], None] | None = None) -> Reference:
        """The reference of one's own images, uint8 (n, h, w, c); their ids are their places, 0..n-1.

        Raises:
            ValueError: the images are not such an array, there are fewer than 2, or not one label per image.
        """
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(images)} reference images have {len(labels)} labels: give one label per image")
        seen = extract(images, range(len(images)), progress=progress)
        return cls(seen.pool, labels, Statistics.of(seen.pool), name, extract.name,
                   None if seen.spatial is None else Statistics.of(seen.spatial))

    @cached_property
    def mean_kernel(self) -> float | None:
        """The reference's own part of KID, which takes longer than the rest."""
        return None if self.pool is None else mean_kernel(self.pool)

    @cached_property
    def radii(self) -> np.ndarray | None:
        """How far the reference's own balls reach, for precision: squared distances of the third neighbours."""
        return None if self.pool is None else radii(self.pool, 3)

    @cached_property
    def sha256(self) -> str:
        """A hash of everything numbers are measured against, by which two references are known to be one."""
        hashed = hashlib.sha256(self.features.encode())
        for part in (self.statistics, self.spatial):
            if part is not None:
                hashed.update(part.mu.tobytes() + part.sigma.tobytes())
        for array in (self.pool, self.labels):
            if array is not None:
                hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()

    @cached_property
    def classes(self) -> int | None:
        """How many classes the labels name."""
        return None if self.labels is None else int(self.labels.max()) + 1


def bundled_reference() -> Reference:
    """The 10,000 test images of Fashion-MNIST in 32 x 32, as the bundled network sees them."""
    with np.load(ASSETS / "fashion_mnist" / "reference_lite0.npz", allow_pickle=False) as file:
        return Reference(file["pool"], file["labels"].astype(np.int64),
                         Statistics(file["mu"], file["sigma"], int(file["n"])),
                         "Fashion-MNIST test split, 10,000 images padded to 32 x 32", "lite0")


def bundled_images() -> tuple[np.ndarray, np.ndarray]:
    """The test split of Fashion-MNIST: uint8 (10000, 32, 32, 1), centred on black, and labels (10000,)."""
    with np.load(ASSETS / "fashion_mnist" / "t10k.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], labels
