"""A folder of sampled images that any number of processes write shard by shard, and go on with where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from .pipeline import Pipeline
from .sampling.seeds import image_labels
from .shards import Shards


@dataclass(frozen=True)
class SampleSet:
    """Images 0 to count - 1 of a pipeline and a seed, in shards of one batch each.

    Noise and label belong to the image id. With one batch size the images are the same to the bit whatever interrupted
    their making and however many workers shared it; another rounds otherwise, as sums of another shape do.

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

    def make(self, pipeline: Pipeline, progress: Callable[[int], None] | None = None, *, worker: int = 0,
             workers: int = 1, before: Callable[[], None] = lambda: None) -> None:
        """Sample this worker's part of the images that are not there yet; see `Shards.fill`.

        Args:
            before: called once before the first of them, and not at all where none is missing.

        Raises:
            ValueError: the folder holds the images of something else.
        """
        self.shards.begin()
        ready = cache(before)

        def sample(ids: range) -> dict[str, np.ndarray]:
            ready()
            labels = (image_labels(self.seed, ids, pipeline.model.config.classes).numpy() if self.label is None
                      else np.full(len(ids), self.label))
            images = pipeline.sample(ids, seed=self.seed, batch=self.batch, labels=labels.tolist())
            return {"arr_0": images, "arr_1": labels}

        self.shards.fill(self.count, self.batch, sample, worker=worker, workers=workers, progress=progress)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All images, uint8 (count, height, width, channels), and their labels.

        Raises:
            ValueError: some are missing or damaged.
        """
        arrays = self.shards.read(range(self.count))
        return arrays["arr_0"], arrays["arr_1"]

    def images(self, ids: range) -> np.ndarray:
        """The images of these ids, as `read` gives them."""
        return self.shards.read(ids)["arr_0"]

    @property
    def shards(self) -> Shards:
        """Where they are kept."""
        return Shards(self.folder, {"seed": self.seed, "label": self.label, "origin": dict(self.origin)})


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
