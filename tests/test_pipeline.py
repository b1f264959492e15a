"""What a pipeline promises: an image is its seed's and id's alone, and execution never changes the model."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.models.autoencoder import PixelSpace
from slimdit.models.dit import DiT, uniform
from slimdit.pipeline import Pipeline, Runtime, to_uint8
from slimdit.sampling.seeds import ImageNoise, image_labels, seeded
from slimdit.sampling.settings import SOLVERS
from slimdit.sampling.solvers import Sampling, solve

CONFIG = uniform(depth=2, width=16, heads=2, patch=2, input_size=(4, 8), channels=3, classes=5)


def build(sampling=None, **parts):
    model = DiT(CONFIG)
    generator = seeded(0, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return Pipeline(model, sampling or Sampling(steps=4), **parts)


def recording(pipeline, calls):
    """The pipeline, with the labels of every model call noted."""
    forward = pipeline.model.forward

    def noted(x, t, y, *more):
        calls.append(y.tolist())
        return forward(x, t, y, *more)

    pipeline.model.forward = noted
    return pipeline


def levels_apart(a, b):
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_image_whatever_the_batch(solver):
    pipeline = build(Sampling(solver, 5, guidance=2.0))
    ids = range(64)
    whole = pipeline.sample(ids, batch=64)
    assert whole.shape == (64, 4, 8, 3) and whole.dtype == np.uint8
    assert whole.std() > 10  # images, not a constant
    for batch in (1, 7):
        apart = levels_apart(pipeline.sample(ids, batch=batch), whole)
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def test_the_same_image_in_floating_point():
    pipeline = build(Sampling("ddpm", 10, guidance=3.0))

    def latents(ids):
        noise, labels = ImageNoise(0, ids, (3, 4, 8)), image_labels(0, ids, 5)
        return solve(pipeline.denoise, pipeline.process, pipeline.sampling, noise, labels, null_class=5,
                     learn_sigma=True, device=pipeline.device)

    whole = latents(range(64))
    for batch in (1, 7):
        parts = torch.cat([latents(range(64)[start:start + batch]) for start in range(0, 64, batch)])
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_a_run_resumes_anywhere_and_in_any_order():
    pipeline = build()
    whole = pipeline.sample(range(10), batch=4)
    assert levels_apart(pipeline.sample(range(3, 10), batch=4), whole[3:]).max() <= 1
    assert levels_apart(pipeline.sample([9, 2, 5], batch=2), whole[[9, 2, 5]]).max() <= 1


def test_images_depend_on_seed_id_and_label():
    pipeline = build()
    assert np.array_equal(pipeline.sample([0, 1]), pipeline.sample([0, 1]))
    images = [pipeline.sample([0]), pipeline.sample([1]), pipeline.sample([0], seed=1)]
    images += [pipeline.sample([0], labels=[label]) for label in range(5) if label != image_labels(0, [0], 5)[0]]
    assert len({image.tobytes() for image in images}) == len(images)


def test_labels_are_those_the_ids_stand_for():
    calls = []
    recording(build(Sampling(steps=1)), calls).sample(range(5), seed=3)
    assert calls == [image_labels(3, range(5), 5).tolist()]


def test_without_guidance_the_model_is_called_once_a_step_and_never_doubled():
    calls = []
    recording(build(Sampling(steps=6)), calls).sample(range(3), labels=[0, 1, 2])
    assert calls == [[0, 1, 2]] * 6


def test_guidance_asks_for_the_null_class_as_well():
    calls = []
    recording(build(Sampling(steps=2, guidance=2.0)), calls).sample(range(2), labels=[4, 1])
    assert calls == [[4, 1, 5, 5]] * 2


@pytest.mark.parametrize("labels, sentence", [
    ([0, 5], r"labels must be in 0\.\.4"),
    ([-1, 0], r"labels must be in 0\.\.4"),
    ([0], "2 images were asked for with 1 labels"),
])
def test_wrong_labels_are_refused(labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        build().sample([0, 1], labels=labels)


def test_no_images():
    assert build().sample([]).shape == (0, 4, 8, 3)


def test_progress_counts_images():
    seen = []
    build().sample(range(5), batch=2, progress=seen.append)
    assert seen == [2, 4, 5]


# Execution


@pytest.mark.parametrize("runtime", [Runtime(dtype="bfloat16"), Runtime(attention="explicit")])
def test_execution_changes_no_weight_and_few_pixels(runtime):
    pipeline = build()
    weights = {name: tensor.clone() for name, tensor in pipeline.model.state_dict().items()}
    plain = pipeline.sample(range(4))
    other = pipeline.replace(runtime=runtime).sample(range(4))
    assert levels_apart(other, plain).mean() < 2
    for name, tensor in pipeline.model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weights[name])
    assert np.array_equal(pipeline.sample(range(4)), plain)


def test_a_compiled_model_sees_one_batch_size_only(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    plain, calls = build().sample(range(5), batch=4), []
    compiled = recording(build(runtime=Runtime(compile=True, attention="fused")), calls)
    assert np.array_equal(compiled.sample(range(5), batch=4)[:4], plain[:4])
    assert levels_apart(compiled.sample(range(5), batch=4), plain).max() <= 1
    assert {len(labels) for labels in calls} == {4}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_compiled_step_is_the_step(solver, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: seen.append(function.__name__) or function)
    pipeline = build(Sampling(solver, 6, guidance=3.0, guidance_channels=2, guidance_interval=(300, 800)))
    compiled = pipeline.replace(runtime=Runtime(compile=True, attention="fused"))
    assert np.array_equal(compiled.sample(range(3), batch=3), pipeline.sample(range(3), batch=3))
    assert seen == ["step"]


@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
def test_the_compiler_takes_a_whole_step(solver):
    pipeline = build(Sampling(solver, 4, guidance=3.0))
    compiled = pipeline.replace(runtime=Runtime(compile=True, attention="fused"))
    assert levels_apart(compiled.sample(range(3), batch=3), pipeline.sample(range(3), batch=3)).max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["ddim", "unipc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graphs_keep_every_answer_apart(dtype, solver):
    pipeline = build(Sampling(solver, 6, guidance=2.0, guidance_interval=(0, 600)))
    plain, runtime = pipeline.sample(range(8), batch=4), Runtime(dtype, compile=True)
    again = pipeline.replace(runtime=runtime).to("cuda").sample(range(8), batch=4)
    assert levels_apart(again, plain).mean() < (0.1 if dtype == "float32" else 2)


def test_auto_attention_is_explicit_where_that_was_faster():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert Runtime().attention_form(64, cpu) == "fused"
    assert Runtime(compile=True).attention_form(64, cpu) == "explicit"
    assert Runtime(compile=True).attention_form(1024, cpu) == "fused"
    assert Runtime(compile=True).attention_form(64, cuda) == "fused"
    assert Runtime(attention="explicit").attention_form(1024, cuda) == "explicit"


@pytest.mark.parametrize("values, sentence", [
    ({"dtype": "float8"}, "dtype 'float8' is unknown; use one of float32"),
    ({"attention": "flash"}, "attention 'flash' is unknown"),
])
def test_bad_runtimes_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Runtime(**values)


def test_a_copy_shares_nothing_and_a_replacement_shares_the_rest():
    pipeline = build()
    copied, replaced = pipeline.copy(), pipeline.replace(sampling=Sampling(steps=2))
    assert replaced.model is pipeline.model and replaced.sampling.steps == 2 and pipeline.sampling.steps == 4
    with torch.no_grad():
        copied.model.final_layer.linear.bias.add_(5)
    assert not torch.equal(copied.model.final_layer.linear.bias, pipeline.model.final_layer.linear.bias)
    assert not np.array_equal(copied.sample([0]), pipeline.sample([0]))


def test_a_replacement_never_runs_the_old_model():
    pipeline = build()
    before = pipeline.sample([0])
    silent = pipeline.replace(model=DiT(CONFIG))
    assert not np.array_equal(silent.sample([0]), before)


def test_images_come_out_of_the_autoencoder():
    class Doubling(PixelSpace):
        factor, image_channels = 2, 1

        def decode(self, latents):
            return latents[:, :1].repeat_interleave(2, -1).repeat_interleave(2, -2)

    pixels = build().sample(range(3))
    decoded = build(autoencoder=Doubling()).sample(range(3))
    assert decoded.shape == (3, 8, 16, 1)
    assert np.array_equal(decoded[:, ::2, ::2, 0], pixels[..., 0])
    assert build(autoencoder=Doubling()).sample([]).shape == (0, 8, 16, 1)


# Pixels


@given(st.integers(0, 255))
def test_every_level_survives(level):
    image = torch.full((1, 1, 1, 1), level / 127.5 - 1)
    assert to_uint8(image).item() == level


@given(st.floats(-3, 3, width=32))
@settings(deadline=None)
def test_levels_are_clamped_and_nearest(value):
    level = to_uint8(torch.full((1, 1, 1, 1), value)).item()
    assert abs(level - (min(max(value, -1), 1) + 1) * 127.5) <= 0.5 + 1e-4


def test_uint8_is_height_width_channels():
    image = torch.zeros(1, 3, 4, 8)
    image[0, 2, 1, 5] = 1.0
    levels = to_uint8(image)
    assert levels.shape == (1, 4, 8, 3) and levels[0, 1, 5, 2] == 255
    assert (levels == 128).sum() == levels.size - 1  # 127.5 rounds to the even level


def test_an_image_that_is_no_number_is_refused_and_named():
    pipeline = build()

    def spoilt(x, t, y, *more):
        return torch.where((y == 3)[:, None, None, None], torch.nan, x)

    pipeline.model.forward = spoilt
    with pytest.raises(ValueError, match=r"image 12 has pixels that are not finite numbers \(NaN\)"):
        pipeline.sample(range(10, 14), labels=[0, 1, 3, 3])
    assert len(pipeline.sample(range(2), labels=[0, 1])) == 2
