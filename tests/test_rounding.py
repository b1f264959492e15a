"""Ways to choose integers: each is closer than the nearest in what it is for, and all stay on the grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.models.rounding import INT4, INT8, NORM, Rounded, gptq, hqq, nearest

GRIDS = {"int8": (INT8, 96), "int4": (INT4, 32)}
seeds = st.integers(0, 10 ** 6)


def weights(seed=0, outside=24, inside=96):
    """Heavy-tailed weights: a few outliers in every row, as trained layers have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outside, inside, generator=generator)
    return 0.05 * weight * (1 + weight.abs() ** 2)


def correlated(seed=0, rows=400, inside=96):
    """Inputs that lie near a few directions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(12, inside, generator=generator)
    noise = 0.1 * torch.randn(rows, inside, generator=generator)
    return torch.randn(rows, 12, generator=generator) @ directions + noise


def distance(weight, rounded, p=NORM):
    return (weight - rounded.weight()).abs().double().pow(p).sum().item()


def output_error(weight, rounded, x):
    return ((x @ (weight - rounded.weight()).t()).norm() / (x @ weight.t()).norm()).item()


def on_grid(rounded, grid):
    return ((rounded.codes == rounded.codes.round()).all() and rounded.codes.min() >= grid.low
            and rounded.codes.max() <= grid.high and torch.equal(rounded.scale, rounded.scale.to(grid.scale).float())
            and torch.equal(rounded.zero, rounded.zero.to(grid.zero).float()))


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from(sorted(GRIDS)))
def test_every_way_stays_on_the_grid(seed, name):
    grid, group = GRIDS[name]
    weight, x = weights(seed), correlated(seed)
    ways = [nearest(weight, grid, group), gptq(weight, x.t() @ x, grid, group)]
    for rounded in ways + ([] if grid.symmetric else [hqq(weight, grid, group)]):
        assert on_grid(rounded, grid)
        assert rounded.codes.shape == weight.shape and rounded.scale.shape == rounded.zero.shape == (24, 96 // group)


def test_nearest_int8_is_what_int8_layers_do():
    from slimdit.models.linear import quantize_rows

    weight = weights()
    codes, scale = quantize_rows(weight)
    rounded = nearest(weight, INT8, 96)
    assert torch.equal(rounded.codes, codes.float()) and torch.equal(rounded.scale, scale)
    assert (rounded.zero == 0).all()


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_weights_on_the_grid_are_their_own_nearest(seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (5, 64), generator=generator).float()
    codes.view(5, 2, 32)[:, :, 0], codes.view(5, 2, 32)[:, :, 1] = 0, 15  # the whole range, as fitted
    scale = torch.rand(5, 2, generator=generator).add(0.01).bfloat16().float()
    zero = torch.randint(0, 16, (5, 2), generator=generator).float()
    weight = Rounded(codes, scale, zero).weight()
    again = nearest(weight, INT4, 32)
    assert torch.equal(again.codes, codes) and torch.equal(again.scale, scale) and torch.equal(again.zero, zero)
    assert torch.equal(again.weight(), weight)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_hqq_is_never_further_than_nearest_in_its_norm(seed):
    weight = weights(seed)
    for group in (96, 24):
        moved, plain = hqq(weight, INT4, group), nearest(weight, INT4, group)
        assert distance(weight, moved) <= distance(weight, plain) * (1 + 1e-6)
    assert distance(weight, hqq(weight, INT4, 24)) < 0.98 * distance(weight, nearest(weight, INT4, 24))


def test_hqq_has_no_zero_to_move_on_a_symmetric_grid():
    with pytest.raises(ValueError, match="use nearest or gptq"):
        hqq(weights(), INT8, 96)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_gptq_keeps_the_output_closer_than_nearest_on_correlated_inputs(name, seed):
    grid, group = GRIDS[name]
    weight, x, unseen = weights(seed), correlated(seed)[:200], correlated(seed)[200:]
    moved, plain = gptq(weight, x.t() @ x, grid, group), nearest(weight, grid, group)
    assert output_error(weight, moved, unseen) < 0.6 * output_error(weight, plain, unseen)
    assert distance(weight, moved, 2) > distance(weight, plain, 2)  # it is not by closer weights


@pytest.mark.parametrize("group", [96, 32, 48])
def test_gptq_on_uncorrelated_inputs_is_nearest(group):
    """With nothing to make up for elsewhere, each column is on its own: a check of the arithmetic."""
    weight = weights()
    rounded, plain = gptq(weight, torch.eye(96), INT4, group), nearest(weight, INT4, group)
    assert torch.equal(rounded.codes, plain.codes) and torch.equal(rounded.scale, plain.scale)


def test_gptq_is_the_same_whatever_the_number_of_columns_between_updates(monkeypatch):
    weight, x = weights(), correlated()
    whole = gptq(weight, x.t() @ x, INT4, 32)
    for columns in (1, 20, 32, 50):  # groups begin, end and lie across the blocks
        monkeypatch.setattr("slimdit.models.rounding.COLUMNS", columns)
        parts = gptq(weight, x.t() @ x, INT4, 32)
        assert (parts.codes != whole.codes).float().mean() < 0.01  # a tie may fall the other way
        torch.testing.assert_close(parts.scale, whole.scale, rtol=0.01, atol=0)


def test_gptq_survives_silent_inputs_and_fewer_inputs_than_channels():
    weight, x = weights(), correlated(rows=5)
    x[:, 7] = 0
    rounded = gptq(weight, x.t() @ x, INT4, 32)
    assert on_grid(rounded, INT4) and rounded.weight().isfinite().all()
    assert on_grid(gptq(weight, torch.zeros(96, 96), INT4, 32), INT4)


@pytest.mark.parametrize("name", GRIDS)
def test_groups_of_zeros_stay_zeros(name):
    grid, group = GRIDS[name]
    weight, x = weights(), correlated()
    weight[3] = 0
    for rounded in (nearest(weight, grid, group), gptq(weight, x.t() @ x, grid, group)):
        assert (rounded.weight()[3] == 0).all() and rounded.weight().isfinite().all()
