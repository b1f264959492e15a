"""Steps whose blocks are foretold: exact where that can be exact, the same for every batch, counted and kept."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slimdit import formats
from slimdit.context import Context, Refused
from slimdit.methods.cache_blocks import CacheBlocks
from slimdit.metrics.cost import macs, run_macs
from slimdit.models.dit import DiT, uniform
from slimdit.pipeline import Pipeline, Runtime
from slimdit.recipe import apply
from slimdit.sampling.caching import foretold, shares
from slimdit.sampling.seeds import ImageNoise, image_labels
from slimdit.sampling.settings import Caching, Sampling
from slimdit.sampling.solvers import evaluations, full_steps, skipped
from slimdit.training.calibration import deployed_calls
from slimdit.training.samples import own_samples

CONFIG = uniform(depth=2, width=16, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3)


def build(sampling=None, std=0.15):
    torch.manual_seed(0)
    model = DiT(CONFIG).eval()
    if std:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=std)
    return Pipeline(model, sampling or Sampling(steps=16, guidance=1.5))


def cached(pipeline, full, order=0):
    return pipeline.replace(sampling=pipeline.sampling.with_cache(full, order))


def latents(pipeline, ids=range(2)):
    """What is decoded to images, which a model of random weights drives far out of their range."""
    noise = ImageNoise(0, ids, (1, 8, 8))
    return pipeline.latents(noise, image_labels(0, ids, 3))


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def rows_through_blocks(pipeline):
    """Rows that the first block and the final layer see while two images are made."""
    counts = {"block": 0, "final": 0}

    def note(name):
        return lambda _, inputs, output: counts.__setitem__(name, counts[name] + len(inputs[0]))

    hooks = [pipeline.model.blocks[0].register_forward_hook(note("block")),
             pipeline.model.final_layer.register_forward_hook(note("final"))]
    made = latents(pipeline)
    for hook in hooks:
        hook.remove()
    return counts, made


@pytest.mark.parametrize("full, order", [((), 0), ((1,), 0), ((0, 3, 3), 0), ((0, 5, 4), 0), ("02", 0), ((0.0,), 0),
                                         ((0,), 3), ((0,), -1), ((0,), True)])
def test_bad_caching_is_refused(full, order):
    with pytest.raises(ValueError, match="caching: "):
        Caching(full, order)


def test_settings_are_written_and_read_and_left_out_where_there_are_none():
    sampling = Sampling(steps=5).with_cache((0, 2), 1)
    assert Sampling.from_dict(json.loads(json.dumps(sampling.to_dict()))) == sampling
    assert "cache" not in Sampling().to_dict() and Sampling.from_dict({"cache": None}) == Sampling()
    with pytest.raises(ValueError, match="full evaluation at step 5, and the last of 5 is 4"):
        Sampling(steps=5).with_cache((0, 5))
    for damaged in ([0], {"order": 1}, {"full": [0], "orden": 1}, 3):
        with pytest.raises(ValueError, match="caching: "):
            Sampling.from_dict({"steps": 5, "cache": damaged})


def test_other_steps_set_a_cache_aside_and_other_guidance_does_not():
    sampling = Sampling(steps=20).with_cache((0, 2))
    assert sampling.revised(guidance=3.0).cache == sampling.cache == sampling.revised(steps=20).cache
    for changes in ({"steps": 10}, {"solver": "unipc"}, {"spacing": "linspace"}):
        assert sampling.revised(**changes).cache is None


@given(st.lists(st.integers(0, 999), min_size=1, max_size=3, unique=True), st.integers(0, 999),
       st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_polynomials_are_foretold_exactly(known, timestep, weights):
    def value(t):
        return sum(weight * (t / 1000) ** power for power, weight in enumerate(weights[:len(known)]))

    assert sum(shares(known, timestep)) == pytest.approx(1, abs=1e-6)
    largest = max(1, *(abs(share) for share in shares(known, timestep)))
    found = foretold([(t, torch.full((1, 2), value(t), dtype=torch.float32)) for t in known], timestep)
    assert found[0].tolist() == pytest.approx([value(timestep)] * 2, abs=1e-5 * largest)


def test_blocks_run_at_the_full_steps_only_and_are_counted():
    plain = build()
    pipeline = cached(plain, range(0, 16, 3))
    counts, made = rows_through_blocks(pipeline)
    process, sampling = pipeline.process, pipeline.sampling
    assert evaluations(process, sampling) == 12 and skipped(process, sampling) == 20
    assert counts == {"block": 2 * 12, "final": 2 * 32}
    assert 0 < apart(made, latents(plain)) < 1
    one = macs(CONFIG)
    assert run_macs(CONFIG, process, sampling) == one.total * 12 + 20 * (
        one.embedding + one.condition + one.modulation + one.output)


def test_where_guidance_begins_or_ends_the_whole_model_is_evaluated():
    plain = build(Sampling(steps=16, guidance=1.5, guidance_interval=(300, 700)))
    for order in (0, 1, 2):
        pipeline = cached(plain, (0, 8), order)
        full = full_steps(pipeline.process, pipeline.sampling)
        assert [step for step, whole in enumerate(full) if whole] == [0, 5, 8, 12]
        counts, _ = rows_through_blocks(pipeline)
        assert counts["block"] == 2 * evaluations(pipeline.process, pipeline.sampling) == 2 * 6


def test_all_steps_full_or_blocks_that_say_nothing_change_nothing():
    plain = build()
    assert torch.equal(latents(cached(plain, range(16), 2)), latents(plain))
    silent = build(std=0)
    assert torch.equal(latents(cached(silent, (0,))), latents(silent))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_is_near_and_no_image_depends_on_its_batch(order):
    plain = build(Sampling(steps=40, guidance=1.5))
    pipeline = cached(plain, range(0, 40, 2), order)
    made = latents(pipeline, range(4))
    assert apart(made, latents(plain, range(4))) < (0.1, 0.05, 0.05)[order]
    for i in range(4):
        assert apart(latents(pipeline, [i])[0], made[i]) < 1e-5


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones():
    plain = cached(build(), range(0, 16, 2), 1)
    compiled = plain.replace(runtime=Runtime(compile=True, attention="fused"))
    assert apart(latents(compiled), latents(plain)) < 1e-5


def test_a_saved_model_foretells_as_before(tmp_path):
    pipeline = cached(build(), (0, 4, 8), 1)
    formats.save(pipeline, tmp_path / "model")
    again = formats.load(tmp_path / "model")
    assert again.sampling == pipeline.sampling
    assert torch.equal(latents(again), latents(pipeline))
    assert again.fingerprint() == pipeline.fingerprint() != build().fingerprint()


def test_calibration_and_own_samples_are_of_the_deployed_run():
    pipeline = cached(build(), (0, 4, 8))
    calls = deployed_calls(pipeline, images=2, batch=2)
    assert len(calls) == 3
    plain = deployed_calls(build(), images=2, batch=2)
    assert torch.equal(calls[0].x, plain[0].x) and not torch.equal(calls[1].x, plain[4].x)
    assert not torch.equal(own_samples(pipeline, 2).clean, own_samples(build(), 2).clean)


def test_the_method_chooses_steps_and_says_what_it_holds(tmp_path):
    context = Context(build(), tmp_path)
    changed = apply(CacheBlocks(every=4, order=1), build(), context)
    assert changed.sampling.cache == Caching((0, 4, 8, 12), 1)
    facts = context.witnesses[-1]
    assert facts["evaluations"] == 8 and facts["evaluations_foretold"] == 24
    assert facts["float32_bytes_held_per_image"] == 4 * 16 * 16 * 2 * 2
    assert apply(CacheBlocks(), build(), context).sampling.cache == Caching(tuple(range(0, 16, 2)))


def test_a_threshold_asks_for_more_evaluations_the_lower_it_is(tmp_path):
    context, counts = Context(build(), tmp_path), []
    for threshold in (0.0, 0.02, 0.1, 0.9):
        changed = apply(CacheBlocks(threshold=threshold, order=1, images=4), build(), context)
        counts.append(len(changed.sampling.cache.full) if changed.sampling.cache else 16)
        assert context.witnesses[-1]["forecast_error"] <= threshold
    assert counts == sorted(counts, reverse=True) and counts[0] == 16 > counts[-1]


@pytest.mark.parametrize("options, sentence", [
    ({"every": 0}, "every must be 1"), ({"threshold": 1.0}, "threshold is a relative error"),
    ({"every": 2, "threshold": 0.1}, "not both"), ({"order": 3}, "order must be 0, 1 or 2"), ({"images": 0}, "images"),
])
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        CacheBlocks(**options)


def test_few_steps_and_a_second_cache_are_refused(tmp_path):
    few = build(Sampling(steps=10))
    with pytest.raises(Refused, match="set force = true"):
        apply(CacheBlocks(), few, Context(few, tmp_path))
    assert apply(CacheBlocks(force=True), few, Context(few, tmp_path)).sampling.cache is not None
    twice = build().replace(sampling=replace(build().sampling, cache=Caching((0,))))
    with pytest.raises(Refused, match="foretells steps already"):
        apply(CacheBlocks(), twice, Context(twice, tmp_path))
