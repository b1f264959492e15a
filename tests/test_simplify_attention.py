"""What conversion promises: inherited weights, the blocks that bear it best, training that helps."""

import json
import re
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.context import Context, Refused
from slimdit.formats import load, save
from slimdit.methods.prune_weights import PruneWeights
from slimdit.methods.prune_width import PruneWidth
from slimdit.methods.quantize import Quantize
from slimdit.methods.simplify_attention import KINDS, SimplifyAttention, mediator_grid
from slimdit.metrics.cost import macs
from slimdit.models.dit import DiT, preset, twin, uniform
from slimdit.pipeline import Pipeline
from slimdit.recipe import Recipe, config_mismatch, parse, rehearse
from slimdit.sampling.solvers import Sampling
from slimdit.training.calibration import deployed_calls, output_error, outputs
from slimdit.training.loop import TrainState

from .test_methods import apply_once, small_pipeline

WIDE = uniform(depth=3, width=32, heads=4, patch=2, input_size=(6, 16), channels=1, classes=3)  # 3 x 8 tokens
QUICK = {"regression": 0, "images": 2}


def wide_pipeline():
    return small_pipeline(WIDE).replace(sampling=Sampling(steps=4, guidance=1.5))


@pytest.mark.parametrize("kind, options, block", [
    ("mediated", {"mediators": 4}, {"attention": "mediated", "mediators": (1, 4)}),
    ("mediated", {"mediators": 6, "groups": 2}, {"attention": "mediated", "mediators": (2, 3), "kv_heads": 2}),
    ("focused", {}, {"attention": "focused"}),
    ("focused", {"groups": 1, "conv": 5}, {"attention": "focused", "kv_heads": 1, "conv": 5}),
    ("grouped", {}, {"kv_heads": 2}),
    ("multi_query", {"conv": 3}, {"kv_heads": 1, "conv": 3}),
    ("shallow", {"inner": 0.25}, {"head_dim": 2}),
    ("softmax", {"conv": 3}, {"conv": 3})], ids=str)
def test_every_kind_becomes_the_blocks_it_says_on_a_grid_that_is_not_square(kind, options, block, tmp_path):
    pipeline = wide_pipeline()
    changed, witness = apply_once(SimplifyAttention(kind, (2,), **options, **QUICK), pipeline, tmp_path)
    expected = replace(WIDE.blocks[2], **block)
    assert changed.model.config.blocks == (*WIDE.blocks[:2], expected) and config_mismatch(changed.model) == ""
    assert witness["kind"] == kind and witness["blocks"] == [2]
    assert changed.sample(range(2), batch=2).std() > 0
    json.dumps(witness, allow_nan=False)
    save(changed, tmp_path / "model")
    again = load(tmp_path / "model")
    asked = torch.ones(2, 1, 6, 16), torch.tensor([7, 800]), torch.tensor([0, 3])
    assert torch.equal(again.model(*asked), changed.model(*asked)) and again.model.config == changed.model.config


def test_the_control_starts_as_the_model_it_is_the_control_of(tmp_path):
    pipeline = wide_pipeline()
    changed, witness = apply_once(SimplifyAttention("softmax", 1.0, conv=3, **QUICK), pipeline, tmp_path)
    assert witness["blocks"] == [0, 1, 2] and witness["output_error"] == 0
    assert (changed.sample(range(2), batch=2) == pipeline.sample(range(2), batch=2)).all()


def test_the_blocks_that_err_least_are_changed(tmp_path):
    pipeline = wide_pipeline()
    with torch.no_grad():  # all tokens ask the same, and so all mediators do: nothing is lost
        pipeline.model.blocks[1].attn.qkv.weight[:32] = 0
    _, witness = apply_once(SimplifyAttention(blocks=0.3, mediators=4, **QUICK), pipeline, tmp_path)
    assert witness["blocks"] == [1] and set(witness["errors"]) == {"0", "1", "2"}
    assert witness["errors"]["1"] < 1e-6 < min(witness["errors"]["0"], witness["errors"]["2"])
    assert witness["output_error"] < 1e-6
    _, told = apply_once(SimplifyAttention(blocks=0.5, mediators=4, **QUICK), pipeline, tmp_path)
    runner_up = min((0, 2), key=lambda number: told["errors"][str(number)])
    assert told["blocks"] == sorted([1, runner_up])
    _, told = apply_once(SimplifyAttention(blocks=(2, 0), mediators=4, **QUICK), pipeline, tmp_path)
    assert told["blocks"] == [0, 2] and set(told["errors"]) == {"0", "2"}


@pytest.mark.parametrize("options", [{"kind": "focused", "conv": 3}, {"kind": "multi_query"}, {"kind": "shallow"}],
                         ids=str)
def test_regression_brings_the_block_and_the_model_nearer(options, tmp_path):
    pipeline = wide_pipeline()
    bare, before = apply_once(SimplifyAttention(blocks=(0,), regression=0, images=8, **options), pipeline, tmp_path)
    changed, after = apply_once(SimplifyAttention(blocks=(0,), regression=60, images=8, **options), pipeline, tmp_path)
    assert before["errors"] == before["errors_inherited"] == after["errors_inherited"]
    assert after["errors"]["0"] < 0.8 * before["errors"]["0"]
    calls = deployed_calls(pipeline, images=4, seed=99)
    expected = outputs(pipeline.model, calls)
    assert output_error(changed.model, calls, expected) < output_error(bare.model, calls, expected)


def test_regression_that_does_not_help_is_not_kept(tmp_path, monkeypatch):
    def spoil(attention, answers, **options):
        torch.nn.init.zeros_(attention.proj.weight)

    monkeypatch.setattr("slimdit.training.regression.regress", spoil)
    method = SimplifyAttention("shallow", (0,), images=2)
    changed, witness = apply_once(method, wide_pipeline(), tmp_path)
    assert witness["errors"] == witness["errors_inherited"]
    assert changed.model.blocks[0].attn.proj.weight.abs().sum() > 0


def test_distillation_brings_the_model_nearer_and_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    pipeline = wide_pipeline()
    method = SimplifyAttention("multi_query", 1.0, regression=0, images=2, distill=6, samples=8)
    monkeypatch.setattr("slimdit.methods.simplify_attention.BATCH", 8)
    monkeypatch.setattr("slimdit.methods.simplify_attention.RATE", 3e-3)
    monkeypatch.setattr("slimdit.methods.simplify_attention.EMA", 0.5)
    whole, witness = apply_once(method, pipeline, tmp_path / "whole")
    assert witness["steps"] == 6 and witness["output_error_distilled"] < 0.8 * witness["output_error"]

    def applied(folder, method=method):
        return method.apply(pipeline.copy(), Context(pipeline, folder))

    average, steps = TrainState.average, []

    def counted(state, step):
        average(state, step)
        steps.append(step)
        if steps == [0, 1, 2]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainState, "average", counted)
    with pytest.raises(KeyboardInterrupt):
        applied(tmp_path / "killed")
    again = applied(tmp_path / "killed")
    assert steps == [0, 1, 2, 3, 4, 5]
    assert again.fingerprint() == whole.fingerprint()
    applied(tmp_path / "killed", replace(method, seed=5))  # another beginning is not gone on with
    assert len(steps) == 12 and len(list((tmp_path / "killed").glob("training-*"))) == 2


def test_fewer_macs_where_there_are_many_tokens(tmp_path):
    config = uniform(depth=1, width=16, heads=2, patch=1, input_size=(8, 16), channels=1, classes=3)
    pipeline = small_pipeline(config).replace(sampling=Sampling(steps=2))
    for kind in KINDS:
        options = {"softmax": {"conv": 3}, "grouped": {"groups": 1}}.get(kind, {})
        changed, _ = apply_once(SimplifyAttention(kind, 1.0, **options, **QUICK), pipeline, tmp_path)
        assert (macs(changed.model.config).total < macs(config).total) == (kind != "softmax"), kind


def test_pruned_zeros_stay_where_heads_are_kept(tmp_path):
    sparse, _ = apply_once(PruneWeights(sparsity=0.5, criterion="magnitude"), wide_pipeline(), tmp_path)
    zeros = sparse.model.blocks[0].attn.qkv.weight == 0
    method = SimplifyAttention("focused", (0,), regression=3, images=2, distill=1, samples=4)
    changed, _ = apply_once(method, sparse, tmp_path / "on")
    assert zeros.float().mean() > 0.3 and (changed.model.blocks[0].attn.qkv.weight[zeros] == 0).all()


class TestWhatIsRefused:
    @pytest.mark.parametrize("options, sentence", [
        ({"kind": "linear"}, "kind 'linear' is unknown; use one of mediated, focused"),
        ({"blocks": 1.5}, "blocks is a share, 0 up to 1, or a list of blocks, not 1.5"),
        ({"blocks": True}, "or a list of blocks, not True"), ({"blocks": ()}, "at least one, not []"),
        ({"blocks": (1, 1)}, "name each block once"), ({"mediators": 0}, "mediators must be at least 1, not 0"),
        ({"regression": -1}, "regression must be at least 0"), ({"distill": -1}, "distill must be at least 0"),
        ({"images": 0}, "images must be at least 1"), ({"samples": 0}, "samples must be at least 1"),
        ({"kind": "shallow", "groups": 2}, "groups is a number above 0 that goes with grouped, mediated and focused"),
        ({"kind": "grouped", "groups": 0}, "not 0 with grouped"),
        ({"inner": 1.0}, "inner is the share of a head's features that stays, above 0 and below 1"),
        ({"conv": 4}, "conv is the side of the convolution, 3 or 5, not 4"),
        ({"kind": "softmax"}, "softmax is what the model has: give it conv")])
    def test_bad_options_at_once(self, options, sentence):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            SimplifyAttention(**options)

    @pytest.mark.parametrize("options, sentence", [
        ({"mediators": 12}, "12 mediators for 24 tokens save nothing: use fewer than 12"),
        ({"kind": "grouped", "groups": 3}, "3 groups do not divide the 4 heads of block 0: use one of 1, 2"),
        ({"kind": "focused", "groups": 4}, "4 groups do not divide the 4 heads"),
        ({"kind": "shallow", "inner": 0.01}, "0.01 of the 8 features of a head is 0: use another inner"),
        ({"kind": "focused", "blocks": (0, 3)}, "there is no block 3: this model's are 0..2")])
    def test_what_does_not_fit_the_model(self, options, sentence, tmp_path):
        with pytest.raises(Refused, match=re.escape(sentence)):
            apply_once(SimplifyAttention(**options), wide_pipeline(), tmp_path)
        if "inner" not in options:  # the twin's heads are a few features wide
            with pytest.raises(Refused, match=re.escape(sentence)):
                rehearse(Recipe("twin", (SimplifyAttention(**options),)), WIDE)

    def test_blocks_that_were_changed_already(self, tmp_path):
        once, _ = apply_once(SimplifyAttention("focused", (0, 1), **QUICK), wide_pipeline(), tmp_path)
        with pytest.raises(Refused, match="block 1 no longer has plain softmax attention: choose others"):
            apply_once(SimplifyAttention("focused", (1, 2), **QUICK), once, tmp_path)
        with pytest.raises(Refused, match="would change 2 blocks, and 1 of 3 have plain softmax attention"):
            apply_once(SimplifyAttention("focused", 0.5, **QUICK), once, tmp_path)
        twice, _ = apply_once(SimplifyAttention("multi_query", 0.3, **QUICK), once, tmp_path)
        assert twice.model.config.blocks[2].kv_heads == 1

    def test_packed_layers(self, tmp_path):
        packed, _ = apply_once(Quantize(), wide_pipeline(), tmp_path)
        with pytest.raises(Refused, match="15 layers are packed: put it before quantize"):
            apply_once(SimplifyAttention("focused"), packed, tmp_path)

    def test_cutting_heads_and_smoothing_afterwards(self, tmp_path):
        changed, _ = apply_once(SimplifyAttention("multi_query", (1,), **QUICK), wide_pipeline(), tmp_path)
        with pytest.raises(Refused, match="block 1 has a SoftmaxAttention: leave heads at 1, or put it before"):
            apply_once(PruneWidth(heads=0.5, images=2), changed, tmp_path)
        with pytest.raises(Refused, match=r"blocks\.1\.attn\.proj share their values between heads: protect it"):
            apply_once(Quantize(activations="int8", smooth=0.5, images=2), changed, tmp_path)
        protect = ("final_layer.*", "*_embedder.*", "*adaLN*: int8", "blocks.1.attn.proj")
        apply_once(Quantize(activations="int8", smooth=0.5, images=2, protect=protect), changed, tmp_path)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_mediators_form_a_grid_no_larger_than_asked_for_and_not_much_smaller(rows, columns, most):
    shape = mediator_grid((rows, columns), most)
    assert 1 <= shape[0] <= rows and 1 <= shape[1] <= columns
    assert shape[0] * shape[1] <= most
    assert mediator_grid((columns, rows), most)[0] * mediator_grid((columns, rows), most)[1] <= most


@pytest.mark.parametrize("grid, most, shape", [((8, 8), 16, (4, 4)), ((16, 16), 64, (8, 8)), ((4, 16), 16, (2, 8)),
                                               ((3, 8), 6, (2, 3)), ((1, 9), 4, (1, 4)), ((2, 2), 1, (1, 1))])
def test_mediators_by_hand(grid, most, shape):
    assert mediator_grid(grid, most) == shape


def test_a_recipe_gives_a_share_or_a_list():
    text = 'name = "x"\nmethods = [{simplify_attention = {kind = "focused", blocks = %s, conv = 5}}]'
    for given_blocks, expected in (("0.25", 0.25), ("[0, 2]", (0, 2)), ("1", 1.0)):
        (method,) = parse(text % given_blocks).methods
        assert method.blocks == expected and type(method.blocks) is type(expected)


@given(st.sampled_from(["XS", "S"]), st.sampled_from(["mediated", "focused", "multi_query", "shallow"]),
       st.floats(0.1, 0.7), st.sampled_from([None, 3, 5]))
@settings(max_examples=4, deadline=None)
def test_any_kind_on_a_presets_twin_runs_and_reloads(size, kind, blocks, conv):
    pipeline = Pipeline(DiT(twin(preset(f"{size}/4", input_size=(8, 16), classes=3))), Sampling(steps=2))
    changed, _ = rehearse(Recipe("x", (SimplifyAttention(kind, blocks, mediators=3, conv=conv),)), pipeline)
    assert config_mismatch(changed.model) == ""
    assert len(set(changed.model.config.blocks)) == 2
    with tempfile.TemporaryDirectory() as folder:
        save(changed, Path(folder) / "model")
        again = load(str(Path(folder) / "model"))
    asked = torch.ones(2, 4, 8, 16), torch.tensor([7, 800]), torch.tensor([0, 3])
    assert torch.equal(again.model(*asked), changed.model(*asked))
