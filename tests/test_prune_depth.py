"""What dropping blocks promises: as many stay as asked, the silent go first, and too many go with a warning."""

import tempfile
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.context import Context, Refused
from slimdit.formats import load, save
from slimdit.methods.prune_depth import CHOOSE, PruneDepth, even
from slimdit.methods.quantize import Quantize
from slimdit.models.dit import DiT, preset, twin, uniform
from slimdit.pipeline import Pipeline
from slimdit.recipe import Recipe, apply, config_mismatch, rehearse
from slimdit.sampling.solvers import Sampling
from slimdit.training.gradients import gated, loss_batches, noise_loss

from .test_methods import SMALL, apply_once, small_pipeline

DEEP = replace(SMALL, blocks=SMALL.blocks[:1] * 6)


@pytest.mark.parametrize("depth, keep, kept", [(5, 4, [0, 1, 3, 4]), (28, 14, None), (6, 2, [0, 5]), (6, 1, [0]),
                                               (5, 3, [0, 2, 4])])
def test_even_keeps_first_and_last_and_spreads(depth, keep, kept):
    pipeline = Pipeline(DiT(uniform(depth=depth, width=8, heads=2, patch=2, input_size=(4, 4), channels=1, classes=2)))
    chosen = even(PruneDepth(), keep, pipeline, Context(pipeline, Path()))
    assert kept is None or chosen == kept
    steps = [later - earlier for earlier, later in pairwise(chosen)]
    assert len(set(chosen)) == keep and chosen[0] == 0 and (keep == 1 or chosen[-1] == depth - 1)
    assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize("how", ["greedy", "taylor"])
def test_silent_blocks_go_first(how, tmp_path):
    pipeline = small_pipeline(DEEP)
    with torch.no_grad():
        for number in (1, 4):
            for parameter in pipeline.model.blocks[number].adaLN_modulation[1].parameters():
                parameter.mul_(1e-3)
    changed, witness = apply_once(PruneDepth(keep=4, how=how, images=4, steps=60), pipeline, tmp_path)
    assert witness["kept"] == [0, 2, 3, 5]
    assert torch.equal(changed.model.blocks[1].mlp.fc1.weight, pipeline.model.blocks[2].mlp.fc1.weight)
    assert (witness["blocks_before"], witness["blocks_removed"]) == (6, 2)


def test_what_is_learned_is_among_the_choices_of_smallest_loss(tmp_path):
    pipeline = small_pipeline(DEEP)
    _, witness = apply_once(PruneDepth(keep=4, how="learned", images=4), pipeline, tmp_path)
    batches = loss_batches(pipeline, images=4)

    @torch.no_grad()
    def loss(kept):
        with gated(pipeline.model, torch.zeros(6).index_fill(0, torch.tensor(kept), 1.0)):
            return sum(noise_loss(pipeline.model, pipeline.process, batch).item() for batch in batches)

    ranked = sorted(combinations(range(6), 4), key=loss)  # all 15 choices
    assert tuple(witness["kept"]) in ranked[:3]


def test_choosing_leaves_no_hooks_and_no_gradients_behind(tmp_path):
    pipeline = small_pipeline(DEEP)
    for how in ("greedy", "taylor", "learned"):
        changed, _ = apply_once(PruneDepth(keep=5, how=how, images=2, steps=3), pipeline, tmp_path)
        assert not any(block._forward_hooks for block in changed.model.blocks)
        assert all(parameter.grad is None for parameter in changed.model.parameters())


def test_more_than_a_few_go_with_a_warning(tmp_path):
    told = []
    pipeline = small_pipeline(uniform(depth=7, width=16, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3))

    def witness(method):
        context = Context(pipeline, tmp_path, report=told.append)
        apply(method, pipeline.copy(), context)
        return context.witnesses[0]

    assert "warning" not in witness(PruneDepth(keep=6)) and told == []
    assert witness(PruneDepth(keep=5))["warning"] == ("2 of 7 blocks go, and beyond 15% quality holds only with "
                                                      "training afterwards")
    assert len(told) == 1 and told[0].startswith("prune_depth: 2 of 7 blocks go")
    assert 'how = "even" is the better start' in witness(PruneDepth(keep=5, how="taylor", images=2))["warning"]


def test_more_blocks_than_there_are_is_refused(tmp_path):
    with pytest.raises(Refused, match="would keep 3 blocks of a model that has 2: keep fewer"):
        apply_once(PruneDepth(keep=3), small_pipeline(), tmp_path)


def test_packed_layers_are_refused_with_the_order_that_works(tmp_path):
    packed, _ = apply_once(Quantize(), small_pipeline(), tmp_path)
    with pytest.raises(Refused, match="10 layers are packed: put it before quantize"):
        apply_once(PruneDepth(keep=1), packed, tmp_path)


@pytest.mark.parametrize("options, sentence", [
    ({"keep": 0}, "keep must be a whole number of at least 1, not 0"), ({"keep": 0.5}, "keep must be a whole number"),
    ({"keep": True}, "keep must be a whole number"), ({"keep": 1, "how": "best"}, "how 'best' is unknown; use one of"),
    ({"images": 0}, "images must be"), ({"steps": 0}, "steps must be")])
def test_bad_options_are_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PruneDepth(**options)


@given(st.sampled_from(["XS", "S"]), st.sampled_from(sorted(CHOOSE)), st.data())
@settings(max_examples=5, deadline=None)
def test_any_number_on_any_presets_twin_runs_and_reloads(size, how, data):
    config = preset(f"{size}/4", input_size=(8, 8), classes=3)
    keep = data.draw(st.integers(len(config.blocks) - 6 if how == "greedy" else 1, len(config.blocks)).filter(bool))
    pipeline = Pipeline(DiT(twin(config)), Sampling(steps=2))
    changed, witness = rehearse(Recipe("shallow", (PruneDepth(keep=keep, how=how),)), pipeline)
    assert config_mismatch(changed.model) == "" and len(changed.model.blocks) == keep == len(witness[0]["kept"])
    with tempfile.TemporaryDirectory() as folder:
        save(changed, Path(folder) / "model")
        again = load(str(Path(folder) / "model"))
    asked = torch.ones(2, 4, 8, 8), torch.tensor([7, 800]), torch.tensor([0, 3])
    assert torch.equal(again.model(*asked), changed.model(*asked))
    assert twin(config).blocks[0] == changed.model.config.blocks[0]


def test_what_is_left_of_a_plain_model_is_plain_to_diffusers(tmp_path):
    """Fewer equal blocks are a DiT that diffusers knows; narrower ones are refused (test_formats.py)."""
    from diffusers import DiTTransformer2DModel

    pipeline = small_pipeline(replace(DEEP, frequency_shift=1))
    changed, _ = apply_once(PruneDepth(keep=3), pipeline, tmp_path)
    save(changed, tmp_path / "saved", format="diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "saved", subfolder="transformer").eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, timestep=t, class_labels=y).sample, changed.model(x, t, y),
                                   rtol=1e-4, atol=1e-4)
