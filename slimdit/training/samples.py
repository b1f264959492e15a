"""Images that a model makes itself, to learn from where there are no others: in the space that the model works in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_tensors, write_tensors
from ..pipeline import Pipeline, Runtime
from ..sampling.seeds import ImageNoise, image_labels
from ..sampling.solvers import solve
from .calibration import FIRST_ID


class Samples:
    """Images or latents in memory, (images, channels, height, width), with their labels: an `ImageData`."""

    def __init__(self, clean: Tensor, labels: Tensor, classes: int) -> None:
        self.clean, self.labels, self.classes = clean, labels, classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.clean.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.clean)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The images and labels of these indices; nothing about them is random."""
        return self.clean[indices], self.labels[indices]

    def save(self, path: Path) -> None:
        """Write them as a file of tensors."""
        write_tensors(path, {"clean": self.clean, "labels": self.labels}, {"classes": str(self.classes)})

    @classmethod
    def load(cls, path: Path) -> Samples:
        """What `save` wrote."""
        tensors, metadata = read_tensors(path)
        return cls(tensors["clean"], tensors["labels"], int(metadata["classes"]))


@torch.no_grad()
def own_samples(pipeline: Pipeline, images: int, *, first: int = FIRST_ID, batch: int = 32, seed: int = 0,
                progress: Callable[[int], None] = lambda done: None) -> Samples:
    """Images of the pipeline's own sampling, as it is deployed but in float32 and not decoded.

    Args:
        first: the first image id; from `FIRST_ID` on nobody evaluates them.
        progress: called with the number of images done after every batch.

    Raises:
        ValueError: images is below 1.
    """
    if images < 1:
        raise ValueError(f"samples: at least 1 image is needed, not {images}")
    plain = pipeline.replace(runtime=Runtime())
    config = plain.model.config
    ids = range(first, first + images)
    labels = image_labels(seed, ids, config.classes)
    parts = []
    for start in range(0, images, batch):
        chosen = ids[start:start + batch]
        noise = ImageNoise(seed, chosen, (config.channels, *config.input_size))
        evaluator = plain.evaluator()
        parts.append(solve(evaluator, plain.process, plain.sampling, noise, labels[start:start + batch],
                           null_class=config.classes, learn_sigma=config.learn_sigma, device=plain.device,
                           progress=evaluator.seek).cpu())
        progress(min(start + batch, images))
    return Samples(torch.cat(parts), labels, config.classes)
