"""Which layers matter: ranked rightly, within the time, resumed without repeating, the model as it was."""

from contextlib import contextmanager
from itertools import count

import pytest
import torch

from slimdit import sensitivity
from slimdit.allocation import FILE, open_sensitivity, read_sensitivity
from slimdit.context import Refused
from slimdit.models.dit import DiT, uniform
from slimdit.models.linear import Int8WeightOnly
from slimdit.models.surgery import pack_linears
from slimdit.pipeline import Pipeline, Runtime
from slimdit.recipe import fingerprint
from slimdit.sampling.solvers import Sampling, timesteps
from slimdit.sensitivity import (
    HEAT_MAP,
    Probe,
    Settings,
    evenly,
    heat_map,
    in_float32,
    layer_names,
    measure,
    perturbations,
    perturbed,
    plain,
    plan,
    spread,
    table,
    timestep_bins,
)
from slimdit.training.calibration import outputs

QUICK = Settings(images=2, bins=3, calls=2)


def small_pipeline(depth=2) -> Pipeline:
    model = DiT(uniform(depth=depth, width=16, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Pipeline(model, Sampling(steps=6, guidance=1.5))


@contextmanager
def no_bar(what, total):
    yield lambda done: None


def run(pipeline, folder, settings=QUICK, **options):
    return measure(pipeline, settings, folder, bar=no_bar, **options)


def scaled(pipeline, name, factor):
    with torch.no_grad():
        for parameter in pipeline.model.get_submodule(name).parameters():
            parameter.mul_(factor)
    return pipeline


@pytest.mark.parametrize("perturb", ["int8", "prune"])
def test_the_layer_made_to_matter_most_is_ranked_first(tmp_path, perturb):
    pipeline = small_pipeline()
    for name in layer_names(pipeline.model, perturb):
        if name != "blocks.1.attn.proj":  # the others answer with little but their biases
            pipeline.model.get_submodule(name).weight.data.mul_(0.01)
    found = run(pipeline, tmp_path, Settings(perturb, images=2))
    assert found.ranking()[0] == "blocks.1.attn.proj"
    assert found.totals["blocks.1.attn.proj"] > 5 * found.totals[found.ranking()[1]]
    assert set(found.totals) == set(layer_names(pipeline.model, perturb)) and len(found.totals) == 10


def test_the_block_made_to_matter_most_is_ranked_first(tmp_path):
    pipeline = scaled(scaled(small_pipeline(3), "blocks.0.mlp.fc2", 0.1), "blocks.1.mlp.fc2", 20)
    found = run(pipeline, tmp_path, Settings("drop", images=2))
    assert list(found.totals) == ["blocks.0", "blocks.1", "blocks.2"] and found.ranking()[0] == "blocks.1"


def test_an_idle_block_may_be_dropped_without_error(tmp_path):
    pipeline = scaled(small_pipeline(), "blocks.0.adaLN_modulation.1", 0)
    found = run(pipeline, tmp_path, Settings("drop", images=2))
    assert found.totals["blocks.0"] == 0 < found.totals["blocks.1"]


def test_the_error_is_that_of_the_noise_alone_relative_and_per_bin():
    pipeline = in_float32(small_pipeline())
    probe = Probe.of(pipeline, QUICK)
    name = "blocks.0.mlp.fc1"
    errors, total = probe.errors(pipeline.model, name, "prune")
    answers = outputs(pipeline.model, probe.calls)
    with perturbed(pipeline.model, name, "prune"):
        wrong = outputs(pipeline.model, probe.calls)
    first = [place for place, number in enumerate(probe.bins) if number == 0]
    expected = torch.cat([answers[place][:, :1].flatten() for place in first])
    got = torch.cat([wrong[place][:, :1].flatten() for place in first])
    assert errors[0] == pytest.approx(((got - expected).square().sum() / expected.square().sum()).item(), rel=1e-5)
    assert min(errors) <= total <= max(errors)
    variance = scaled(pipeline, "final_layer", 1)
    with torch.no_grad():  # the model's last output channel is its variance
        variance.model.final_layer.linear.weight.view(4, 2, 16)[:, 1] *= 100
    assert probe.errors(variance.model, name, "prune")[1] == pytest.approx(total, rel=1e-4)


def test_both_guidance_halves_are_in_the_calls():
    probe = Probe.of(in_float32(small_pipeline()), QUICK)
    assert all(len(call.x) == 4 and (call.y == 3).sum() == 2 for call in probe.calls)
    assert sorted(set(probe.bins)) == [0, 1, 2] and len(probe.calls) == 6


@pytest.mark.parametrize("perturb", perturbations())
def test_what_was_perturbed_is_put_back_to_the_bit(perturb):
    pipeline = small_pipeline()
    before, modules = fingerprint(pipeline), dict(pipeline.model.named_modules())
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 3])
    right = pipeline.model(x, t, y)
    for name in layer_names(pipeline.model, perturb):
        with pytest.raises(RuntimeError), perturbed(pipeline.model, name, perturb):
            assert not torch.equal(pipeline.model(x, t, y), right)
            raise RuntimeError
    assert fingerprint(pipeline) == before and torch.equal(pipeline.model(x, t, y), right)
    assert dict(pipeline.model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in pipeline.model.parameters())


def test_the_callers_pipeline_is_left_alone_whatever_its_precision(tmp_path):
    pipeline = small_pipeline().replace(runtime=Runtime("bfloat16"))
    pipeline.model.to(torch.bfloat16)
    before = fingerprint(pipeline)
    run(pipeline, tmp_path)
    assert fingerprint(pipeline) == before


def test_rounding_is_the_packed_layers_own():
    model = small_pipeline().model
    linear = model.blocks[0].mlp.fc1
    packed = Int8WeightOnly.of(linear)
    with perturbed(model, "blocks.0.mlp.fc1", "int8"):
        assert torch.equal(linear.weight, packed.dequantize())


def test_pruning_zeroes_the_smallest_quarter():
    model = small_pipeline().model
    linear = model.blocks[0].mlp.fc1
    own = linear.weight.detach().clone()
    with perturbed(model, "blocks.0.mlp.fc1", "prune"):
        gone = linear.weight == 0
        assert gone.float().mean() == 0.25 and own[gone].abs().max() < own[~gone].abs().min()
        assert torch.equal(linear.weight[~gone], own[~gone])


class Counted:
    """Counts the layers that are perturbed."""

    def __init__(self, monkeypatch):
        self.names = []
        errors = Probe.errors
        monkeypatch.setattr(Probe, "errors", lambda probe, model, name, perturb: (
            self.names.append(name), errors(probe, model, name, perturb))[1])


def ticking(minutes_per_look):
    looks = count()
    return lambda: 60 * minutes_per_look * next(looks)


def test_the_time_is_a_cap_and_what_it_allows_is_spread(tmp_path):
    found = run(small_pipeline(4), tmp_path, minutes=3.5, clock=ticking(1))
    assert len(found.totals) == 4 and len(found.missing) == 16
    assert sorted(int(name.split(".")[1]) for name in found.totals) == [0, 0, 1, 3]
    assert open_sensitivity(tmp_path) == found and (tmp_path / HEAT_MAP).exists()
    with pytest.raises(ValueError, match="4 of 20 layers"):
        read_sensitivity(tmp_path)


def test_no_time_still_measures_a_layer(tmp_path):
    assert len(run(small_pipeline(), tmp_path, minutes=0).totals) == 1


def test_resuming_repeats_nothing_and_ends_as_an_unbroken_run(tmp_path, monkeypatch):
    counted = Counted(monkeypatch)
    run(small_pipeline(), tmp_path / "a", minutes=0)
    run(small_pipeline(), tmp_path / "a", minutes=2.5, clock=ticking(1), resume=True)
    resumed = run(small_pipeline(), tmp_path / "a", resume=True)
    assert len(counted.names) == len(set(counted.names)) == 10
    whole = run(small_pipeline(), tmp_path / "b")
    assert resumed.totals == whole.totals and resumed.errors == whole.errors
    counted.names.clear()
    monkeypatch.setattr(sensitivity, "deployed_calls", None)  # nothing is sampled either
    assert run(small_pipeline(), tmp_path / "a", resume=True) == resumed and counted.names == []


def test_an_interruption_keeps_what_was_measured_and_says_how_to_go_on(tmp_path, monkeypatch):
    errors, calls = Probe.errors, count()

    def interrupted(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return errors(*arguments)

    monkeypatch.setattr(Probe, "errors", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 10 layers: add --resume to go on"):
        run(small_pipeline(), tmp_path)
    assert len(open_sensitivity(tmp_path).totals) == 2
    assert len(run(small_pipeline(), tmp_path, resume=True).totals) == 10


def test_a_folder_in_use_is_refused(tmp_path):
    run(small_pipeline(), tmp_path, minutes=0)
    with pytest.raises(FileExistsError, match="add --resume"):
        run(small_pipeline(), tmp_path)
    with pytest.raises(ValueError, match="another model or sampling"):
        run(scaled(small_pipeline(), "blocks.0.attn", 2), tmp_path, resume=True)
    with pytest.raises(ValueError, match="another model or sampling"):
        run(small_pipeline().replace(sampling=Sampling(steps=7)), tmp_path, resume=True)
    with pytest.raises(ValueError, match="another bins and seed"):
        run(small_pipeline(), tmp_path, Settings(images=2, bins=2, calls=2, seed=1), resume=True)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match="not a whole JSON file"):
        run(small_pipeline(), tmp_path, resume=True)


def test_packed_layers_are_refused_but_their_blocks_can_be_dropped(tmp_path):
    pipeline = small_pipeline()
    pack_linears(pipeline.model, {"blocks.0.mlp.fc1": "int8_weight_only"})
    with pytest.raises(Refused, match="1 layers are packed: measure the float model"):
        run(pipeline, tmp_path)
    assert len(run(pipeline, tmp_path, Settings("drop", images=2)).totals) == 2


def test_a_model_that_predicts_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give a trained model"):
        run(scaled(small_pipeline(), "final_layer", 0), tmp_path)


@pytest.mark.parametrize("options, sentence", [
    ({"perturb": "int9"}, "did you mean 'int8'"), ({"bins": 0}, "bins must be at least 1"),
    ({"images": 0}, "images must be"), ({"calls": 0}, "calls must be")])
def test_bad_settings_are_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**options)


def test_bins_share_the_visited_timesteps_out():
    pipeline = small_pipeline()
    visited = timesteps(pipeline.process, pipeline.sampling)
    assert timestep_bins(pipeline, 3) == [visited[:2], visited[2:4], visited[4:]]
    assert [t for part in timestep_bins(pipeline, 4) for t in part] == visited
    assert timestep_bins(pipeline, 9) == [[t] for t in visited]


def test_the_order_is_bit_reversed():
    layers = [str(number) for number in range(6)]
    assert spread(layers, layers) == ["0", "4", "2", "1", "5", "3"]
    assert spread(layers, ["3", "2"]) == ["2", "3"]
    assert spread(["a"], ["a"]) == ["a"]


def test_calls_are_taken_evenly():
    assert evenly(range(10), 3) == [1, 5, 8]
    assert evenly(range(2), 3) == [0, 1] and evenly([], 3) == []


def test_what_is_shown(tmp_path):
    found = run(small_pipeline(), tmp_path, source="tiny")
    told = plain(found)
    assert [row["rank"] for row in told["layers"]] == list(range(1, 11)) and told["of"] == 10
    assert [row["total"] for row in told["layers"]] == sorted(found.totals.values(), reverse=True)
    assert table(found).row_count == 10 and len(table(found).columns) == 1 + 3 + 2
    assert "blocks.1.mlp.fc2" in heat_map(found) and told["bins"][0] in heat_map(found)
    assert plan(small_pipeline(), QUICK, 5)["model calls per layer"] == 6
