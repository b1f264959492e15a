"""What the noise process promises: variance preserved, losses finite, and a bound that is 0 where it should be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.sampling.process import (
    NoiseProcess,
    PosteriorTables,
    discretised_log_likelihood,
    learned_log_variance,
    training_loss,
    variational_bound,
)
from slimdit.sampling.seeds import seeded

PROCESS = NoiseProcess()


def images(batch, seed=0, shape=(2, 4, 4)):
    generator = seeded(seed, "images")
    clean = torch.rand(batch, *shape, generator=generator) * 2 - 1
    return clean, torch.randn(batch, *shape, generator=generator)


def test_shares_fall_from_clean_to_noise():
    shares = PROCESS.alphas_cumprod
    assert shares.dtype == torch.float64 and shares.shape == (1000,)
    assert (shares.diff() < 0).all()
    assert shares[0].item() == pytest.approx(0.9999)
    assert shares[-1].item() == pytest.approx(4.04e-5, rel=0.01)  # DDPM's linear schedule


def test_noise_preserves_variance():
    generator = seeded(0, "variance")
    clean, noise = torch.randn(2, 64, 3, 16, 16, generator=generator)
    for t in (0, 300, 999):
        assert PROCESS.add_noise(clean, noise, torch.full((64,), t)).std().item() == pytest.approx(1, abs=0.02)


def test_noise_is_taken_at_every_images_own_timestep():
    clean, noise = images(3)
    noisy = PROCESS.add_noise(clean, noise, torch.tensor([0, 500, 999]))
    share = PROCESS.alphas_cumprod[500].item()
    torch.testing.assert_close(noisy[1], share**0.5 * clean[1] + (1 - share) ** 0.5 * noise[1])
    assert (noisy[0] - clean[0]).abs().max() < 0.05
    assert (noisy[2] - noise[2]).abs().max() < 0.02


@given(st.lists(st.integers(0, 999), min_size=2, max_size=30, unique=True))
@settings(deadline=None)
def test_posterior_of_any_chain_leads_back_along_it(chosen):
    """Means and variances of q(x_{t-1} | x_t, x_0), averaged over x_t, are those of q(x_{t-1} | x_0)."""
    shares = PROCESS.alphas_cumprod[sorted(chosen)]
    tables = PosteriorTables.of(shares)
    before = torch.cat([torch.ones(1, dtype=torch.float64), shares[:-1]])
    torch.testing.assert_close(tables.clean_weight + tables.noisy_weight * shares.sqrt(), before.sqrt())
    spread = tables.noisy_weight[1:] ** 2 * (1 - shares[1:]) + tables.log_variance[1:].exp()
    torch.testing.assert_close(spread, 1 - before[1:])
    assert (tables.log_variance[1:] <= tables.log_beta[1:]).all()


def test_learned_variance_reaches_its_two_bounds():
    low, high = torch.tensor(-5.0), torch.tensor(-2.0)
    reached = learned_log_variance(torch.tensor([-1.0, 0.0, 1.0]), low, high)
    torch.testing.assert_close(reached, torch.tensor([-5.0, -3.5, -2.0]))


def test_bound_is_zero_at_the_true_posterior():
    t = torch.tensor([1, 2, 100, 999])
    clean, noise = images(len(t))
    noisy = PROCESS.add_noise(clean, noise, t)
    bound = variational_bound(PROCESS, noise, torch.full_like(clean, -1.0), clean, noisy, t)
    torch.testing.assert_close(bound, torch.zeros(len(t)), atol=1e-4, rtol=0)


@given(st.integers(1, 999), st.integers(0, 50), st.floats(-1, 1))
@settings(max_examples=50, deadline=None)
def test_bound_is_never_negative(t, seed, variance):
    clean, noise = images(1, seed)
    at = torch.tensor([t])
    noisy = PROCESS.add_noise(clean, noise, at)
    bound = variational_bound(PROCESS, noise * 0.7, torch.full_like(clean, variance), clean, noisy, at)
    assert bound.item() >= -1e-5


def test_likelihoods_of_all_levels_sum_to_one():
    levels = torch.arange(256) / 127.5 - 1
    for mean, log_scale in [(0.1, -3.0), (-1.0, -2.0), (0.99, -4.0), (0.0, 0.0)]:
        log_likelihood = discretised_log_likelihood(levels, torch.full((256,), mean), torch.full((256,), log_scale))
        assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_loss_is_finite_at_every_timestep(weighting, learn_sigma):
    t = torch.arange(1000)
    clean, noise = images(1000, shape=(1, 2, 2))
    prediction = torch.randn(1000, 2 if learn_sigma else 1, 2, 2, generator=seeded(0, "prediction"))
    loss = training_loss(PROCESS, prediction, clean, noise, t, weighting)
    assert loss.shape == (1000,) and loss.dtype == torch.float32
    assert torch.isfinite(loss).all()


def test_loss_is_the_squared_error_of_the_noise():
    clean, noise = images(3)
    t = torch.tensor([0, 10, 999])
    assert training_loss(PROCESS, noise, clean, noise, t).tolist() == [0, 0, 0]
    torch.testing.assert_close(training_loss(PROCESS, noise + 2, clean, noise, t), torch.full((3,), 4.0))


def test_min_snr_caps_the_weight_of_easy_timesteps():
    clean, noise = images(2)
    t = torch.tensor([10, 900])
    snr = (PROCESS.alphas_cumprod / (1 - PROCESS.alphas_cumprod))[t]
    assert snr[0] > 5 > snr[1]
    loss = training_loss(PROCESS, noise + 1, clean, noise, t, "min_snr")
    torch.testing.assert_close(loss, torch.tensor([5 / snr[0].item(), 1.0]))


def test_bound_trains_the_variance_only():
    clean, noise = images(2)
    t = torch.tensor([5, 500])
    prediction = torch.randn(2, 4, 4, 4, generator=seeded(1, "p")).requires_grad_()
    training_loss(PROCESS, prediction, clean, noise, t).sum().backward()
    squared_error_gradient = 2 * (prediction[:, :2] - noise) / noise[0].numel()
    torch.testing.assert_close(prediction.grad[:, :2], squared_error_gradient.detach())
    assert (prediction.grad[:, 2:].abs() > 0).any()


def test_bound_at_the_first_timestep_is_in_bits_per_dimension():
    """At t = 0 an exact prediction leaves the 8-bit image's likelihood under the posterior's clipped variance."""
    clean, noise = images(1)
    t = torch.tensor([0])
    variance = torch.full_like(clean, -1.0)
    bound = variational_bound(PROCESS, noise, variance, clean, PROCESS.add_noise(clean, noise, t), t).item()
    scale = PosteriorTables.of(PROCESS.alphas_cumprod).log_variance[0].mul(0.5).exp().item()
    inside = math.erf(1 / 255 / scale / 2**0.5)  # the mean is the pixel itself
    assert bound == pytest.approx(-math.log2(inside), rel=0.02)
