"""What sampling promises: strict settings, descending timesteps, guidance where asked, solvers that converge."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.sampling.process import NoiseProcess
from slimdit.sampling.seeds import ImageNoise
from slimdit.sampling.settings import SOLVERS, SPACINGS
from slimdit.sampling.solvers import PLACES, SOLVE, Sampling, evaluations, solve, timesteps

PROCESS = NoiseProcess()
CPU = torch.device("cpu")
MEAN, SPREAD = 0.3, 0.4


def gaussian_denoiser(x, t, y):
    """The exact noise for pixels from N(MEAN, SPREAD^2)."""
    share = PROCESS.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    return (1 - share).sqrt() * (x - share.sqrt() * MEAN) / (share * SPREAD**2 + 1 - share)


class Recorder:
    """A fake model: eps is the label plus the channel's number, the variance minus that; remembers its calls."""

    def __init__(self, learn_sigma=True):
        self.calls, self.learn_sigma = [], learn_sigma

    def __call__(self, x, t, y):
        assert t.dtype == y.dtype == torch.int64 and t.shape == y.shape == x.shape[:1]
        assert len(set(t.tolist())) == 1
        self.calls.append((t[0].item(), y.tolist()))
        channel = torch.arange(x.shape[1]).view(1, -1, 1, 1)
        eps = (y.view(-1, 1, 1, 1) + channel) + torch.zeros_like(x)
        return torch.cat([eps, -eps], dim=1) if self.learn_sigma else eps


def run(denoise, sampling, labels=(0, 1), shape=(4, 2, 3), learn_sigma=False, null_class=5, **options):
    return solve(denoise, PROCESS, sampling, ImageNoise(0, range(len(labels)), shape), torch.tensor(labels),
                 null_class=null_class, learn_sigma=learn_sigma, device=CPU, **options)


# Settings


@pytest.mark.parametrize("values, sentence", [
    ({"solver": "ddmp"}, "did you mean 'ddpm'"),
    ({"solver": "xyz"}, "use one of: ddim, ddpm"),
    ({"spacing": "trail"}, "trailing"),
    ({"steps": 0}, "steps must be a whole number"),
    ({"steps": 2.0}, "steps must be a whole number"),
    ({"steps": True}, "steps must be a whole number"),
    ({"guidance": 0.5}, "guidance must be 1"),
    ({"guidance": float("nan")}, "guidance must be 1"),
    ({"guidance": float("inf")}, "guidance must be 1"),
    ({"guidance": "4"}, "guidance must be 1"),
    ({"guidance_channels": 0}, "guidance_channels"),
    ({"guidance_interval": (500, 100)}, "the lower first"),
    ({"guidance_interval": (5,)}, "two timesteps"),
    ({"guidance_interval": None}, "two timesteps"),
    ({"steps": 1, "spacing": "linspace"}, "timestep 0 only"),
    ({"steps": 2, "timesteps": (10, 10)}, "descend without repeats"),
    ({"steps": 2, "timesteps": (1, 10)}, "descend without repeats"),
    ({"steps": 2, "timesteps": (10, -1)}, "whole numbers"),
    ({"steps": 50, "timesteps": (10, 1)}, "set steps to their number"),
    ({"steps": 50, "timesteps": ()}, "set steps to their number"),
    ({"steps": 1, "coefficients": ((1, 2, 3, 4),)}, "for the solver 'multistep', not for 'ddim'"),
    ({"steps": 2, "solver": "multistep", "coefficients": ((1, 2, 3, 4),)}, "4 finite numbers for each of the 2 steps"),
    ({"steps": 1, "solver": "multistep", "coefficients": ((1, 2, 3),)}, "4 finite numbers"),
    ({"steps": 1, "solver": "multistep", "coefficients": ((1, 2, 3, float("inf")),)}, "4 finite numbers"),
    ({"steps": 1, "solver": "multistep", "coefficients": "1234"}, "4 finite numbers"),
])
def test_bad_settings_are_refused_with_a_sentence(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**values)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="'guidance_scale' is unknown; did you mean 'guidance"):
        Sampling.from_dict({"guidance_scale": 4.0})


def test_more_steps_than_the_process_has():
    with pytest.raises(ValueError, match="1001 steps are more than the 1000"):
        timesteps(PROCESS, Sampling(steps=1001))
    with pytest.raises(ValueError, match="beyond the process"):
        timesteps(PROCESS, Sampling(steps=1, timesteps=(1000,)))


@given(st.builds(Sampling, solver=st.sampled_from(list(SOLVERS)), spacing=st.sampled_from(list(SPACINGS)),
                 steps=st.integers(2, 1000), guidance=st.floats(1, 20), guidance_channels=st.none() | st.integers(1, 4),
                 guidance_interval=st.tuples(st.integers(0, 500), st.integers(500, 1000))))
def test_settings_survive_json(sampling):
    assert Sampling.from_dict(json.loads(json.dumps(sampling.to_dict()))) == sampling


def test_coefficients_survive_json_and_other_steps_set_them_aside():
    sampling = Sampling("multistep", 2, coefficients=((1, 0.5, 0, 0), (0.25, 2, -1, 0)))
    assert Sampling.from_dict(json.loads(json.dumps(sampling.to_dict()))) == sampling
    assert sampling.revised(guidance=2.0).coefficients == ((1.0, 0.5, 0.0, 0.0), (0.25, 2.0, -1.0, 0.0))
    for changes in ({"solver": "ddim"}, {"steps": 3}, {"timesteps": (900, 10)}, {"spacing": "linspace"}):
        assert sampling.revised(**changes).coefficients is None


def test_explicit_timesteps_survive_json():
    sampling = Sampling(steps=3, timesteps=(900, 400, 10))
    assert Sampling.from_dict(json.loads(json.dumps(sampling.to_dict()))) == sampling
    assert timesteps(PROCESS, sampling) == [900, 400, 10]


# Timesteps


@given(st.sampled_from(list(SPACINGS)), st.integers(2, 1000), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_timesteps_descend_and_are_as_many_as_asked(spacing, steps, extra):
    process = NoiseProcess(steps=steps + extra)
    visited = timesteps(process, Sampling(steps=steps, spacing=spacing))
    assert len(visited) == steps
    assert all(a > b for a, b in pairwise(visited))
    assert visited[0] < process.steps and visited[-1] >= 0
    if spacing != "leading":  # leading stops short of pure noise: the flaw arXiv 2305.08891 names
        assert visited[0] == process.steps - 1


def test_known_timesteps():
    assert timesteps(PROCESS, Sampling(steps=4, spacing="leading")) == [750, 500, 250, 0]
    assert timesteps(PROCESS, Sampling(steps=4, spacing="trailing")) == [999, 749, 499, 249]
    assert timesteps(PROCESS, Sampling(steps=4, spacing="linspace")) == [999, 666, 333, 0]
    assert timesteps(PROCESS, Sampling(steps=1)) == [999]
    respaced = timesteps(PROCESS, Sampling(steps=250, spacing="respaced"))
    assert respaced[-6:] == [20, 16, 12, 8, 4, 0] and respaced[0] == 999  # a stride of 999 / 249 = 4.012


def test_uniform_lambda_takes_equal_steps_of_the_log_signal_to_noise_ratio():
    shares = PROCESS.alphas_cumprod[timesteps(PROCESS, Sampling(steps=6, spacing="uniform_lambda"))]
    lam = 0.5 * (shares / (1 - shares)).log()
    torch.testing.assert_close(lam.diff(), lam.diff().mean().expand(5), rtol=0.05, atol=0)


# Guidance


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_guidance_every_step_is_one_plain_call(solver):
    model = Recorder()
    run(model, Sampling(solver, 7), learn_sigma=True)
    assert [t for t, _ in model.calls] == timesteps(PROCESS, Sampling(solver, 7))
    assert all(labels == [0, 1] for _, labels in model.calls)
    assert evaluations(PROCESS, Sampling(solver, 7)) == 7


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_doubles_the_batch_inside_its_interval_only(solver):
    sampling = Sampling(solver, 4, guidance=3.0, guidance_interval=(499, 749))  # visits 999, 749, 499, 249
    model = Recorder()
    run(model, sampling, learn_sigma=True)
    assert model.calls == [(999, [0, 1]), (749, [0, 1, 5, 5]), (499, [0, 1, 5, 5]), (249, [0, 1])]
    assert evaluations(PROCESS, sampling) == 6


@given(st.integers(1, 60), st.integers(0, 999), st.integers(0, 999), st.sampled_from([1.0, 2.5]))
@settings(max_examples=50, deadline=None)
def test_evaluations_are_the_images_the_model_sees(steps, a, b, guidance):
    sampling = Sampling(steps=steps, guidance=guidance, guidance_interval=(min(a, b), max(a, b)))
    model = Recorder()
    run(model, sampling, labels=(3,), shape=(1, 1, 1), learn_sigma=True)
    assert sum(len(labels) for _, labels in model.calls) == evaluations(PROCESS, sampling)


@pytest.mark.parametrize("channels, expected", [
    (None, [5 + 3 * (1 - 5) + c for c in range(4)]),
    (3, [5 + 3 * (1 - 5) + c for c in range(3)] + [1 + 3]),  # the fourth stays the conditional prediction
    (9, [5 + 3 * (1 - 5) + c for c in range(4)]),
])
def test_guided_channels(channels, expected):
    """One DDIM step to the clean image shows the noise that was used: eps_null + 3 (eps_label - eps_null)."""
    sampling = Sampling("ddim", 1, guidance=3.0, guidance_channels=channels, timesteps=(300,))
    share = PROCESS.alphas_cumprod[300].item()
    noise = ImageNoise(0, [0], (4, 2, 3)).draw()
    clean = run(Recorder(), sampling, labels=(1,), learn_sigma=True)
    eps = (noise - share**0.5 * clean) / (1 - share) ** 0.5
    torch.testing.assert_close(eps[0, :, 0, 0], torch.tensor(expected).float(), atol=1e-4, rtol=0)


def test_guided_variance_is_the_conditional_one():
    """DDPM with guidance 1 + tiny moves as with none, whatever variance the null class would have."""
    plain = run(Recorder(), Sampling("ddpm", 5), learn_sigma=True)
    guided = run(Recorder(), Sampling("ddpm", 5, guidance=1 + 1e-7), learn_sigma=True, null_class=50)
    torch.testing.assert_close(plain, guided, atol=1e-2, rtol=1e-3)


def test_progress_counts_steps():
    seen = []
    run(Recorder(), Sampling(steps=3), learn_sigma=True, progress=seen.append)
    assert seen == [1, 2, 3]


# Solvers


def error(solver, steps, spacing="uniform_lambda"):
    """Distance from the exact end of the probability-flow path: x_t = a MEAN + sqrt(a^2 SPREAD^2 + sigma^2) z."""
    sampling = Sampling(solver, steps, spacing)
    share = PROCESS.alphas_cumprod[-1].item()
    noise = ImageNoise(0, [0, 1], (4, 8, 8)).draw()
    z = (noise - share**0.5 * MEAN) / (share * SPREAD**2 + 1 - share) ** 0.5
    return (run(gaussian_denoiser, sampling, shape=(4, 8, 8)) - (MEAN + SPREAD * z)).square().mean().sqrt().item()


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_deterministic_solvers_converge_to_the_exact_path(solver):
    assert error(solver, 1000, "linspace") < 3e-3
    assert error(solver, 40) < 0.5 * error(solver, 10)


@pytest.mark.parametrize("steps", [20, 40])
def test_higher_order_is_nearer_at_equal_cost(steps):
    assert error("unipc", steps) < error("dpmpp_2m", steps) < 0.2 * error("ddim", steps)


def test_ddpm_draws_from_the_distribution():
    images = run(gaussian_denoiser, Sampling("ddpm", 250, "respaced"), shape=(4, 32, 32))
    assert images.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert images.std().item() == pytest.approx(SPREAD, rel=0.05)


def test_learned_variance_spans_posterior_to_beta():
    """Variance output -1 is the fixed small variance; +1 is beta, which is larger and lands elsewhere."""

    def with_variance(value):
        def denoise(x, t, y):
            return torch.cat([gaussian_denoiser(x, t, y), torch.full_like(x, value)], dim=1)

        return run(denoise, Sampling("ddpm", 10), learn_sigma=True)

    fixed = run(gaussian_denoiser, Sampling("ddpm", 10))
    torch.testing.assert_close(with_variance(-1.0), fixed)
    assert (with_variance(1.0) - fixed).abs().max() > 0.05


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_multistep_is_dpmpp_2m_until_it_is_fitted(steps):
    plain, unfitted = (run(gaussian_denoiser, Sampling(solver, steps)) for solver in ("dpmpp_2m", "multistep"))
    torch.testing.assert_close(unfitted, plain, atol=2e-5, rtol=1e-5)


def test_multistep_weighs_x_and_three_clean_images():
    rows = ((1.0, 2.0, 100.0, 100.0), (0.5, 0.0, 3.0, 100.0), (0.0, 0.0, 0.0, 4.0))
    steps, calls = Sampling("multistep", 3, timesteps=(900, 500, 100), coefficients=rows), []

    def denoise(x, t, y):  # for which the clean image is the number of the call
        calls.append(x)
        share = PROCESS.alphas_cumprod[t[0]].float()
        return (x - share.sqrt() * len(calls)) / (1 - share).sqrt()

    noise, end = ImageNoise(0, range(2), (4, 2, 3)).draw(), run(denoise, steps)
    torch.testing.assert_close(calls[1], noise + 2 * 1)  # nothing was before
    torch.testing.assert_close(calls[2], 0.5 * calls[1] + 3 * 1)
    torch.testing.assert_close(end, torch.full_like(end, 4.0 * 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_stochastic_solvers_draw_after_the_start(solver):
    noise = ImageNoise(0, [0], (1, 2, 2))
    draws, draw = [], noise.draw
    noise.draw = lambda: draws.append(1) or draw()
    solve(gaussian_denoiser, PROCESS, Sampling(solver, 6), noise, torch.tensor([0]), null_class=1, learn_sigma=False,
          device=CPU)
    assert len(draws) == (6 if solver == "ddpm" else 1)  # the start, and every step but the last


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_the_predicted_clean_image(solver):
    noise, share = ImageNoise(0, [0, 1], (4, 2, 3)).draw(), PROCESS.alphas_cumprod[999].item()
    eps = gaussian_denoiser(noise, torch.tensor([999, 999]), None)
    images = run(gaussian_denoiser, Sampling(solver, 1))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, (noise - (1 - share) ** 0.5 * eps) / share**0.5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_do_not_depend_on_their_batch(solver):
    sampling = Sampling(solver, 5)

    def solved(ids):
        return solve(gaussian_denoiser, PROCESS, sampling, ImageNoise(7, ids, (2, 4, 4)),
                     torch.zeros(len(ids), dtype=torch.int64), null_class=1, learn_sigma=False, device=CPU)

    together = solved([4, 8, 15])
    for place, image_id in enumerate([4, 8, 15]):
        torch.testing.assert_close(solved([image_id])[0], together[place])


def test_every_solver_says_what_it_is():
    assert list(SOLVE) == list(SOLVERS) and list(PLACES) == list(SPACINGS)
    assert all(SOLVERS.values()) and all(SPACINGS.values())
