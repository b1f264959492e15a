"""What narrowing promises: the unimportant goes first, shares and targets are met, and nothing is cut to nothing."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.context import Context, Refused
from slimdit.formats import load, save
from slimdit.methods.prune_width import PruneWidth
from slimdit.methods.quantize import Quantize
from slimdit.metrics.cost import macs
from slimdit.models.dit import PRESETS, DiT, preset, twin
from slimdit.models.surgery import block_macs
from slimdit.pipeline import Pipeline
from slimdit.recipe import Recipe, config_mismatch, rehearse
from slimdit.sampling.solvers import Sampling
from slimdit.training.data import ArrayImages
from slimdit.training.importance import best

from .test_methods import SMALL, apply_once, sensitivity_file, small_pipeline

CRITERIA = ("taylor", "activation", "magnitude")
shares = st.floats(0.01, 1)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("scope", ["block", "global"])
def test_units_and_heads_that_add_nothing_go_first(criterion, scope, tmp_path):
    pipeline = small_pipeline()
    silent = torch.arange(0, 64, 4)  # 16 of 64 units, and head 1
    with torch.no_grad():
        for block in pipeline.model.blocks:
            for layer, columns in ((block.mlp.fc2, silent), (block.attn.proj, torch.arange(8, 16))):
                layer.weight[:, columns] = 0
            block.mlp.fc1.weight[silent] = 0
            block.mlp.fc1.bias[silent] = 0
            block.attn.qkv.weight[[*range(8, 16), *range(24, 32), *range(40, 48)]] = 0
            block.attn.qkv.bias[[*range(8, 16), *range(24, 32), *range(40, 48)]] = 0
    before = pipeline.sample(range(2), batch=2)
    method = PruneWidth(mlp=0.75, heads=0.5, criterion=criterion, scope=scope, images=2)
    changed, witness = apply_once(method, pipeline, tmp_path)
    assert (witness["mlp_widths"], witness["heads"]) == ([48, 48], [1, 1])
    assert np.abs(changed.sample(range(2), batch=2).astype(int) - before).max() <= 1  # sums in another order


def test_global_takes_more_from_the_block_that_matters_less(tmp_path):
    pipeline = small_pipeline()
    with torch.no_grad():
        pipeline.model.blocks[0].mlp.fc2.weight.mul_(0.01)
    for criterion in CRITERIA:
        method = PruneWidth(mlp=0.75, criterion=criterion, scope="global", images=2)
        _, witness = apply_once(method, pipeline, tmp_path)
        assert witness["units_removed"] == 32
        if criterion != "magnitude":  # whose norm is mostly fc1's here
            assert witness["mlp_widths"] == [32, 64]


def test_a_silent_branch_matters_less_through_its_gate(tmp_path):
    pipeline = small_pipeline()
    with torch.no_grad():
        for parameter in pipeline.model.blocks[1].adaLN_modulation[1].parameters():
            parameter[5 * 16:] *= 0.01  # the MLP's gate
    _, witness = apply_once(PruneWidth(mlp=0.75, criterion="magnitude", scope="global"), pipeline, tmp_path)
    assert witness["mlp_widths"] == [64, 32]


def test_taylor_is_the_loss_without_the_unit_to_first_order():
    """Its score is the slope of the loss as a unit is turned down, measured here by turning it down a little."""
    from slimdit.training.gradients import loss_batches, noise_loss
    from slimdit.training.importance import branches, taylor

    pipeline = small_pipeline()
    score, _ = taylor(branches(pipeline.model, "mlp"), pipeline, None, 2, 0)
    batches = loss_batches(pipeline, images=2)
    weight, step = pipeline.model.blocks[0].mlp.fc2.weight, 1e-2

    @torch.no_grad()
    def losses(factor):
        weight[:, 5] *= factor
        found = [noise_loss(pipeline.model, pipeline.process, batch).item() for batch in batches]
        weight[:, 5] /= factor
        return np.array(found)

    slopes = (losses(1 + step) - losses(1 - step)) / (2 * step)
    assert score[5].item() == pytest.approx(np.abs(slopes).mean(), rel=0.02)


def test_data_is_used_where_there_is_any(tmp_path):
    pipeline = small_pipeline()
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    context = Context(pipeline, tmp_path, data=ArrayImages(images, np.arange(20) % 3))
    method = PruneWidth(mlp=0.5, images=2)
    with_data, without = method.chosen(pipeline, context), method.chosen(pipeline, Context(pipeline, tmp_path))
    assert with_data != without and with_data == method.chosen(pipeline, context)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_target_of_macs_is_met_from_below(share, tmp_path):
    config = replace(SMALL, blocks=(replace(SMALL.blocks[0], heads=8),) * 2)
    changed, witness = apply_once(PruneWidth(macs=share, criterion="magnitude", multiple=1), small_pipeline(config),
                                  tmp_path)

    def of_blocks(config):
        counted = macs(config)
        return counted.mlp + counted.attention_linears + counted.attention_mixing

    kept = of_blocks(changed.model.config) / of_blocks(config)
    assert share - 0.02 <= kept <= share
    assert witness["block_macs_kept"] == pytest.approx(kept, abs=1e-4)
    assert witness["units_removed"] > 0 and witness["heads_removed"] > 0


def test_block_macs_are_those_of_the_cost_wing():
    config = preset("S/4")
    counted = macs(config)
    assert block_macs(config, [1536] * 12, [6] * 12) == (counted.mlp + counted.attention_linears
                                                         + counted.attention_mixing)


def test_a_target_below_what_must_stay_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"the least that blocks keep is 0\.\d+ of their MACs: ask for macs above that"):
        apply_once(PruneWidth(macs=0.05, criterion="magnitude"), small_pipeline(), tmp_path)


def test_what_rounds_to_nothing_is_seen_to_be_nothing(tmp_path):
    pipeline = small_pipeline()
    changed, witness = apply_once(PruneWidth(mlp=0.95, heads=0.9, criterion="magnitude"), pipeline, tmp_path)
    assert (witness["units_removed"], witness["heads_removed"], witness["block_macs_kept"]) == (0, 0, 1)
    assert changed.model.config == pipeline.model.config


def test_every_block_keeps_a_head_and_a_multiple_of_units(tmp_path):
    _, witness = apply_once(PruneWidth(mlp=0.01, heads=0.01, criterion="magnitude", scope="global"), small_pipeline(),
                            tmp_path)
    assert (witness["mlp_widths"], witness["heads"]) == ([16, 16], [1, 1])


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=20), min_size=1, max_size=3), shares,
       st.integers(1, 6), st.sampled_from(["block", "global"]))
@settings(max_examples=60, deadline=None)
def test_the_best_stay_in_whole_grains_near_the_share(lists, share, grain, scope):
    scores = [torch.tensor(one, dtype=torch.float64) for one in lists]
    kept = best(scores, [share] * len(scores), [grain] * len(scores), scope)
    for one, stays in zip(scores, kept):
        assert stays == sorted(set(stays)) and stays
        assert len(stays) % grain == 0 or len(stays) == len(one)
        gone = [place for place in range(len(one)) if place not in stays]
        assert not gone or min(one[stays]) >= max(one[gone])
    if scope == "global":
        least = sum(min(grain, len(one)) for one in lists)
        count, whole = sum(map(len, kept)), sum(map(len, lists))
        assert count == least or count <= share * whole + grain / 2
        assert count >= min(share * whole - grain / 2, whole)


@given(st.sampled_from(list(PRESETS)), shares, shares, st.sampled_from(CRITERIA), st.sampled_from(["block", "global"]))
@settings(max_examples=8, deadline=None)
def test_any_share_on_any_presets_twin_runs_and_reloads(size, mlp, heads, criterion, scope):
    method = PruneWidth(mlp=mlp, heads=heads, criterion=criterion, scope=scope)
    pipeline = Pipeline(DiT(twin(preset(f"{size}/4", input_size=(8, 8), classes=3))), Sampling(steps=2))
    changed, witness = rehearse(Recipe("narrow", (method,)), pipeline)
    assert config_mismatch(changed.model) == ""
    assert sum(witness[0]["mlp_widths"]) == sum(block.mlp_width for block in changed.model.config.blocks)
    with tempfile.TemporaryDirectory() as folder:
        save(changed, Path(folder) / "model")
        again = load(str(Path(folder) / "model"))
    asked = torch.ones(2, 4, 8, 8), torch.tensor([7, 800]), torch.tensor([0, 3])
    assert torch.equal(again.model(*asked), changed.model(*asked))


@pytest.mark.parametrize("options, sentence", [
    ({"mlp": 0}, "mlp is the share that stays, above 0 up to 1, not 0"),
    ({"heads": 1.2}, "heads is the share that stays"), ({"macs": -1.0}, "macs is the share that stays"),
    ({"mlp": True}, "mlp is the share"), ({"mlp": float("nan")}, "mlp is the share"),
    ({"mlp": 0.5, "macs": 0.5}, "give either it or them"),
    ({"criterion": "l1"}, "criterion 'l1' is unknown; use taylor"), ({"scope": "layer"}, "scope 'layer' is unknown"),
    ({"scope": "global", "sensitivity": "s"}, "use scope = \"block\" with it"),
    ({"multiple": 0}, "multiple must be at least 1"), ({"images": 0}, "images must be at least 1")])
def test_bad_options_are_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PruneWidth(**options)


def test_blocks_that_err_more_when_perturbed_keep_more(tmp_path):
    errors = {"blocks.0.mlp.fc1": 4.0, "blocks.0.mlp.fc2": 4.0, "blocks.1.mlp.fc1": 1.0, "blocks.1.mlp.fc2": 1.0}
    method = PruneWidth(mlp=0.5, multiple=4, sensitivity=str(sensitivity_file(tmp_path, errors)))
    changed, _ = apply_once(method, small_pipeline(), tmp_path)
    first, second = (block.mlp_width for block in changed.model.config.blocks)
    before = small_pipeline().model.config.blocks[0].mlp_width
    assert first > second and first + second == before


def test_the_sensitivity_of_another_model_is_refused(tmp_path):
    other = sensitivity_file(tmp_path, {f"blocks.{block}.mlp.fc1": 1.0 for block in range(3)})
    with pytest.raises(Refused, match="of a model of 3 blocks, and this one has 2: measure it"):
        apply_once(PruneWidth(mlp=0.5, sensitivity=str(other)), small_pipeline(), tmp_path)
    with pytest.raises(Refused, match="matches no layer of a block"):
        apply_once(PruneWidth(heads=0.5, sensitivity=str(other)), small_pipeline(), tmp_path)
    with pytest.raises(Refused, match=r"none\.json does not exist: make it with `slimdit sensitivity"):
        apply_once(PruneWidth(mlp=0.5, sensitivity=str(tmp_path / "none.json")), small_pipeline(), tmp_path)


def test_packed_layers_are_refused_with_the_order_that_works(tmp_path):
    packed, _ = apply_once(Quantize(), small_pipeline(), tmp_path)
    for method in (PruneWidth(mlp=0.5), PruneWidth()):
        with pytest.raises(Refused, match="10 layers are packed: put it before quantize"):
            apply_once(method, packed, tmp_path)


def test_another_attention_is_refused_only_where_heads_are_cut(tmp_path):
    pipeline = small_pipeline()

    class Other(type(pipeline.model.blocks[0].attn)):
        pass

    pipeline.model.blocks[1].attn.__class__ = Other
    with pytest.raises(Refused, match="block 1 has a Other: leave heads at 1"):
        apply_once(PruneWidth(heads=0.5), pipeline, tmp_path)
    assert apply_once(PruneWidth(mlp=0.5, images=2), pipeline, tmp_path)[1]["mlp_widths"] == [32, 32]
