"""Randomness by name: every stream belongs to a seed and a purpose, never to the order in which things ran.

An image is the same whatever the batch it was sampled in, the worker that sampled it and the point a run resumed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor


def seeded(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that is this seed's and this purpose's alone."""
    digest = sha256(repr((int(seed), *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class ImageNoise:
    """Standard normal noise for a batch of images, each from its own stream of (seed, image id).

    The first draw starts the sampling; a stochastic solver draws once more per step.
    """

    def __init__(self, seed: int, ids: Sequence[int], shape: tuple[int, ...]) -> None:
        self.generators = [seeded(seed, "noise", int(image_id)) for image_id in ids]
        self.shape = shape

    def draw(self) -> Tensor:
        """The next noise of every image: (batch, *shape), float32 on the CPU."""
        noise = torch.empty(len(self.generators), *self.shape)
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return noise


def image_labels(seed: int, ids: Sequence[int], classes: int) -> Tensor:
    """The label of each image id, (batch,): every run of `classes` ids is a permutation of all classes."""
    orders: dict[int, Tensor] = {}
    labels = []
    for image_id in ids:
        run, place = divmod(int(image_id), classes)
        if run not in orders:
            orders[run] = torch.randperm(classes, generator=seeded(seed, "labels", run))
        labels.append(orders[run][place])
    return torch.stack(labels) if labels else torch.empty(0, dtype=torch.int64)
