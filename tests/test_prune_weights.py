"""Which weights are removed, by every criterion and pattern, and what the file gains."""

import json

import pytest
import torch

from slimdit.context import Context, Refused
from slimdit.formats import load, save
from slimdit.methods.prune_weights import PruneWeights, input_norms, outside_best, smallest
from slimdit.methods.quantize import Quantize
from slimdit.models.dit import uniform
from slimdit.recipe import Recipe, apply, fingerprint, rehearse
from slimdit.training.gradients import loss_batches, loss_gradients

from .test_loop import tiny_data
from .test_methods import SMALL, apply_once, small_pipeline

LINEARS = [f"blocks.{block}.{name}" for block in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def weight(pipeline, name):
    return pipeline.model.get_submodule(name).weight.detach()


def removed(method, tmp_path, **changes):
    """Where each layer's weights became zero."""
    pipeline = small_pipeline()
    context = Context(pipeline, tmp_path, **changes)
    changed = apply(method, pipeline.copy(), context)
    return {name: weight(changed, name) == 0 for name in LINEARS}


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
def test_half_of_every_chosen_layer_is_zero_and_the_rest_as_it_was(criterion, tmp_path):
    pipeline = small_pipeline()
    changed, witness = apply_once(PruneWeights(criterion=criterion, images=8), pipeline, tmp_path)
    for name, module in pipeline.model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        now = weight(changed, name)
        zero = now == 0
        assert zero.float().mean() == (0.5 if name in LINEARS else 0), name
        assert torch.equal(now[~zero], module.weight[~zero]) and not torch.signbit(now[zero]).any()
    assert witness["layers"] == 8 and witness["share_zero"] == 0.5
    assert witness["weights_removed"] == witness["weights"] / 2
    assert witness["stored_bytes_estimate_after"] < witness["stored_bytes_estimate_before"] == witness["dense_bytes"]


def test_magnitude_removes_the_smallest(tmp_path):
    masks = removed(PruneWeights(sparsity=0.25), tmp_path)
    for name, mask in masks.items():
        sizes = weight(small_pipeline(), name).abs()
        assert sizes[mask].max() <= sizes[~mask].min() and mask.float().mean() == 0.25


def test_a_global_scope_removes_more_where_weights_are_smaller(tmp_path):
    pipeline = small_pipeline()
    with torch.no_grad():
        pipeline.model.blocks[0].mlp.fc1.weight.mul_(0.1)
    changed, witness = apply_once(PruneWeights(scope="global"), pipeline, tmp_path)
    shares = {name: float((weight(changed, name) == 0).float().mean()) for name in LINEARS}
    assert shares["blocks.0.mlp.fc1"] > 0.9 and shares["blocks.1.mlp.fc1"] < 0.5
    assert witness["share_zero"] == 0.5


def test_wanda_ranks_within_a_row_by_weight_times_input_norm(tmp_path):
    pipeline = small_pipeline()
    masks = removed(PruneWeights(criterion="wanda", images=8), tmp_path)
    norms = input_norms(pipeline, LINEARS, 8, 0)
    for name, mask in masks.items():
        scores = weight(pipeline, name).abs() * norms[name]
        assert (mask.sum(dim=1) == mask.shape[1] // 2).all()
        assert (scores.masked_fill(~mask, 0).amax(1) <= scores.masked_fill(mask, 1e9).amin(1)).all()
    plain = removed(PruneWeights(), tmp_path)
    assert any(not torch.equal(masks[name], plain[name]) for name in LINEARS)


def test_input_norms_are_those_of_the_calls(tmp_path):
    from slimdit.training.calibration import deployed_calls

    pipeline = small_pipeline()
    seen, calls = [], deployed_calls(pipeline, images=8)
    hook = pipeline.model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for call in calls:
            pipeline.model(call.x, call.t, call.y)
    hook.remove()
    expected = torch.cat([x.flatten(0, 1) for x in seen]).norm(dim=0)
    assert torch.allclose(input_norms(pipeline, LINEARS, 8, 0)["blocks.1.mlp.fc2"], expected, rtol=1e-4)


def test_taylor_is_the_loss_to_first_order_averaged_over_parts_of_the_timesteps(tmp_path):
    pipeline, name = small_pipeline(), "blocks.1.mlp.fc1"
    masks = removed(PruneWeights(criterion="taylor", images=8), tmp_path)
    batches = loss_batches(pipeline, images=8)
    assert len({int(batch.t[0]) for batch in batches}) == 8
    found = loss_gradients(pipeline.model, pipeline.process, batches, [pipeline.model.get_parameter(f"{name}.weight")])
    sizes = torch.stack([gradient.abs() for gradient, in found]).mean(0)
    scores = weight(pipeline, name).abs() * sizes
    assert scores[masks[name]].max() <= scores[~masks[name]].min()


def test_taylor_takes_the_data_where_there_is_some(tmp_path):
    method = PruneWeights(criterion="taylor", images=8)
    own, given = removed(method, tmp_path), removed(method, tmp_path, data=tiny_data())
    assert any(not torch.equal(own[name], given[name]) for name in LINEARS)


@pytest.mark.parametrize("pattern, n, m", [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("1:2", 1, 2)])
def test_n_of_every_m_weights_in_a_row_stay_and_they_are_the_largest(pattern, n, m, tmp_path):
    masks = removed(PruneWeights(pattern=pattern), tmp_path)
    for name, mask in masks.items():
        groups = mask.view(-1, m)
        assert (groups.sum(1) == m - n).all()
        sizes = weight(small_pipeline(), name).abs().view(-1, m)
        assert (sizes.masked_fill(~groups, 0).amax(1) <= sizes.masked_fill(groups, 1e9).amin(1)).all()


def test_a_row_that_m_does_not_divide_keeps_n_of_its_rest():
    scores = torch.tensor([[1.0, 2, 3, 4, 9, 8, 7], [0, 0, 0, 0, 0, 0, 0]])
    assert outside_best(scores, 2, 4)[0].tolist() == [True, True, False, False, False, False, True]
    assert outside_best(scores, 2, 4)[1].sum() == 3


def test_ties_are_broken_by_position_so_that_the_count_is_exact():
    assert smallest(torch.ones(2, 10), 0.3).sum(1).tolist() == [3, 3]
    assert smallest(torch.ones(2, 10), 0.3)[0, :3].all()


def test_patterns_choose_layers_and_a_wrong_one_is_refused(tmp_path):
    changed, witness = apply_once(PruneWeights(layers=("blocks.*",), skip=("*.attn.*",)), small_pipeline(), tmp_path)
    assert witness["layers"] == 6 and (weight(changed, "blocks.0.adaLN_modulation.1") == 0).float().mean() == 0.5
    assert not (weight(changed, "blocks.0.attn.qkv") == 0).any()
    with pytest.raises(Refused, match=r"prune_weights: skip pattern 'blocks.0.mlp.fc3' .* nearest is 'blocks.0.mlp.fc"):
        apply_once(PruneWeights(skip=("blocks.0.mlp.fc3",)), small_pipeline(), tmp_path)


def test_a_packed_model_is_refused_with_the_order_that_works(tmp_path):
    packed, _ = apply_once(Quantize(), small_pipeline(), tmp_path)
    with pytest.raises(Refused, match="put prune_weights before quantize"):
        apply_once(PruneWeights(), packed, tmp_path)
    rehearse(Recipe("order", (PruneWeights(), Quantize())), SMALL)


@pytest.mark.parametrize("options, sentence", [
    ({"sparsity": 1.0}, r"in 0..1 \(1 excluded\)"), ({"sparsity": -0.1}, "in 0..1"),
    ({"sparsity": float("nan")}, "in 0..1"), ({"criterion": "luck"}, "criterion 'luck' is unknown"),
    ({"scope": "row"}, "scope 'row'"), ({"pattern": "4:2"}, "neither"), ({"pattern": "0:4"}, "neither"),
    ({"pattern": "2-4"}, "neither"), ({"pattern": "2:4", "sparsity": 0.7}, "removes 0.5 of the weights, not 0.7"),
    ({"pattern": "2:4", "scope": "global"}, "2:4 ranks within groups"), ({"images": 0}, "images must be at least 1"),
    ({"criterion": "wanda", "scope": "global"}, "wanda ranks within rows")])
def test_bad_options_are_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PruneWeights(**options)
    assert PruneWeights(pattern="2:4", sparsity=0.5).share == PruneWeights(pattern="2:4").share == 0.5


@pytest.mark.parametrize("dtype, share", [(None, 1 / 2 + 1 / 32), ("bfloat16", 1 / 2 + 1 / 16)])
def test_the_file_of_a_larger_model_shrinks_as_the_bytes_say(dtype, share, tmp_path):
    config = uniform(depth=2, width=128, heads=4, patch=4, input_size=(8, 8), channels=1, classes=3)
    pipeline = small_pipeline(config)
    save(pipeline, tmp_path / "before", dtype=dtype)
    method = PruneWeights(pattern="2:4", layers=("blocks.*",))
    changed, _ = apply_once(method, pipeline, tmp_path)
    save(changed, tmp_path / "after", dtype=dtype)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "after")]
    weights = sum(module.weight.numel() for name, module in changed.model.named_modules()
                  if isinstance(module, torch.nn.Linear) and name.startswith("blocks"))
    saved = weights * (4 if dtype is None else 2) * (1 - share)
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=3000)  # headers
    assert len(json.loads((tmp_path / "after" / "config.json").read_text())["sparse"]) == 10
    if dtype is None:
        assert fingerprint(load(tmp_path / "after")) == fingerprint(changed)
