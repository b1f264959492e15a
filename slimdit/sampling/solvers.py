"""Solvers: how a model's guesses of the noise, one timestep after another, turn noise into an image.

Every solver walks the same chain: signal shares (alpha_bar) at descending timesteps, then 1, the clean image. DDPM is
arXiv 2006.11239 respaced as in arXiv 2102.09672, DDIM arXiv 2010.02502, DPM-Solver++ arXiv 2211.01095, UniPC arXiv
2302.04867; guidance is classifier-free (arXiv 2207.12598) as DiT does it, in an interval as in arXiv 2404.07724.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .process import Denoise, NoiseProcess, PosteriorTables, learned_log_variance
from .seeds import ImageNoise
from .settings import Sampling


def timesteps(process: NoiseProcess, sampling: Sampling) -> list[int]:
    """The timesteps a sampling run visits, descending and distinct.

    Raises:
        ValueError: the process has fewer timesteps than are asked for.
    """
    if sampling.timesteps is not None:
        if sampling.timesteps[0] >= process.steps:
            raise ValueError(f"sampling: timestep {sampling.timesteps[0]} is beyond the process, whose last is "
                             f"{process.steps - 1}")
        return list(sampling.timesteps)
    if sampling.steps > process.steps:
        raise ValueError(f"sampling: {sampling.steps} steps are more than the {process.steps} timesteps of the process")
    return PLACES[sampling.spacing](process, sampling.steps)


def evaluations(process: NoiseProcess, sampling: Sampling) -> int:
    """Evaluations of the whole model that one image takes: two at a guided timestep, one at any other."""
    return _passes(process, sampling, whole=True)


def skipped(process: NoiseProcess, sampling: Sampling) -> int:
    """Evaluations that one image takes without the model's blocks, what they change being foretold."""
    return _passes(process, sampling, whole=False)


def full_steps(process: NoiseProcess, sampling: Sampling) -> list[bool]:
    """Whether each step evaluates the whole model: where a cache says so, and where guidance begins or ends."""
    guided = [is_guided(sampling, t) for t in timesteps(process, sampling)]
    if sampling.cache is None:
        return [True] * len(guided)
    return [step in sampling.cache.full or guided[step] != guided[step - 1] for step in range(len(guided))]


def _passes(process: NoiseProcess, sampling: Sampling, *, whole: bool) -> int:
    return sum(2 if is_guided(sampling, t) else 1
               for t, full in zip(timesteps(process, sampling), full_steps(process, sampling)) if full == whole)


def is_guided(sampling: Sampling, t: int) -> bool:
    """Whether guidance acts at a timestep."""
    low, high = sampling.guidance_interval
    return sampling.guidance != 1 and low <= t <= high


@torch.no_grad()
def solve(denoise: Denoise, process: NoiseProcess, sampling: Sampling, noise: ImageNoise, labels: Tensor, *,
          null_class: int, learn_sigma: bool, device: torch.device,
          progress: Callable[[int], None] | None = None) -> Tensor:
    """Turn noise into images.

    Args:
        denoise: (x, t, y) to the predicted noise, and as many variance channels where `learn_sigma`.
        noise: each image's own stream; its first draw is the start, a stochastic solver draws once a step after it.
        labels: (batch,), int64.
        null_class: the label that means "no class", for guidance.
        progress: called with the number of steps done after each.

    Returns:
        (batch, channels, height, width), float32 on `device`.
    """
    visited = timesteps(process, sampling)
    x = noise.draw().to(device)
    labels = labels.to(device)
    both = torch.cat([labels, torch.full_like(labels, null_class)])

    def predict(x: Tensor, step: int) -> Prediction:
        asked = both if is_guided(sampling, visited[step]) else labels
        prediction = _guided(denoise, sampling, x, visited[step], asked, learn_sigma)
        if progress:
            progress(step + 1)
        return prediction

    shares = [*process.alphas_cumprod[visited].tolist(), 1.0]
    return SOLVE[sampling.solver](predict, shares, x, lambda: noise.draw().to(device))


Prediction = tuple[Tensor, Tensor | None]
"""Predicted noise, and the variance output in -1..1 where the model learned one."""


def _guided(denoise: Denoise, sampling: Sampling, x: Tensor, timestep: int, labels: Tensor,
            learn_sigma: bool) -> Prediction:
    """The prediction at a timestep: eps_null + guidance (eps_label - eps_null) where guidance acts.

    There `labels` are twice as many as images, the second half the null class.
    """
    channels = x.shape[1]
    t = torch.full((len(labels),), timestep, dtype=torch.int64, device=x.device)
    if not is_guided(sampling, timestep):
        output = denoise(x, t, labels).float()
        return output[:, :channels], output[:, channels:] if learn_sigma else None
    output, unconditional = denoise(torch.cat([x, x]), t, labels).float().chunk(2)
    guided = min(channels, sampling.guidance_channels or channels)
    eps = torch.lerp(unconditional[:, :guided], output[:, :guided], float(sampling.guidance))
    if guided < channels:
        eps = torch.cat([eps, output[:, guided:channels]], dim=1)
    return eps, output[:, channels:] if learn_sigma else None


Predict = Callable[[Tensor, int], Prediction]
"""(x, step) to the prediction at the chain's step, 0 being the noisiest."""
Draw = Callable[[], Tensor]


def ddpm(predict: Predict, shares: Sequence[float], x: Tensor, draw: Draw) -> Tensor:
    """Ancestral sampling (DDPM algorithm 2) of the chain respaced to these shares.

    A learned variance lies between the posterior's and beta of that chain (Improved DDPM equation 15); without one it
    is the posterior's. The last step adds no noise.
    """
    tables = PosteriorTables.of(torch.tensor(shares[-2::-1], dtype=torch.float64))  # clean first
    for step, share in enumerate(shares[:-1]):
        place = len(shares) - 2 - step
        eps, variance = predict(x, step)
        mean = tables.clean_weight[place] * _clean(x, eps, share) + tables.noisy_weight[place] * x
        if place == 0:
            return mean
        log_variance = tables.log_variance[place]
        if variance is not None:
            log_variance = learned_log_variance(variance, log_variance, tables.log_beta[place])
        x = mean + (0.5 * log_variance).exp() * draw()
    return x


def ddim(predict: Predict, shares: Sequence[float], x: Tensor, draw: Draw) -> Tensor:
    """DDIM equation 12 with sigma 0: the clean image as predicted now, noised again with the same noise."""
    for step, (share, following) in enumerate(pairwise(shares)):
        eps, _ = predict(x, step)
        x = following**0.5 * _clean(x, eps, share) + (1 - following) ** 0.5 * eps
    return x


def dpmpp_2m(predict: Predict, shares: Sequence[float], x: Tensor, draw: Draw) -> Tensor:
    """DPM-Solver++ (2M), algorithm 2 of its paper: second order from the clean images of this step and the last.

    The first and the last step are of first order.
    """
    path, clean = _Path(shares), []
    for step, share in enumerate(shares[:-1]):
        eps, _ = predict(x, step)
        clean.append(_clean(x, eps, share))
        x = path.advance(x, clean, step)
    return x


def unipc(predict: Predict, shares: Sequence[float], x: Tensor, draw: Draw) -> Tensor:
    """UniPC of order 2, B(h) = e^h - 1, on clean images: UniP-2 is DPM-Solver++ 2M, and UniC corrects what it reached.

    A step's prediction also corrects the point it was made at, so the correction costs no evaluation.
    """
    path, clean = _Path(shares), []
    before = x
    for step, share in enumerate(shares[:-1]):
        eps, _ = predict(x, step)
        clean.append(_clean(x, eps, share))
        if step > 0:
            x = path.correct(before, clean, step)
        before, x = x, path.advance(x, clean, step)
    return x


def _clean(x: Tensor, eps: Tensor, share: float) -> Tensor:
    """The clean image that x and its noise mean (DDPM equation 4, turned round)."""
    return (x - (1 - share) ** 0.5 * eps) / share**0.5


class _Path:
    """A chain in the terms of exponential integrators: alpha, sigma and lambda = log(alpha / sigma) at each point."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.alpha = [share**0.5 for share in shares]
        self.sigma = [(1 - share) ** 0.5 for share in shares]
        self.lam = [math.log(a / s) if s > 0 else math.inf for a, s in zip(self.alpha, self.sigma, strict=True)]
        self.last = len(shares) - 2

    def advance(self, x: Tensor, clean: list[Tensor], step: int) -> Tensor:
        """From point `step` to the next, with the clean images predicted so far (UniP, DPM-Solver++ 2M)."""
        h = self.lam[step + 1] - self.lam[step]
        target = clean[step]
        if self._order(step) == 2:
            target = target + 0.5 * self._slope(clean, step, h)
        return self._move(x, target, step, h)

    def correct(self, x: Tensor, clean: list[Tensor], step: int) -> Tensor:
        """The step that led to point `step` again, now that the clean image there is predicted (UniC)."""
        h = self.lam[step] - self.lam[step - 1]
        start, change = clean[step - 1], clean[step] - clean[step - 1]
        if self._order(step - 1) == 1:
            return self._move(x, start + 0.5 * change, step - 1, h)
        # UniPC equations 9 and 10: sum_m rho_m r_m^(k-1) = k! phi_(k+1)(-h) / B, k = 1, 2; the new point has r = 1.
        r = (self.lam[step - 2] - self.lam[step - 1]) / h
        b = math.expm1(-h)
        first = (b / -h - 1) / b
        second = 2 * ((b / -h - 1) / -h - 0.5) / b
        rho_old = (first - second) / (1 - r)
        old = rho_old * self._slope(clean, step - 1, h)
        return self._move(x, start + old + (first - rho_old) * change, step - 1, h)

    def _order(self, step: int) -> int:
        return 1 if step in (0, self.last) else 2

    def _slope(self, clean: list[Tensor], step: int, h: float) -> Tensor:
        """Change of the clean image over one step of size h, at the rate of the step before."""
        return (clean[step] - clean[step - 1]) * (h / (self.lam[step] - self.lam[step - 1]))

    def _move(self, x: Tensor, target: Tensor, step: int, h: float) -> Tensor:
        """The exact solution for a clean image that stays `target` (DPM-Solver++ equation 8)."""
        following = step + 1
        return self.sigma[following] / self.sigma[step] * x - self.alpha[following] * math.expm1(-h) * target


SOLVE: Mapping[str, Callable[[Predict, Sequence[float], Tensor, Draw], Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}
"""How the solvers of `settings.SOLVERS` solve."""


def _leading(process: NoiseProcess, steps: int) -> list[int]:
    ratio = process.steps // steps
    return [step * ratio for step in reversed(range(steps))]


def _trailing(process: NoiseProcess, steps: int) -> list[int]:
    ratio = process.steps / steps
    return [round(process.steps - step * ratio) - 1 for step in range(steps)]


def _linspace(process: NoiseProcess, steps: int) -> list[int]:
    return [round(place) for place in torch.linspace(process.steps - 1, 0, steps, dtype=torch.float64).tolist()]


def _respaced(process: NoiseProcess, steps: int) -> list[int]:
    stride = (process.steps - 1) / (steps - 1)
    places, place = [], 0.0
    for _ in range(steps):  # summed up, not multiplied, so that halves round as in ADM's SpacedDiffusion
        places.append(round(place))
        place += stride
    return places[::-1]


def _uniform_lambda(process: NoiseProcess, steps: int) -> list[int]:
    shares = process.alphas_cumprod
    lam = 0.5 * (shares.log() - torch.log1p(-shares))  # descends with t
    wanted = torch.linspace(lam[-1].item(), lam[0].item(), steps + 1, dtype=torch.float64)[:-1]
    places = (wanted[:, None] - lam[None]).abs().argmin(1).tolist()
    # Timesteps are whole: where several want the same one, near the clean end, they spread upwards.
    for step in reversed(range(steps - 1)):
        places[step] = max(places[step], places[step + 1] + 1)
    return [min(place, process.steps - 1 - step) for step, place in enumerate(places)]


PLACES: Mapping[str, Callable[[NoiseProcess, int], list[int]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "respaced": _respaced,
    "uniform_lambda": _uniform_lambda,
}
"""How the spacings of `settings.SPACINGS` choose timesteps."""
