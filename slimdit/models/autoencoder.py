"""Between images and what the model sees: pixels as they are, or the latents of an autoencoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Autoencoder(Protocol):
    """Encodes images in -1..1 to latents and back; `factor` is how many pixels a latent cell is wide."""

    @property
    def factor(self) -> int: ...  # noqa: D102

    @property
    def image_channels(self) -> int | None: ...  # noqa: D102

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor: ...  # noqa: D102

    def decode(self, latents: Tensor) -> Tensor: ...  # noqa: D102

    def to(self, device: str | torch.device) -> Autoencoder: ...  # noqa: D102

    def to_dict(self) -> dict[str, Any]: ...  # noqa: D102


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

    def to_dict(self) -> dict[str, Any]:
        """How a saved model names it."""
        return {"kind": "pixels"}


class KLAutoencoder:
    """The autoencoder of latent diffusion (arXiv 2112.10752), as diffusers' AutoencoderKL; loaded when first used.

    Args:
        source: a local folder, or the Hub id of one, which downloads at the first use.
        scale: what latents are multiplied by for the model; None reads it from the autoencoder's config.
        factor: pixels per latent cell; None reads it from there too.
    """

    image_channels: int | None = 3

    def __init__(self, source: str, scale: float | None = None, factor: int | None = None) -> None:
        self.source = source
        self.device = torch.device("cpu")
        self._scale, self._factor = scale, factor

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images in -1..1, (batch, 3, h, w), to scaled latents (batch, channels, h / factor, w / factor).

        With a CPU generator the posterior is sampled, as training wants it; without one its mean is returned.
        """
        mean, std = self.moments(images)
        if generator is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        return mean * self.scale

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of images in -1..1: both as the latents, unscaled."""
        posterior = self.vae.encode(images.to(self.device)).latent_dist
        return posterior.mean, posterior.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to images in about -1..1, (batch, 3, h, w)."""
        return self.vae.decode(latents.to(self.device) / self.scale).sample

    def to(self, device: str | torch.device) -> KLAutoencoder:
        """Itself, on a device."""
        self.device = torch.device(device)
        if "vae" in self.__dict__:
            self.vae.to(self.device)
        return self

    def to_dict(self) -> dict[str, Any]:
        """How a saved model names it."""
        return {"kind": "kl", "source": self.source, "scale": self._scale, "factor": self._factor}

    @property
    def scale(self) -> float:
        """What latents are multiplied by for the model."""
        return self._scale if self._scale is not None else float(self.settings["scaling_factor"])

    @property
    def factor(self) -> int:
        """Pixels per latent cell: every down block but the last halves the image."""
        return self._factor if self._factor is not None else 2 ** (len(self.settings["down_block_types"]) - 1)

    @cached_property
    def vae(self) -> Any:
        """Diffusers' model, in evaluation mode.

        Raises:
            ValueError: the folder or the Hub id does not give an AutoencoderKL.
        """
        from diffusers import AutoencoderKL

        try:
            return AutoencoderKL.from_pretrained(self.source, use_safetensors=self._has_safetensors()).eval().to(
                self.device)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(self._unreadable(error)) from error

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The autoencoder's own config, without its weights where it is a folder."""
        if "vae" not in self.__dict__ and Path(self.source).is_dir():
            try:
                settings = json.loads((Path(self.source) / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(self._unreadable(error)) from error
            return {"scaling_factor": 0.18215, **settings}  # diffusers' default, which old configs leave out
        return dict(self.vae.config)

    def _has_safetensors(self) -> bool | None:
        # None lets diffusers take whichever a Hub repository has; its .bin files load with weights_only.
        return True if any(Path(self.source).glob("*.safetensors")) else None

    def _unreadable(self, error: Exception) -> str:
        reason = (str(error).splitlines() or [""])[0]
        return (f"autoencoder {self.source!r} could not be loaded ({reason}): give a local folder of a diffusers "
                f"AutoencoderKL, or go online once so that its Hub id can be fetched")


def autoencoder_from_dict(values: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder that `to_dict` described.

    Raises:
        ValueError: the kind or an option is unknown, or a value is of the wrong type.
    """
    options = dict(values)
    kind = options.pop("kind", None)
    if kind == "pixels" and not options:
        return PixelSpace()
    if kind != "kl":
        raise ValueError(f"autoencoder: kind {kind!r} with {sorted(options)} is unknown; use pixels, or kl")
    unknown = sorted(set(options) - {"source", "scale", "factor"})
    if unknown:
        raise ValueError(f"autoencoder: {unknown[0]!r} is not an option; use source, scale, factor")
    source, scale, factor = options.get("source"), options.get("scale"), options.get("factor")
    if not isinstance(source, str) or not source:
        raise ValueError(f"autoencoder: source must be a folder or a Hub id, not {source!r}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0):
        raise ValueError(f"autoencoder: scale must be a number above 0, not {scale!r}")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int) or factor < 1):
        raise ValueError(f"autoencoder: factor must be a whole number above 0, not {factor!r}")
    return KLAutoencoder(source, None if scale is None else float(scale), factor)
