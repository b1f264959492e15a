"""What a new attention keeps of the trained one: everything where nothing is lost, else as much as goes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.models.attention import SoftmaxAttention
from slimdit.models.dit import BlockConfig
from slimdit.models.inherited import inherited, narrowed, parts

WIDTH, HEADS, HEAD_DIM, GRID = 12, 4, 6, (3, 5)
PLAIN = BlockConfig(HEADS, HEAD_DIM, 8)


def trained():
    torch.manual_seed(0)
    attention = SoftmaxAttention(WIDTH, HEADS, HEAD_DIM).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


def tokens(images=40):
    """Tokens of unlike channels and a mean that is not zero, as attention is given them, and both statistics."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 15, WIDTH, generator=generator) * torch.linspace(0.2, 1.5, WIDTH)
    x = x + torch.randn(WIDTH, generator=generator)
    flat = x.flatten(0, 1).double()
    return x, flat.mean(0), torch.cov(flat.T, correction=0)


@torch.no_grad()
def error(attention, old, x):
    return ((attention(x) - old(x)).square().sum() / (old(x) - old(x).mean((0, 1))).square().sum()).item()


@pytest.mark.parametrize("options", [{}, {"conv": 5}])
@torch.no_grad()
def test_the_same_kind_is_the_same_to_the_bit(options):
    old, (x, *_) = trained(), tokens()
    new = inherited(old, BlockConfig(HEADS, HEAD_DIM, 8, **options), GRID)
    assert torch.equal(new(x), old(x)) and not new.training


@pytest.mark.parametrize("kv_heads", [1, 2])
@torch.no_grad()
def test_shared_heads_are_means_and_exact_where_heads_were_alike(kv_heads):
    old, (x, *_) = trained(), tokens()
    block = BlockConfig(HEADS, HEAD_DIM, 8, kv_heads=kv_heads)
    q, k, v = parts(old)
    new_q, new_k, new_v = parts(inherited(old, block, GRID))
    assert torch.equal(new_q, q)
    for mean, part in ((new_k, k), (new_v, v)):
        torch.testing.assert_close(mean, part.view(kv_heads, HEADS // kv_heads, *part.shape[1:]).mean(1))
    assert error(inherited(old, block, GRID), old, x) > 1e-3
    rows = old.qkv.weight.view(3, kv_heads, HEADS // kv_heads, HEAD_DIM, WIDTH)[1:]
    bias = old.qkv.bias.view(3, kv_heads, HEADS // kv_heads, HEAD_DIM)[1:]
    rows.copy_(rows[:, :, :1].clone().expand_as(rows))
    bias.copy_(bias[:, :, :1].clone().expand_as(bias))
    assert error(inherited(old, block, GRID), old, x) < 1e-9


@torch.no_grad()
def test_linear_kinds_inherit_every_projection():
    old = trained()
    for options in ({"attention": "focused"}, {"attention": "mediated", "mediators": (1, 2)}):
        state = inherited(old, BlockConfig(HEADS, HEAD_DIM, 8, **options), GRID).state_dict()
        assert state.keys() == old.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in old.state_dict().items())


@torch.no_grad()
def test_narrower_heads_are_exact_where_scores_and_answers_had_that_rank():
    old, (x, mean, spread) = trained(), tokens()
    turn = torch.linalg.qr(torch.randn(HEADS, HEAD_DIM, HEAD_DIM))[0][:, :2]  # two directions of each head are left
    for part in (0, 2):
        rows = old.qkv.weight.view(3, HEADS, HEAD_DIM, WIDTH)[part]
        rows.copy_(turn.mT @ turn @ rows)
        bias = old.qkv.bias.view(3, HEADS, HEAD_DIM)[part]
        bias.copy_((turn.mT @ turn @ bias[..., None])[..., 0])
    assert error(narrowed(old, BlockConfig(HEADS, 2, 8), GRID, mean, spread), old, x) < 1e-8
    assert error(narrowed(old, BlockConfig(HEADS, 1, 8), GRID, mean, spread), old, x) > 1e-2


@torch.no_grad()
def test_narrower_heads_err_less_than_heads_cut_off_and_less_the_wider_they_are():
    old, (x, mean, spread) = trained(), tokens()
    errors = [error(narrowed(old, BlockConfig(HEADS, kept, 8), GRID, mean, spread), old, x) for kept in range(1, 6)]
    assert errors == sorted(errors, reverse=True)
    cut = SoftmaxAttention(WIDTH, HEADS, 3)
    cut.qkv.weight.copy_(old.qkv.weight.view(3 * HEADS, HEAD_DIM, WIDTH)[:, :3].flatten(0, 1))
    cut.qkv.bias.copy_(old.qkv.bias.view(3 * HEADS, HEAD_DIM)[:, :3].flatten())
    cut.proj.weight.copy_(old.proj.weight.view(WIDTH, HEADS, HEAD_DIM)[..., :3].flatten(1))
    cut.proj.bias.copy_(old.proj.bias)
    assert errors[2] < 0.5 * error(cut, old, x)


@given(st.integers(0, 2 ** 16), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_scores_of_narrower_heads_are_the_nearest_of_their_rank(seed, kept):
    """No other pair of projections comes nearer to the scores, less what is the same for all keys."""
    old, (x, mean, spread) = trained(), tokens()
    new = narrowed(old, BlockConfig(HEADS, kept, 8), GRID, mean, spread)
    rows = torch.cat([x.flatten(0, 1), torch.ones(600, 1)], dim=1).double()

    def scores(attention, q, k):
        centred = rows - rows.mean(0)
        return (q.double() @ rows.T).mT @ (k.double() @ centred.T) / attention.head_dim ** 0.5  # (heads, 600, 600)

    q, k, _ = parts(new)
    expected = scores(old, *parts(old)[:2])
    best = (scores(new, q, k) - expected).square().sum()
    generator = torch.Generator().manual_seed(seed)
    moved = [part + 1e-3 * torch.randn(part.shape, generator=generator) for part in (q, k)]
    assert (scores(new, *moved) - expected).square().sum() > best
