"""Experts as a method: a partition computes less and strays little, copies stray not at all, and nothing costs more."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.context import Context, Refused
from slimdit.formats import FormatError, load, save
from slimdit.methods.finetune import Finetune
from slimdit.methods.prune_width import PruneWidth
from slimdit.methods.quantize import Quantize
from slimdit.methods.sparse_experts import SparseExperts
from slimdit.metrics.cost import macs, parameters
from slimdit.models.dit import uniform
from slimdit.recipe import Recipe, apply, config_mismatch, rehearse
from slimdit.sampling.solvers import Sampling
from slimdit.training import experts as fits
from slimdit.training.calibration import deployed_calls, output_error, outputs

from .test_methods import SMALL, apply_once, small_pipeline

LONG = uniform(depth=2, width=16, heads=2, patch=2, input_size=(8, 4), channels=1, classes=3)  # 4 x 2 tokens
PARTITIONS = [SparseExperts(experts=4, active=2, images=4), SparseExperts(experts=2, router="token_choice", images=4),
              SparseExperts(experts=4, active=2, router="timestep", bins=3, images=4),
              SparseExperts(experts=4, active=2, grouping="weights", images=4)]
COPIES = [SparseExperts("upcycle", 4, router="token_choice", images=2),
          SparseExperts("upcycle", 4, router="token_choice", balance="bias", shared=0.5, images=2),
          SparseExperts("upcycle", 3, router="timestep", shared=0.0, images=2)]


def names(method):
    return f"{method.mode} {method.router} {method.grouping}"


@pytest.mark.parametrize("shape", [SMALL, LONG], ids=["square", "long"])
@pytest.mark.parametrize("method", PARTITIONS, ids=names)
def test_a_partition_computes_less_with_as_many_parameters(method, shape, tmp_path):
    pipeline = small_pipeline(shape)
    changed, witness = apply_once(method, pipeline, tmp_path)
    before, after = macs(shape), macs(changed.model.config)
    assert after.mlp + after.routing < before.mlp and after.total < before.total
    assert witness["mlp_macs_kept"] == pytest.approx((after.mlp + after.routing) / before.mlp, abs=1e-4)
    extra = parameters(changed.model.config) - parameters(shape)
    width = shape.width  # a bias for each expert, and the router
    router = 0 if method.router == "timestep" else 2 * method.experts * (width + 1)
    assert extra == len(shape.blocks) * (method.experts * width + router)
    calls = deployed_calls(pipeline, images=4)
    assert witness["output_error"] == pytest.approx(
        output_error(changed.model, calls, outputs(pipeline.model, calls)), rel=1e-2)
    assert 0 < witness["output_error"] < 0.1


@pytest.mark.parametrize("method", PARTITIONS, ids=names)
def test_a_partition_with_all_experts_on_is_the_dense_model(method, tmp_path, monkeypatch):
    pipeline = small_pipeline()
    monkeypatch.setattr(SparseExperts, "require_saving", lambda *_: 1.0)  # it would be refused, for it saves nothing
    if method.router != "token_choice":
        method = replace(method, active=method.experts)
    changed, _ = apply_once(method, pipeline, tmp_path)
    if method.router == "token_choice":  # a token goes to one: its experts are all turned on by hand
        for block in changed.model.blocks:
            block.mlp.config = replace(block.mlp.config, router="expert_choice", active=method.experts)
    calls = deployed_calls(pipeline, images=2)
    assert output_error(changed.model, calls, outputs(pipeline.model, calls)) < 1e-10


@pytest.mark.parametrize("shape", [SMALL, LONG], ids=["square", "long"])
@pytest.mark.parametrize("method", COPIES, ids=names)
def test_copies_answer_as_before_compute_no_more_and_are_more(method, shape, tmp_path):
    pipeline = small_pipeline(shape)
    changed, witness = apply_once(method, pipeline, tmp_path)
    before, after = macs(shape), macs(changed.model.config)
    assert after.mlp == before.mlp  # the router's own count stands apart
    assert after.routing == (0 if method.router == "timestep" else 2 * shape.tokens * shape.width * method.experts)
    routed = 64 - witness["shared_units"][0]
    assert changed.model.config.blocks[0].mlp_width == 64 + (method.experts - 1) * routed
    assert parameters(changed.model.config) - parameters(shape) > 2 * (method.experts - 1) * routed * 2 * shape.width
    calls = deployed_calls(pipeline, images=2)
    assert output_error(changed.model, calls, outputs(pipeline.model, calls)) < 1e-10
    assert all(entry["dropped"] == 0 for entry in witness["routing"].values())


@pytest.mark.parametrize("capacity, dropped", [(0.5, 0.5), (1.0, 0.0)])
def test_capacity_is_room_and_what_has_none_is_left_out(capacity, dropped, tmp_path):
    method = replace(COPIES[0], capacity=capacity)
    changed, witness = apply_once(method, small_pipeline(), tmp_path)
    assert macs(changed.model.config).mlp == macs(SMALL).mlp * (0.25 + 0.75 * capacity)
    assert [entry["dropped"] for entry in witness["routing"].values()] == [dropped] * 2


def test_a_larger_capacity_strays_less(tmp_path):
    errors = [apply_once(SparseExperts(experts=8, active=2, capacity=capacity, images=4), small_pipeline(), tmp_path)[1]
              ["output_error"] for capacity in (0.5, 1.0, 2.0)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.6 * errors[0]


def test_a_trained_models_partition_strays_less_than_units_cut_for_the_same_macs(tmp_path):
    """A random MLP has no units that work together; the bundled one has."""
    bundled = load("bundled")
    pipeline = bundled.replace(sampling=Sampling(steps=4, guidance=1.5))
    calls = deployed_calls(pipeline, images=2, seed=1)  # others than either calibrates on
    expected = outputs(pipeline.model, calls)
    split, _ = apply_once(SparseExperts(experts=8, active=4, images=4), pipeline, tmp_path)
    cut, _ = apply_once(PruneWidth(mlp=0.64, multiple=1, criterion="activation", images=4), pipeline, tmp_path)
    assert macs(cut.model.config).total >= macs(split.model.config).total
    assert output_error(split.model, calls, expected) < 0.5 * output_error(cut.model, calls, expected)


def test_the_closed_forms_are_worth_having(tmp_path, monkeypatch):
    """Each replaced by chance strays farther: the router, the groups."""
    method = SparseExperts(experts=4, active=1, images=4)
    fitted = apply_once(method, small_pipeline(), tmp_path)[1]["output_error"]
    with monkeypatch.context() as patch:
        patch.setattr(fits, "fitted_scores", lambda given, sizes: torch.randn(2, 4, 16))
        assert fitted < 0.9 * apply_once(method, small_pipeline(), tmp_path)[1]["output_error"]
    with monkeypatch.context() as patch:
        patch.setattr(fits, "balanced_clusters", lambda points, count, seed: [list(range(i, 48, 4)) for i in range(4)])
        assert fitted < apply_once(method, small_pipeline(), tmp_path)[1]["output_error"]


def test_balancing_evens_out_the_first_choices():
    generator = torch.Generator().manual_seed(0)
    given = fits.Given(torch.randn(12, 8, 4, generator=generator), torch.zeros(12), torch.arange(12) < 4)
    weight, bias = torch.randn(2, 3, 4, generator=generator), torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]])

    def load(bias):
        return [torch.bincount((given.centred[half].flatten(0, 1) @ rows.t() + row).argmax(1), minlength=3)
                / (8 * half.sum()) for half, rows, row in zip(given.halves(), weight, bias)]

    assert max(one.max() for one in load(bias)) > 0.7
    assert max((one - 1 / 3).abs().max() for one in load(fits.balanced_bias(given, weight, bias))) < 0.1


def test_a_balanced_router_passes_fewer_tokens_on(tmp_path):
    passed = []
    for balance in ("none", "bias"):
        method = SparseExperts(experts=3, router="token_choice", balance=balance, images=4)
        _, witness = apply_once(method, small_pipeline(), tmp_path)
        passed.append(sum(entry["passed_on"] for entry in witness["routing"].values()))
    assert passed[1] < 0.8 * passed[0]


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_clusters_are_equally_large_and_share_no_point(points, count, seed):
    count = min(count, points)
    drawn = torch.randn(points, 3, generator=torch.Generator().manual_seed(seed))
    clusters = fits.balanced_clusters(drawn, count, seed)
    members = [place for cluster in clusters for place in cluster]
    assert [len(cluster) for cluster in clusters] == [points // count] * count
    assert len(set(members)) == len(members)


def test_clusters_that_are_plain_are_found():
    points = torch.cat([torch.randn(10, 3) * 0.01 + corner for corner in torch.eye(3) * 5])
    assert sorted(fits.balanced_clusters(points, 3, 0)) == [list(range(10)), list(range(10, 20)), list(range(20, 30))]


def test_the_least_squares_router_finds_sizes_that_are_linear_in_a_token():
    generator = torch.Generator().manual_seed(0)
    given = fits.Given(torch.randn(20, 8, 6, generator=generator), torch.zeros(20), torch.arange(20) % 2 == 0)
    truth = torch.randn(2, 3, 6, generator=generator)
    sizes = torch.stack([x @ truth[int(one)].t() for x, one in zip(given.x, given.unlabelled)]) + 7
    torch.testing.assert_close(fits.fitted_scores(given, sizes), truth, rtol=0.02, atol=0.02)


def test_a_model_without_unlabelled_calls_routes_them_as_the_others(tmp_path):
    pipeline = small_pipeline()
    unguided = pipeline.replace(sampling=replace(pipeline.sampling, guidance=1.0))
    changed, _ = apply_once(PARTITIONS[0], unguided, tmp_path)
    router = changed.model.blocks[0].mlp.router
    assert torch.equal(router.weight[0], router.weight[1]) and router.weight.abs().sum() > 0


def test_only_the_blocks_asked_for_change(tmp_path):
    changed, witness = apply_once(replace(PARTITIONS[0], blocks=(1,)), small_pipeline(), tmp_path)
    assert changed.model.config.blocks[0] == SMALL.blocks[0] and changed.model.config.blocks[1].experts
    assert list(witness["routing"]) == ["blocks.1"] and witness["blocks"] == 1
    other, _ = apply_once(replace(PARTITIONS[0], blocks=(0,)), changed, tmp_path)
    assert config_mismatch(other.model) == "" and all(block.experts for block in other.model.config.blocks)


def test_units_that_do_not_divide_go_to_the_shared_ones(tmp_path):
    changed, witness = apply_once(SparseExperts(experts=5, active=2, images=2), small_pipeline(), tmp_path)
    assert witness["shared_units"] == [19, 19]  # 64 - 5 * 9
    assert changed.model.config.blocks[0].experts.units(64) == 9


def test_the_report_is_drawn_beside_the_model(tmp_path):
    _, witness = apply_once(PARTITIONS[0], small_pipeline(), tmp_path)
    told = witness["routing"]["blocks.0"]
    assert told["max_violation"] == 0 and told["effective_experts"] == pytest.approx(4, abs=1e-3)
    drawn = (tmp_path / "routing.svg").read_text()
    assert "blocks.1, t 750..999" in drawn and "expert 3" in drawn


def test_training_moves_experts_and_router_and_tells_copies_apart(tmp_path):
    pipeline = small_pipeline()
    upcycled = apply(COPIES[0], pipeline.copy(), Context(pipeline, tmp_path))
    before = upcycled.copy().model.blocks[0].mlp
    context = Context(pipeline, tmp_path)
    trained = apply(Finetune(steps=8, batch=8, samples=8, learning_rate=1e-3, ema=0.5), upcycled, context)
    assert list(context.witnesses[0]["routing"]) == ["blocks.0", "blocks.1"]  # of the model that training leaves
    after = trained.model.blocks[0].mlp
    assert torch.equal(before.experts[0].fc1.weight, before.experts[1].fc1.weight)
    assert not torch.equal(after.experts[0].fc1.weight, after.experts[1].fc1.weight)
    assert not torch.equal(after.router.weight, before.router.weight)
    assert torch.equal(after.router.bias, before.router.bias)


@given(st.sampled_from([*PARTITIONS, *COPIES]), st.sampled_from([(4, 8), (8, 8), (12, 8)]))
@settings(max_examples=6, deadline=None)
def test_any_kind_on_any_grid_runs_and_reloads_to_the_bit(method, size):
    pipeline = small_pipeline(replace(SMALL, input_size=size))
    method = replace(method, experts=2, active=1, images=2)
    changed, _ = rehearse(Recipe("experts", (method,)), pipeline)
    with tempfile.TemporaryDirectory() as folder:
        save(changed, Path(folder) / "model")
        again = load(str(Path(folder) / "model"))
    asked = torch.ones(2, 1, *size), torch.tensor([7, 800]), torch.tensor([0, 3])
    assert torch.equal(again.model(*asked), changed.model(*asked)) and again.model.config == changed.model.config


@pytest.mark.parametrize("change, sentence", [
    ({"count": 5}, "cannot be shared out equally among 5"), ({"count": 10 ** 9}, "count must be a whole number"),
    ({"router": "?"}, "router '\\?' is unknown"), ({"colour": 1}, "block 0: experts: 'colour' is not an option"),
    ({"capacity": "x"}, "capacity: expected float"), ({"router": "token_choice"}, "every token uses one expert")])
def test_a_file_that_was_tampered_with_is_refused(change, sentence, tmp_path):
    changed, _ = apply_once(PARTITIONS[0], small_pipeline(), tmp_path)
    save(changed, tmp_path / "model")
    where = tmp_path / "model" / "config.json"
    values = json.loads(where.read_text())
    values["model"]["blocks"][0]["experts"].update(change)
    where.write_text(json.dumps(values))
    with pytest.raises(FormatError, match=sentence):
        load(tmp_path / "model")


def test_a_table_that_names_no_expert_is_refused(tmp_path):
    changed, _ = apply_once(PARTITIONS[2], small_pipeline(), tmp_path)
    changed.model.blocks[0].mlp.table[0, 0, 0] = 4  # of 0..3
    save(changed, tmp_path / "model")
    with pytest.raises(FormatError, match=r"blocks\.0\.mlp\.table names an expert outside 0\.\.3"):
        load(tmp_path / "model")


def test_what_cannot_hold_experts_says_so(tmp_path):
    changed, _ = apply_once(PARTITIONS[0], small_pipeline(), tmp_path)
    alike = changed.replace(model=changed.model)
    with pytest.raises(FormatError, match="one MLP in a block, this model 4 experts"):
        save(alike, tmp_path / "x", format="diffusers")
    with pytest.raises(Refused, match="has a TokenExperts: put it before what replaces them"):
        apply_once(PruneWidth(mlp=0.5), changed, tmp_path)


@pytest.mark.parametrize("method, sentence", [
    (SparseExperts(experts=49), "49 experts are more than the 48 hidden units beside the shared ones: use fewer"),
    (SparseExperts(experts=4, active=4), "4 of 4 experts with capacity 1 compute no less than the MLP: use fewer"),
    (SparseExperts(experts=4, active=2, capacity=2.0), "2 of 4 experts with capacity 2 compute no less"),
    (replace(COPIES[0], capacity=2.0), "room for 2 of the tokens compute more than the MLP: use a capacity of at"),
    (replace(COPIES[0], experts=3), "3 copies cannot take equally many of 16 tokens: use a number of experts that"),
    (SparseExperts(blocks=(0, 2)), r"block 2 is not one of 0\.\.1: name others"),
    (SparseExperts(blocks=(-1,)), "block -1 is not one of")])
def test_what_cannot_be_is_refused_with_what_to_do(method, sentence, tmp_path):
    with pytest.raises(Refused, match=f"sparse_experts: .*{sentence}"):
        apply_once(method, small_pipeline(), tmp_path)


def test_twice_is_refused_and_packed_is_refused(tmp_path):
    once, _ = apply_once(PARTITIONS[0], small_pipeline(), tmp_path)
    with pytest.raises(Refused, match="2 blocks have experts already"):
        apply_once(PARTITIONS[0], once, tmp_path)
    packed, _ = apply_once(Quantize(), small_pipeline(), tmp_path)
    with pytest.raises(Refused, match="needs float weights, and 10 layers are packed: put it before quantize"):
        apply_once(PARTITIONS[0], packed, tmp_path)


@pytest.mark.parametrize("options, sentence", [
    ({"mode": "split"}, "mode 'split' is unknown; use one of partition, upcycle"),
    ({"router": "hash"}, "router 'hash' is unknown"), ({"grouping": "names"}, "grouping 'names' is unknown"),
    ({"balance": "luck"}, "balance 'luck' is unknown; use one of none, bias, loss"),
    ({"shared": 1.0}, r"shared must be in 0\.\.1"), ({"shared": 0.0}, "a partition needs shared units"),
    ({"images": 0}, "images must be at least 1"), ({"experts": 1}, "count must be a whole number from 2"),
    ({"mode": "upcycle"}, "expert_choice takes some tokens twice and leaves others out"),
    ({"mode": "upcycle", "router": "timestep", "active": 2}, "2 active copies compute more"),
    ({"balance": "bias"}, "only token_choice has first choices to balance, not expert_choice"),
    ({"router": "token_choice", "active": 2}, "every token uses one expert"), ({"capacity": 0.0}, "capacity"),
    ({"router": "timestep", "bins": 0}, "bins must be")])
def test_bad_options_are_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SparseExperts(**options)
