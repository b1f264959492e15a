"""A folder of sampled images that is written shard by shard and goes on where it stopped.

Each shard is one range of image ids as ADM's `.npz` (`arr_0` images, `arr_1` labels); the manifest says what made them
and the hash of each, so a truncated or foreign shard is never read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from .files import write_json, writing
from .pipeline import Pipeline
from .sampling.seeds import image_labels


@dataclass(frozen=True)
class SampleSet:
    """Images 0 to count - 1 of a pipeline and a seed.

    Attributes:
        label: the class of all images; the ids' own where None.
        origin: what made the images (model, sampling, runtime ...), compared before a folder is gone on with.
    """

    folder: Path
    count: int
    seed: int
    batch: int
    origin: Mapping[str, Any]
    label: int | None = None

    def make(self, pipeline: Pipeline, progress: Callable[[int], None] | None = None) -> None:
        """Sample the shards that are not there yet; `progress` gets the number of images that are.

        Raises:
            ValueError: the folder holds the images of something else.
        """
        hashes = self._begin()
        for start in range(0, self.count, self.batch):
            ids = range(start, min(start + self.batch, self.count))
            path = self._shard(start)
            if path.name not in hashes or not path.exists() or file_hash(path) != hashes[path.name]:
                labels = (image_labels(self.seed, ids, pipeline.model.config.classes).numpy() if self.label is None
                          else np.full(len(ids), self.label))
                images = pipeline.sample(ids, seed=self.seed, batch=self.batch, labels=labels.tolist())
                with writing(path) as beside, beside.open("wb") as file:
                    np.savez(file, arr_0=images, arr_1=labels)
                hashes[path.name] = file_hash(path)
                write_json(self._manifest, {**self._identity(), "shards": hashes})
            if progress:
                progress(ids.stop)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All images, uint8 (count, height, width, channels), and their labels.

        Raises:
            ValueError: a shard is missing or was changed.
        """
        hashes = json.loads(self._manifest.read_text())["shards"]
        images, labels = [], []
        for start in range(0, self.count, self.batch):
            path = self._shard(start)
            if path.name not in hashes or not path.exists() or file_hash(path) != hashes[path.name]:
                raise ValueError(f"{path} is missing or damaged: run again with --resume to make it anew")
            with np.load(path, allow_pickle=False) as shard:
                images.append(shard["arr_0"])
                labels.append(shard["arr_1"])
        return np.concatenate(images), np.concatenate(labels)

    def _begin(self) -> dict[str, str]:
        if not self._manifest.exists():
            return {}
        manifest = json.loads(self._manifest.read_text())
        hashes = manifest.pop("shards")
        if manifest != json.loads(json.dumps(self._identity())):
            raise ValueError(f"{self.folder} holds the images of another model, seed or setting: name another folder")
        return hashes

    def _identity(self) -> dict[str, Any]:
        # `count` may grow: more images of the same origin go on where these end.
        return {"seed": self.seed, "batch": self.batch, "label": self.label, "origin": dict(self.origin)}

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"

    def _shard(self, start: int) -> Path:
        return self.folder / f"{start:08d}-{min(start + self.batch, self.count):08d}.npz"


def fingerprint(images: np.ndarray) -> str:
    """The hash of a set of images, whatever it was sharded into."""
    return sha256(repr(images.shape).encode() + np.ascontiguousarray(images).tobytes()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    hashed = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()
