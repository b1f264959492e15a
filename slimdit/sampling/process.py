"""The noising process: how an image turns into noise in 1000 steps, and what a model is trained to say about it.

DDPM (arXiv 2006.11239) with the learned variance of Improved DDPM (arXiv 2102.09672), as DiT uses them. Signals are in
-1..1; timestep 0 is nearly clean, `steps - 1` nearly pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A model as sampling knows it: (x, t, y) to the predicted noise, and variance channels where learned."""

LossWeighting = Literal["none", "min_snr"]


@dataclass(frozen=True)
class NoiseProcess:
    """A variance-preserving process with linear betas.

    Attributes:
        steps: number of training timesteps.
        beta_start, beta_end: the first and last of the linear betas.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    @cached_property
    def betas(self) -> Tensor:
        """(steps,), float64."""
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(steps,), float64: the share of the signal's variance left at each timestep."""
        return torch.cumprod(1 - self.betas, dim=0)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy signal at timesteps `t` (DDPM equation 4): all (batch, channels, height, width), t (batch,)."""
        kept = at(self.alphas_cumprod, t, clean)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a float64 table at timesteps t, in the type and broadcastable shape of a batch of images."""
    return table.to(like.device)[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def training_loss(process: NoiseProcess, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor,
                  weighting: LossWeighting = "none") -> Tensor:
    """DiT's loss per image: squared error of the noise, plus the variational bound that trains the variance.

    Args:
        prediction: (batch, channels or 2 channels, height, width), what the model said of the noisy signal.
        clean, noise: (batch, channels, height, width).
        t: (batch,), whole timesteps.
        weighting: of the squared error, see `loss_weight`.

    Returns:
        (batch,), float32.
    """
    channels = clean.shape[1]
    prediction = prediction.float()
    eps = prediction[:, :channels]
    loss = (eps - noise).square().flatten(1).mean(1)
    loss = loss * loss_weight(process, t, weighting)
    if prediction.shape[1] == 2 * channels:
        noisy = process.add_noise(clean, noise, t)
        # Improved DDPM, section 3.1: the bound trains the variance only, at 1/1000 of its weight.
        loss = loss + process.steps / 1000.0 * variational_bound(process, eps.detach(), prediction[:, channels:],
                                                                 clean, noisy, t)
    return loss


def loss_weight(process: NoiseProcess, t: Tensor, weighting: LossWeighting) -> Tensor:
    """What an error of the noise at these timesteps counts: (batch,) to float32 (batch,).

    `"none"` weighs all alike, as DiT; `"min_snr"` by min(SNR, 5) / SNR (arXiv 2303.09556), which spends a short budget
    on what can be seen.
    """
    if weighting == "none":
        return torch.ones(t.shape, device=t.device)
    kept = process.alphas_cumprod.to(t.device)[t].float()
    snr = kept / (1 - kept)
    return snr.clamp(max=5.0) / snr


def variational_bound(process: NoiseProcess, eps: Tensor, variance: Tensor, clean: Tensor, noisy: Tensor,
                      t: Tensor) -> Tensor:
    """One term of the variational bound in bits per dimension (Improved DDPM equations 4 to 7): (batch,).

    For t > 0 the divergence of the model's step from the true posterior; at t = 0 the likelihood of the 8-bit image.
    """
    tables = PosteriorTables.of(process.alphas_cumprod)
    true_mean = at(tables.clean_weight, t, clean) * clean + at(tables.noisy_weight, t, clean) * noisy
    true_log_variance = at(tables.log_variance, t, clean)
    kept = at(process.alphas_cumprod, t, clean)
    predicted_clean = (noisy - (1 - kept).sqrt() * eps) / kept.sqrt()
    mean = at(tables.clean_weight, t, clean) * predicted_clean + at(tables.noisy_weight, t, clean) * noisy
    log_variance = learned_log_variance(variance, at(tables.log_variance, t, clean), at(tables.log_beta, t, clean))
    divergence = 0.5 * (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp()
                        + (true_mean - mean).square() * (-log_variance).exp())
    likelihood = -discretised_log_likelihood(clean, mean, 0.5 * log_variance)
    is_first = (t == 0).view(-1, *[1] * (clean.ndim - 1))
    return torch.where(is_first, likelihood, divergence).flatten(1).mean(1) / math.log(2)


def learned_log_variance(variance: Tensor, log_posterior: Tensor, log_beta: Tensor) -> Tensor:
    """The model's variance output in -1..1, interpolated between its two bounds (Improved DDPM equation 15)."""
    share = (variance + 1) / 2
    return share * log_beta + (1 - share) * log_posterior


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of 8-bit values x in -1..1 under a Gaussian, bin by bin (DDPM equation 13)."""
    inverse = (-log_scale).exp()
    upper = _normal_cdf((x - mean + 1 / 255) * inverse)
    lower = _normal_cdf((x - mean - 1 / 255) * inverse)
    inside = (upper - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, upper.clamp(min=1e-12).log(),
                       torch.where(x > 0.999, (1 - lower).clamp(min=1e-12).log(), inside))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 2 ** -0.5))


@dataclass(frozen=True)
class PosteriorTables:
    """q(x_{t-1} | x_t, x_0) for a chain of signal shares (DDPM equation 7), float64 tables over its steps."""

    clean_weight: Tensor
    noisy_weight: Tensor
    log_variance: Tensor
    log_beta: Tensor

    @classmethod
    def of(cls, alphas_cumprod: Tensor) -> PosteriorTables:
        """Tables of the whole process, or of a respaced one given the shares at its timesteps, clean first."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        betas = 1 - alphas_cumprod / before
        variance = betas * (1 - before) / (1 - alphas_cumprod)
        # The first variance is 0; its logarithm is clipped to the second's, as DDPM does.
        clipped = torch.cat([variance[1:2], variance[1:]]) if len(variance) > 1 else betas
        return cls(clean_weight=betas * before.sqrt() / (1 - alphas_cumprod),
                   noisy_weight=(1 - before) * (1 - betas).sqrt() / (1 - alphas_cumprod),
                   log_variance=clipped.log(), log_beta=betas.log())
