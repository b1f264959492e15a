"""What the pairs promise: nearest of their rank on the conditions in use, exact where those are few, fewer bytes."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.context import Refused
from slimdit.formats import load, save
from slimdit.methods.low_rank_adaln import LowRankAdaln, fitted, met_by_adaln
from slimdit.methods.quantize import Quantize
from slimdit.models.dit import PRESETS, DiT, preset, twin, uniform
from slimdit.models.linear import Int8WeightOnly, LowRank
from slimdit.pipeline import Pipeline
from slimdit.recipe import Recipe, config_mismatch, rehearse
from slimdit.sampling.solvers import Sampling

from .test_methods import apply_once, small_pipeline

WIDE = uniform(depth=2, width=48, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3)


def test_exact_where_the_conditions_are_fewer_than_the_rank(tmp_path):
    """2 timesteps and 4 labels span at most 7 directions around their mean."""
    pipeline = small_pipeline(WIDE).replace(sampling=Sampling(steps=2, guidance=1.5))
    changed, witness = apply_once(LowRankAdaln(rank=7 / 48, final=True), pipeline, tmp_path)
    assert witness["rank"] == 7 and witness["layers"] == 3 and witness["largest_relative_error"] < 1e-10
    for t in (999, 499):
        for y in range(4):
            asked = torch.randn(1, 1, 8, 8), torch.tensor([t]), torch.tensor([y])
            torch.testing.assert_close(changed.model(*asked), pipeline.model(*asked), rtol=1e-3, atol=1e-3)


def test_no_other_pair_of_the_rank_is_nearer():
    """The error said is the one made, and neither a small step nor a plain SVD of the weight does better."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(6, 10).double()
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64) * torch.tensor([5, 1, 1, 0.2, 0.1, 3]) + 2
    mean, spread = x.mean(0), torch.cov(x.T, correction=0)
    pair, error = fitted(linear, 2, mean, spread)

    @torch.no_grad()
    def wrong(pair):
        return (pair(x) - linear(x)).square().sum()

    best = wrong(pair)
    varying = (linear(x) - linear(x).mean(0)).square().sum()
    assert error == pytest.approx((best / varying).item())
    for parameter in pair.parameters():
        kept = parameter.detach().clone()
        for _ in range(5):
            with torch.no_grad():
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            assert wrong(pair) > best
            parameter.data.copy_(kept)
    u, s, v = torch.linalg.svd(linear.weight.detach())
    plain = LowRank(6, 10, 2).double()
    weight = u[:, :2] * s[:2] @ v[:2]
    plain.load_state_dict({"down.weight": v[:2], "up.weight": u[:, :2] * s[:2],
                           "up.bias": linear.bias + (linear.weight - weight) @ mean})
    assert wrong(plain) > best


def test_the_conditions_are_the_deployed_ones_and_the_null_class_counts_where_it_guides():
    pipeline = small_pipeline().replace(sampling=Sampling(steps=2, guidance=2.0, guidance_interval=(600, 1000)))
    mean, spread = met_by_adaln(pipeline)
    model = pipeline.model
    with torch.no_grad():
        met = {(t, y): model.t_embedder(torch.tensor([t])) + model.y_embedder(torch.tensor([y]))
               for t in (999, 499) for y in range(4)}
    weights = {(999, y): (3 if y == 3 else 1) / 12 for y in range(4)} | {(499, y): 1 / 8 for y in range(4)}
    expected = sum(weight * torch.nn.functional.silu(met[key][0]).double() for key, weight in weights.items())
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert torch.linalg.eigvalsh(spread).min() > -1e-6


def test_saves_bytes_and_can_be_quantized_weight_only(tmp_path):
    changed, witness = apply_once(LowRankAdaln(), small_pipeline(WIDE), tmp_path)
    assert witness["bytes_after"] < 0.85 * witness["bytes_before"]
    packed, told = apply_once(Quantize(activations="int8"), changed, tmp_path)
    pair = packed.model.blocks[0].adaLN_modulation[1]
    assert type(pair.down) is Int8WeightOnly and type(pair.up) is Int8WeightOnly
    assert told["layers"] == {"int8_dynamic": 8, "int8_weight_only": 4} and config_mismatch(packed.model) == ""


@pytest.mark.parametrize("options, most", [({"rank": 0.9}, 41), ({"rank": 0.7, "final": True}, 31)])
def test_a_rank_that_saves_nothing_is_refused_with_the_largest_that_does(options, most, tmp_path):
    with pytest.raises(Refused, match=f"at most rank {most} saves anything"):
        apply_once(LowRankAdaln(**options), small_pipeline(WIDE), tmp_path)
    outputs = 2 if "final" in options else 6
    assert most * (48 + outputs * 48) < outputs * 48 * 48 <= (most + 1) * (48 + outputs * 48)
    advised = LowRankAdaln(**{**options, "rank": int(1000 * most / 48) / 1000})
    assert apply_once(advised, small_pipeline(WIDE), tmp_path)[1]["rank"] == most


def test_twice_is_refused_and_packed_is_refused(tmp_path):
    once, _ = apply_once(LowRankAdaln(), small_pipeline(WIDE), tmp_path)
    with pytest.raises(Refused, match="2 are pairs already: choose the rank once"):
        apply_once(LowRankAdaln(), once, tmp_path)
    packed, _ = apply_once(Quantize(), small_pipeline(WIDE), tmp_path)
    with pytest.raises(Refused, match="10 layers are packed: put it before quantize"):
        apply_once(LowRankAdaln(), packed, tmp_path)


@pytest.mark.parametrize("rank", [0, -0.5, 1.5, True, float("nan")])
def test_a_rank_outside_its_range_is_refused_at_once(rank):
    with pytest.raises(ValueError, match="rank is a share of the width, above 0 up to 1"):
        LowRankAdaln(rank=rank)


@given(st.sampled_from(list(PRESETS)), st.floats(0.01, 0.6), st.booleans())
@settings(max_examples=6, deadline=None)
def test_any_rank_on_any_presets_twin_runs_and_reloads(size, rank, final):
    pipeline = Pipeline(DiT(twin(preset(f"{size}/4", input_size=(8, 8), classes=3))), Sampling(steps=2))
    changed, _ = rehearse(Recipe("thin", (LowRankAdaln(rank=rank, final=final),)), pipeline)
    assert config_mismatch(changed.model) == ""
    assert (changed.model.config.final_adaln_rank is not None) == final
    with tempfile.TemporaryDirectory() as folder:
        save(changed, Path(folder) / "model")
        again = load(str(Path(folder) / "model"))
    asked = torch.ones(2, 4, 8, 8), torch.tensor([7, 800]), torch.tensor([0, 3])
    assert torch.equal(again.model(*asked), changed.model(*asked))
    assert again.model.config == changed.model.config
