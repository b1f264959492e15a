"""Our DiT and diffusers' DiTTransformer2DModel are the same function of the same weights, in both directions."""

import dataclasses

import pytest
import torch
from diffusers import DiTTransformer2DModel

from slimdit import formats
from slimdit.models.dit import DiT, uniform
from slimdit.pipeline import Pipeline
from slimdit.sampling.solvers import Sampling, timesteps

SHAPES = {
    "small": {"depth": 2, "width": 32, "heads": 4, "patch": 2, "input_size": (8, 8), "channels": 3, "classes": 7},
    "fixed sigma": {"depth": 1, "width": 48, "heads": 2, "patch": 4, "input_size": (16, 16), "channels": 1,
                    "classes": 10, "learn_sigma": False},
    "one token": {"depth": 3, "width": 24, "heads": 3, "patch": 8, "input_size": (8, 8), "channels": 4, "classes": 2},
    "wide": {"depth": 2, "width": 128, "heads": 8, "patch": 2, "input_size": (16, 16), "channels": 4, "classes": 20},
}


def random_model(**options):
    config = uniform(**options)
    generator = torch.Generator().manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def inputs(config, t):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(t), config.channels, *config.input_size, generator=generator)
    y = torch.randint(0, config.label_rows, (len(t),), generator=generator)
    return x, torch.as_tensor(t), y


@torch.no_grad()
def differences(model, theirs, t):
    x, t, y = inputs(model.config, t)
    ours = model(x, t, y)
    assert ours.abs().max() > 0.1  # the weights are not zeros, so the comparison means something
    return (ours - theirs(x, timestep=t, class_labels=y).sample).abs().amax(dim=(1, 2, 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_diffusers_weights_give_our_outputs(shape, eps, tmp_path):
    options = SHAPES[shape]
    torch.manual_seed(2)
    theirs = DiTTransformer2DModel(
        num_attention_heads=options["heads"], attention_head_dim=options["width"] // options["heads"],
        in_channels=options["channels"], out_channels=options["channels"] * (1 + options.get("learn_sigma", True)),
        num_layers=options["depth"], sample_size=options["input_size"][0], patch_size=options["patch"],
        num_embeds_ada_norm=options["classes"], norm_eps=eps).eval()
    first = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    theirs.save_pretrained(tmp_path)

    model = formats.load(tmp_path).model
    assert model.config.frequency_shift == 1
    assert model.config.mlp_norm_eps == eps
    assert model.config.classes == options["classes"]
    assert differences(model, theirs, [0, 1, 17, 500, 999]).max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_our_weights_give_diffusers_outputs_at_every_timestep(shape, tmp_path):
    model = random_model(**SHAPES[shape], frequency_shift=1, mlp_norm_eps=1e-5)
    formats.save(Pipeline(model), tmp_path / "out", format="diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer").eval()
    assert differences(model, theirs, [0, 1, 17, 500, 999]).max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [10, 50])
def test_the_original_frequencies_give_diffusers_outputs_on_the_schedule(shape, steps, tmp_path):
    model = random_model(**SHAPES[shape])
    pipeline = Pipeline(model, Sampling(steps=steps))
    formats.save(pipeline, tmp_path / "out", format="diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer").eval()
    schedule = timesteps(pipeline.process, pipeline.sampling)
    assert differences(model, theirs, schedule).max() < 1e-5
    # Verbatim weights would not do: the refit is what makes them equal.
    with torch.no_grad():
        verbatim = DiT(dataclasses.replace(model.config, frequency_shift=1)).eval()
        verbatim.load_state_dict(model.state_dict())
    x, t, y = inputs(model.config, schedule)
    with torch.no_grad():
        assert (verbatim(x, t, y) - model(x, t, y)).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [100, 250])
def test_schedules_longer_than_the_frequencies_are_exact_where_the_width_suffices(steps, tmp_path):
    model = random_model(depth=1, width=384, heads=6, patch=2, input_size=(4, 4), channels=3, classes=4)
    pipeline = Pipeline(model, Sampling(steps=steps))
    formats.save(pipeline, tmp_path / "out", format="diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer").eval()
    assert differences(model, theirs, timesteps(pipeline.process, pipeline.sampling)).max() < 2e-5
