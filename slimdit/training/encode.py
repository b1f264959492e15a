"""Latents encoded once: what the autoencoder says of every image, kept in shards that training reads as it goes.

Kept are the mean and the standard deviation of each image's posterior, not a draw from it, and the mirrored image as a
second copy: training draws afresh in every epoch, as if it encoded each image anew (arXiv 2112.10752, section 3.1).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..files import write_json, write_tensors
from ..models.autoencoder import Autoencoder, PixelSpace
from ..sampling.seeds import seeded

if TYPE_CHECKING:
    from .data import ImageData

INDEX = "index.json"
KIND = "slimdit latents 1"


@runtime_checkable
class VariationalAutoencoder(Protocol):
    """An autoencoder whose encoder gives a normal distribution; `scale` brings its draws to unit variance."""

    @property
    def factor(self) -> int:
        """Pixels per latent cell."""

    @property
    def image_channels(self) -> int | None:
        """Channels of the images it takes; None takes any."""

    @property
    def scale(self) -> float:
        """What latents are multiplied by for the model."""

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (batch, channels, height, width), unscaled, of images in -1..1."""

    def to_dict(self) -> dict:
        """How a saved model names it."""


def encode(data: ImageData, autoencoder: Autoencoder, folder: Path, *, source: str = "", flips: bool = True,
           batch: int = 32, shard: int = 1024, seed: int = 0, worker: int = 0, workers: int = 1,
           progress: Callable[[int, int], None] = lambda done, total: None) -> bool:
    """Encode all images into `folder`, for `EncodedLatents` to open.

    Several workers may fill one folder: worker w of n writes shards w, w + n, ... Shards that are already there are
    kept, so a killed run goes on where it was. Whoever finds all shards written adds the index.

    Args:
        data: images that are not mirrored at random; labels are kept with them.
        source: where the images came from, for people.
        flips: whether to encode every image mirrored too.
        batch: images encoded at once (twice as many with `flips`).
        shard: images per file.
        seed: of the generator that `data` is given.
        progress: called with (images done, images in all) of this worker after every batch or kept shard.

    Returns:
        Whether the folder is complete; False while other workers have shards to write.

    Raises:
        ValueError: there is nothing to encode, the images do not fit the autoencoder, the folder holds other latents,
            or a latent is not finite.
    """
    encoder = _require_fit(data, autoencoder, worker, workers)
    settings = json.loads(json.dumps({
        "kind": KIND, "count": len(data), "classes": data.classes, "image_shape": data.shape, "shard": shard,
        "flips": flips, "scale": float(encoder.scale), "source": source, "autoencoder": encoder.to_dict()}))
    _require_same(folder / INDEX, settings)
    spans = [range(start, min(start + shard, len(data))) for start in range(0, len(data), shard)]
    mine = range(worker, len(spans), workers)
    done, total = 0, sum(len(spans[i]) for i in mine)
    for i in mine:
        path = shard_path(folder, i)
        if not _is_written(path, settings):
            parts = []
            for start in range(spans[i].start, spans[i].stop, batch):
                indices = torch.arange(start, min(start + batch, spans[i].stop))
                parts.append(_posteriors(data, encoder, indices, flips, seeded(seed, "encode", start)))
                done += len(indices)
                progress(done, total)
            mean, std, labels = (torch.cat(tensors) for tensors in zip(*parts))
            write_tensors(path, {"mean": mean, "std": std, "labels": labels}, {"settings": json.dumps(settings)})
        else:
            done += len(spans[i])
            progress(done, total)
    complete = all(_is_written(shard_path(folder, i), settings) for i in range(len(spans)))
    if complete:
        write_json(folder / INDEX, {**settings, "shape": _latent_shape(shard_path(folder, 0))})
    return complete


def shard_path(folder: Path, index: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{index:05d}.safetensors"


class EncodedLatents:
    """A folder of encoded latents as data to learn from.

    Attributes:
        shape: channels, height and width of one latent.
        classes: how many labels there are.
        flips: whether mirrored copies were kept; then half of the latents of a batch are of mirrored images.

    Raises:
        FileNotFoundError: the folder is not a complete set of latents.
        ValueError: the index or a shard is not what `encode` writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        self.shape: tuple[int, int, int] = tuple(index["shape"])
        self.classes: int = index["classes"]
        self.flips: bool = index["flips"]
        self.scale: float = index["scale"]
        self.autoencoder: dict[str, Any] = index["autoencoder"]
        self._count: int = index["count"]
        self._shard: int = index["shard"]
        for i in range(-(-self._count // self._shard)):
            if not shard_path(folder, i).exists():
                raise FileNotFoundError(f"{shard_path(folder, i)} is missing: run slimdit encode again to write it")
        self._rows = lru_cache(maxsize=256)(self._open)  # a bound, so that many shards do not exhaust open files

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scaled draws from the posteriors of these images, (batch, *shape), and their labels (batch,)."""
        copies = (torch.rand(len(indices), generator=generator) < 0.5).long() * self.flips
        noise = torch.randn(len(indices), *self.shape, generator=generator)
        mean, std, labels = [], [], []
        for index, copy in zip(indices.tolist(), copies.tolist()):
            means, stds, kinds = self._rows(index // self._shard)
            row = index % self._shard
            mean.append(means[row:row + 1][0, copy])
            std.append(stds[row:row + 1][0, copy])
            labels.append(kinds[row])
        return (torch.stack(mean) + torch.stack(std) * noise) * self.scale, torch.stack(labels)

    def _open(self, shard: int) -> tuple[Any, Any, Tensor]:
        """Slices of a shard's mean and std, (images, copies, *shape), which read only the rows asked for; labels."""
        from safetensors import SafetensorError

        path = shard_path(self.folder, shard)
        file = _open_shard(path)
        images = min(self._shard, self._count - shard * self._shard)
        try:
            mean, std, labels = file.get_slice("mean"), file.get_slice("std"), file.get_tensor("labels")
        except SafetensorError as error:
            raise ValueError(f"{path} is no shard of latents ({error}): delete it and run slimdit encode "
                             "again") from error
        expected = [images, 1 + self.flips, *self.shape]
        if mean.get_shape() != expected or std.get_shape() != expected or labels.shape != (images,):
            raise ValueError(f"{path} does not hold the {images} latents its index says: delete it and run slimdit "
                             f"encode again")
        return mean, std, labels


def _require_fit(data: ImageData, autoencoder: Autoencoder, worker: int, workers: int) -> VariationalAutoencoder:
    if isinstance(autoencoder, PixelSpace) or not isinstance(autoencoder, VariationalAutoencoder):
        raise ValueError("encode: a model of pixels has nothing to encode: train on the images themselves, or name an "
                         "autoencoder")
    if getattr(data, "flip", False):
        raise ValueError("encode: the images are mirrored at random: open them without flip, encode keeps both sides")
    if not 0 <= worker < workers:
        raise ValueError(f"encode: worker {worker} of {workers}: workers are numbered from 0 to {workers - 1}")
    channels, height, width = data.shape
    if channels not in (1, autoencoder.image_channels or channels):
        raise ValueError(f"encode: images of {channels} channels do not fit an autoencoder of "
                         f"{autoencoder.image_channels}: convert the images")
    if height % autoencoder.factor or width % autoencoder.factor:
        raise ValueError(f"encode: images of {height}x{width} are not a multiple of the autoencoder's "
                         f"{autoencoder.factor} pixels: name a size that is")
    return autoencoder


def _require_same(index: Path, settings: dict[str, Any]) -> None:
    if index.exists():
        before = _read_index(index.parent)
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise ValueError(f"{index.parent} holds other latents ({', '.join(changed)} differ): name another folder")


def _posteriors(data: ImageData, autoencoder: VariationalAutoencoder, indices: Tensor, flips: bool,
                generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and std, each (images, copies, *latent shape), and labels (images,)."""
    images, labels = data.batch(indices, generator)
    if images.shape[1] == 1 and autoencoder.image_channels:
        images = images.expand(-1, autoencoder.image_channels, -1, -1)  # gray as the colour it is
    copies = torch.stack([images, images.flip(-1)] if flips else [images], dim=1)
    with torch.inference_mode():
        moments = autoencoder.moments(copies.flatten(0, 1))
    mean, std = (moment.float().cpu().unflatten(0, copies.shape[:2]) for moment in moments)
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(f"encode: the autoencoder gave numbers that are not finite for images {indices[0]} to "
                         f"{indices[-1]}: run it in float32, or check its weights")
    return mean, std, labels


def _is_written(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a shard is there and whole.

    Raises:
        ValueError: it was written with other settings.
    """
    try:
        written = json.loads((_open_shard(path).metadata() or {}).get("settings", "null"))
    except (FileNotFoundError, ValueError):
        return False
    if written != settings:
        changed = [name for name in settings if (written or {}).get(name) != settings[name]]
        raise ValueError(f"{path} holds other latents ({', '.join(changed)} differ): name another folder")
    return True


def _open_shard(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): run slimdit encode again") from error


def _latent_shape(path: Path) -> list[int]:
    return _open_shard(path).get_slice("mean").get_shape()[2:]


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        raise FileNotFoundError(f"{folder} has shards of latents but no {INDEX}: run slimdit encode again to finish it")
    wanted = {"shape": list, "classes": int, "flips": bool, "scale": float, "autoencoder": dict, "count": int,
              "shard": int}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        whole = index["kind"] == KIND and all(isinstance(index[name], kind) for name, kind in wanted.items())
        whole = whole and len(index["shape"]) == 3 and min(index["count"], index["shard"], index["classes"]) > 0
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not the index of latents that slimdit encode writes: encode the images again")
    return index
