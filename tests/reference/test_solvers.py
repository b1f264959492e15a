"""Our solvers against diffusers' schedulers, on the same timesteps, noise and denoiser."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from slimdit.sampling.process import NoiseProcess
from slimdit.sampling.seeds import ImageNoise
from slimdit.sampling.solvers import Sampling, solve, timesteps

PROCESS = NoiseProcess()
SHAPE = (2, 4, 4)
IDS = [0, 1, 2]
CPU = torch.device("cpu")
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def denoise(x, t, y):
    """Nearly the exact denoiser of pixels from N(0.3, 0.5^2), bent a little, with some variance output."""
    share = PROCESS.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    sigma = (1 - share).sqrt()
    eps = sigma * (x - share.sqrt() * 0.3) / (share * 0.25 + sigma**2) + 0.1 * sigma * torch.sin(2 * x)
    return torch.cat([eps, torch.sin(3 * x)], dim=1)


def ours(sampling, learn_sigma=False):
    def call(x, t, y):
        return denoise(x, t, y) if learn_sigma else denoise(x, t, y)[:, : SHAPE[0]]

    return solve(call, PROCESS, sampling, ImageNoise(0, IDS, SHAPE), torch.zeros(3, dtype=torch.int64),
                 null_class=1, learn_sigma=learn_sigma, device=CPU)


def theirs(scheduler, visited, noise, learn_sigma=False):
    x = noise.draw()
    scheduler.alphas_cumprod = PROCESS.alphas_cumprod.clone()  # theirs is float32, which is off by 1e-4 near t = 0
    if isinstance(scheduler, DPMSolverMultistepScheduler | DDPMScheduler | UniPCMultistepScheduler):
        set_timesteps(scheduler, visited)
    else:
        scheduler.set_timesteps(len(visited))
    assert scheduler.timesteps.tolist() == visited
    for t in visited:
        output = denoise(x, torch.full((len(IDS),), t), None)
        output = output if learn_sigma else output[:, : SHAPE[0]]
        x = scheduler.step(output, torch.tensor(t), x, return_dict=False)[0].float()
    return x


def set_timesteps(scheduler, visited):
    """Make a diffusers scheduler visit given timesteps (UniPC takes no list: its tables are set as it sets them)."""
    if not isinstance(scheduler, UniPCMultistepScheduler):
        return scheduler.set_timesteps(timesteps=list(visited))
    scheduler.set_timesteps(len(visited))
    shares = PROCESS.alphas_cumprod[list(visited)]
    scheduler.sigmas = torch.cat([((1 - shares) / shares).sqrt(), torch.zeros(1, dtype=torch.float64)]).float()
    scheduler.timesteps = torch.tensor(visited)


@pytest.mark.parametrize("spacing, steps", [("trailing", 10), ("trailing", 50), ("leading", 20)])
def test_ddim(spacing, steps):
    sampling = Sampling("ddim", steps, spacing)
    # Steps that divide 1000 only: for others DDIMScheduler takes t - 1000 // steps for the next timestep, though the
    # next model call is at another. Same for linspace. Our chain always ends a step where the next one begins.
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=spacing, clip_sample=False)
    expected = theirs(scheduler, timesteps(PROCESS, sampling), ImageNoise(0, IDS, SHAPE))
    torch.testing.assert_close(ours(sampling), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spacing, steps", [("trailing", 2), ("trailing", 10), ("respaced", 23), ("uniform_lambda", 7)])
@pytest.mark.parametrize("solver, scheduler", [("dpmpp_2m", DPMSolverMultistepScheduler),
                                               ("unipc", UniPCMultistepScheduler)])
def test_multistep(solver, scheduler, spacing, steps):
    sampling = Sampling(solver, steps, spacing)
    expected = theirs(scheduler(**BETAS, solver_order=2, final_sigmas_type="zero"), timesteps(PROCESS, sampling),
                      ImageNoise(0, IDS, SHAPE))
    torch.testing.assert_close(ours(sampling), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("learn_sigma, variance_type", [(True, "learned_range"), (False, "fixed_small")])
@pytest.mark.parametrize("steps", [10, 250])
def test_ddpm(monkeypatch, learn_sigma, variance_type, steps):
    sampling = Sampling("ddpm", steps, "respaced")
    noise = ImageNoise(0, IDS, SHAPE)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise.draw())
    scheduler = DDPMScheduler(**BETAS, variance_type=variance_type, clip_sample=False)
    expected = theirs(scheduler, timesteps(PROCESS, sampling), noise, learn_sigma)
    torch.testing.assert_close(ours(sampling, learn_sigma), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_are_diffusers(spacing):
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=spacing)
    for steps in [2, 3, 7, 10, 25, 50, 249, 250, 251, 333, 600, 999, 1000]:
        scheduler.set_timesteps(steps)
        # numpy's arange may add a step by a rounding error; only the asked-for number counts.
        assert timesteps(PROCESS, Sampling(steps=steps, spacing=spacing)) == scheduler.timesteps.tolist()[:steps]
