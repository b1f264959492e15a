"""Between images and what the model sees: pixels as they are, or the latents of an autoencoder."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Autoencoder(Protocol):
    """Encodes images in -1..1 to latents and back; `factor` is how many pixels a latent cell is wide."""

    factor: int
    image_channels: int | None

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def to(self, device: str | torch.device) -> Autoencoder: ...

    def to_dict(self) -> dict: ...


class PixelSpace:
    """No autoencoder: the model sees pixels."""

    factor = 1
    image_channels: int | None = None

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images themselves."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents

    def to(self, device: str | torch.device) -> PixelSpace:
        """Itself: there is nothing to move."""
        return self

    def to_dict(self) -> dict:
        """How a saved model names it."""
        return {"kind": "pixels"}
