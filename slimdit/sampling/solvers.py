"""Solvers: how a model's guesses of the noise, one timestep after another, turn noise into an image.

Every solver walks the same chain: signal shares (alpha_bar) at descending timesteps, then 1, the clean image. DDPM is
arXiv 2006.11239 respaced as in arXiv 2102.09672, DDIM arXiv 2010.02502, DPM-Solver++ arXiv 2211.01095, UniPC arXiv
2302.04867; guidance is classifier-free (arXiv 2207.12598) as DiT does it, in an interval as in arXiv 2404.07724.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    return walk(partial(one_step, denoise, sampling, learn_sigma), process, sampling, noise, labels,
                null_class=null_class, device=device, progress=progress)


Kept = tuple[Tensor, ...]
"""What a solver keeps from step to step, each of the shape of the images; zeros at first."""
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Kept, Tensor | None], tuple[Tensor, Kept]]
"""x (batch, ...), t and y (one or two an image), coefficients, kept, drawn noise: to the next x, and what to keep."""


@torch.no_grad()
def walk(step: Step, process: NoiseProcess, sampling: Sampling, noise: ImageNoise, labels: Tensor, *, null_class: int,
         device: torch.device, progress: Callable[[int], None] | None = None) -> Tensor:
    """`solve` by a function that takes a whole step: the model, guidance and the solver's arithmetic.

    At a guided timestep it is given labels twice, the second time as the null class.
    """
    visited, draws = timesteps(process, sampling), SOLVE[sampling.solver].draws
    x = noise.draw().to(device)
    labels = labels.to(device)
    both = torch.cat([labels, torch.full_like(labels, null_class)])
    numbers = torch.tensor(coefficients(process, sampling)).to(device)
    kept, drawn = blank(sampling, x)
    for number, timestep in enumerate(visited):
        y = both if is_guided(sampling, timestep) else labels
        t = torch.full((len(y),), timestep, dtype=torch.int64, device=device)
        if draws and number < len(visited) - 1:
            drawn = noise.draw().to(device)
        x, kept = step(x, t, y, numbers[number], kept, drawn)
        if progress:
            progress(number + 1)
    return x


def coefficients(process: NoiseProcess, sampling: Sampling) -> list[list[float]]:
    """The solver's numbers for every step of a run, those that were fitted where there are any."""
    shares = process.alphas_cumprod[timesteps(process, sampling)].tolist()
    if sampling.coefficients is not None:
        return [[*_to_clean(share), *row] for share, row in zip(shares, sampling.coefficients, strict=True)]
    return SOLVE[sampling.solver].coefficients([*shares, 1.0])


def blank(sampling: Sampling, x: Tensor) -> tuple[Kept, Tensor | None]:
    """What a step is given where nothing is kept yet, and nothing drawn."""
    solver = SOLVE[sampling.solver]
    return (torch.zeros_like(x),) * solver.kept, torch.zeros_like(x) if solver.draws else None


def one_step(denoise: Denoise, sampling: Sampling, learn_sigma: bool, x: Tensor, t: Tensor, y: Tensor,
             coefficients: Tensor, kept: Kept, drawn: Tensor | None) -> tuple[Tensor, Kept]:
    """A step of `walk`, by operations on tensors alone: it can be compiled as one function."""
    eps, variance = guided(denoise, sampling, x, t, y, learn_sigma)
    return SOLVE[sampling.solver].step(x, eps, variance, coefficients.unbind(), kept, drawn)


def guided(denoise: Denoise, sampling: Sampling, x: Tensor, t: Tensor, y: Tensor,
           learn_sigma: bool) -> tuple[Tensor, Tensor | None]:
    """The predicted noise at timesteps, and the variance output in -1..1 where the model learned one.

    Where there are two labels an image, it is eps_null + guidance (eps_label - eps_null).
    """
    channels = x.shape[1]
    if len(y) == len(x):
        output = denoise(x, t, y).float()
        return output[:, :channels], output[:, channels:] if learn_sigma else None
    output, unconditional = denoise(torch.cat([x, x]), t, y).float().chunk(2)
    steered = min(channels, sampling.guidance_channels or channels)
    eps = torch.lerp(unconditional[:, :steered], output[:, :steered], float(sampling.guidance))
    if steered < channels:
        eps = torch.cat([eps, output[:, steered:channels]], dim=1)
    return eps, output[:, channels:] if learn_sigma else None


Numbers = Sequence[Tensor]
"""A step's coefficients, each a tensor of no dimension."""


@dataclass(frozen=True)
class Solver:
    """A solver as a table of numbers for a chain of shares, and the arithmetic of one step with a row of it.

    Attributes:
        coefficients: of every step from one share to the next.
        step: (x, eps, variance, coefficients, kept, drawn) to the next x, and what to keep.
        kept: how many tensors it keeps from step to step.
        draws: whether it draws noise, at every step but the last.
    """

    coefficients: Callable[[Sequence[float]], list[list[float]]]
    step: Callable[[Tensor, Tensor, Tensor | None, Numbers, Kept, Tensor | None], tuple[Tensor, Kept]]
    kept: int = 0
    draws: bool = False


def _to_clean(share: float) -> list[float]:
    """What `_clean` needs of a share."""
    return [(1 - share) ** 0.5, share**0.5]


def _clean(x: Tensor, eps: Tensor, of_noise: Tensor, of_signal: Tensor) -> Tensor:
    """The clean image that x and its noise mean (DDPM equation 4, turned round)."""
    return (x - of_noise * eps) / of_signal


def _ddpm_table(shares: Sequence[float]) -> list[list[float]]:
    tables = PosteriorTables.of(torch.tensor(shares[-2::-1], dtype=torch.float64))  # clean first
    last = len(shares) - 2
    rows = torch.stack([tables.clean_weight, tables.noisy_weight, tables.log_variance, tables.log_beta], 1).tolist()
    return [[*_to_clean(share), *rows[last - step], float(step < last)] for step, share in enumerate(shares[:-1])]


def ddpm(x: Tensor, eps: Tensor, variance: Tensor | None, numbers: Numbers, kept: Kept,
         drawn: Tensor | None) -> tuple[Tensor, Kept]:
    """Ancestral sampling (DDPM algorithm 2) of the chain respaced to the shares.

    A learned variance lies between the posterior's and beta of that chain (Improved DDPM equation 15); without one it
    is the posterior's. The last step adds no noise.
    """
    of_noise, of_signal, clean_weight, noisy_weight, log_variance, log_beta, noisy = numbers
    mean = clean_weight * _clean(x, eps, of_noise, of_signal) + noisy_weight * x
    if variance is not None:
        log_variance = learned_log_variance(variance, log_variance, log_beta)
    assert drawn is not None
    return mean + noisy * ((0.5 * log_variance).exp() * drawn), ()


def _ddim_table(shares: Sequence[float]) -> list[list[float]]:
    return [[*_to_clean(share), following**0.5, (1 - following) ** 0.5] for share, following in pairwise(shares)]


def ddim(x: Tensor, eps: Tensor, variance: Tensor | None, numbers: Numbers, kept: Kept,
         drawn: Tensor | None) -> tuple[Tensor, Kept]:
    """DDIM equation 12 with sigma 0: the clean image as predicted now, noised again with the same noise."""
    of_noise, of_signal, next_signal, next_noise = numbers
    return next_signal * _clean(x, eps, of_noise, of_signal) + next_noise * eps, ()


def _dpmpp_2m_table(shares: Sequence[float]) -> list[list[float]]:
    path = _Path(shares)
    return [[*_to_clean(share), *path.advance(step)] for step, share in enumerate(shares[:-1])]


def dpmpp_2m(x: Tensor, eps: Tensor, variance: Tensor | None, numbers: Numbers, kept: Kept,
             drawn: Tensor | None) -> tuple[Tensor, Kept]:
    """DPM-Solver++ (2M), algorithm 2 of its paper: second order from the clean images of this step and the last.

    The first and the last step are of first order.
    """
    of_noise, of_signal, slope, of_x, of_target = numbers
    before, = kept
    clean = _clean(x, eps, of_noise, of_signal)
    return of_x * x + of_target * (clean + slope * (clean - before)), (clean,)


def _unipc_table(shares: Sequence[float]) -> list[list[float]]:
    path = _Path(shares)
    return [[*_to_clean(share), *path.correct(step), *path.advance(step)] for step, share in enumerate(shares[:-1])]


def unipc(x: Tensor, eps: Tensor, variance: Tensor | None, numbers: Numbers, kept: Kept,
          drawn: Tensor | None) -> tuple[Tensor, Kept]:
    """UniPC of order 2, B(h) = e^h - 1, on clean images: UniP-2 is DPM-Solver++ 2M, and UniC corrects what it reached.

    A step's prediction also corrects the point it was made at, so the correction costs no evaluation.
    """
    of_noise, of_signal, as_it_is, of_start, of_goal, old_slope, new_slope, slope, of_x, of_target = numbers
    start, before, earlier = kept
    clean = _clean(x, eps, of_noise, of_signal)
    goal = before + old_slope * (before - earlier) + new_slope * (clean - before)
    x = as_it_is * x + of_start * start + of_goal * goal
    return of_x * x + of_target * (clean + slope * (clean - before)), (x, clean, before)


def _multistep_table(shares: Sequence[float]) -> list[list[float]]:
    path, rows = _Path(shares), []
    for step, share in enumerate(shares[:-1]):
        slope, of_x, of_target = path.advance(step)
        rows.append([*_to_clean(share), of_x, of_target * (1 + slope), -of_target * slope, 0.0])
    return rows


def multistep(x: Tensor, eps: Tensor, variance: Tensor | None, numbers: Numbers, kept: Kept,
              drawn: Tensor | None) -> tuple[Tensor, Kept]:
    """A linear multistep solver of three clean images, by any numbers: DPM-Solver++ 2M (its algorithm 2) is one.

    Numbers fitted to a model ("S4S", arXiv 2502.17423; `training/fitting.py`) take it where the long run goes.
    """
    of_noise, of_signal, of_x, of_clean, of_before, of_earlier = numbers
    before, earlier = kept
    clean = _clean(x, eps, of_noise, of_signal)
    return of_x * x + of_clean * clean + of_before * before + of_earlier * earlier, (clean, before)


class _Path:
    """A chain in the terms of exponential integrators: alpha, sigma and lambda = log(alpha / sigma) at each point."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.alpha = [share**0.5 for share in shares]
        self.sigma = [(1 - share) ** 0.5 for share in shares]
        self.lam = [math.log(a / s) if s > 0 else math.inf for a, s in zip(self.alpha, self.sigma, strict=True)]
        self.last = len(shares) - 2

    def advance(self, step: int) -> list[float]:
        """From point `step` to the next (UniP, DPM-Solver++ 2M): of the clean image's last change, x and target."""
        h = self.lam[step + 1] - self.lam[step]
        slope = 0.5 * self._slope(step, h) if self._order(step) == 2 else 0.0
        return [slope, *self._move(step, h)]

    def correct(self, step: int) -> list[float]:
        """The step that led to point `step` again, now that the clean image there is predicted (UniC).

        Returns:
            Of the point as it is, 1 at the first, to which no step led, and else 0; of the point before, of the target
            from there; and in that target of the change before it, and of the new one.
        """
        if step == 0:
            return [1.0, 0.0, 0.0, 0.0, 0.0]
        h = self.lam[step] - self.lam[step - 1]
        move = self._move(step - 1, h)
        if self._order(step - 1) == 1:
            return [0.0, *move, 0.0, 0.5]
        # UniPC equations 9 and 10: sum_m rho_m r_m^(k-1) = k! phi_(k+1)(-h) / B, k = 1, 2; the new point has r = 1.
        r = (self.lam[step - 2] - self.lam[step - 1]) / h
        b = math.expm1(-h)
        first = (b / -h - 1) / b
        second = 2 * ((b / -h - 1) / -h - 0.5) / b
        rho_old = (first - second) / (1 - r)
        return [0.0, *move, rho_old * self._slope(step - 1, h), first - rho_old]

    def _order(self, step: int) -> int:
        return 1 if step in (0, self.last) else 2

    def _slope(self, step: int, h: float) -> float:
        """Of the last change of the clean image: its change over a step of size h, at the rate of the step before."""
        return h / (self.lam[step] - self.lam[step - 1])

    def _move(self, step: int, h: float) -> list[float]:
        """The exact solution for a clean image that stays the target (DPM-Solver++ equation 8): of x, of the target."""
        return [self.sigma[step + 1] / self.sigma[step], -self.alpha[step + 1] * math.expm1(-h)]


SOLVE: Mapping[str, Solver] = {
    "ddpm": Solver(_ddpm_table, ddpm, draws=True),
    "ddim": Solver(_ddim_table, ddim),
    "dpmpp_2m": Solver(_dpmpp_2m_table, dpmpp_2m, kept=1),
    "unipc": Solver(_unipc_table, unipc, kept=3),
    "multistep": Solver(_multistep_table, multistep, kept=2),
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
