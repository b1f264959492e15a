"""What each kind of attention promises: it is its naive definition on any grid, and stays among the values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimdit.models.attention import (
    TINY,
    FocusedAttention,
    MediatedAttention,
    SoftmaxAttention,
    focused,
    is_plain,
    over_grid,
)

WIDTH, HEADS, HEAD_DIM = 12, 4, 6
GRIDS = [(4, 4), (3, 5), (1, 7), (6, 2)]
BUILD = {
    "softmax": SoftmaxAttention,
    "focused": FocusedAttention,
    "mediated": lambda *sizes, **options: MediatedAttention(*sizes, mediators=(1, 2), **options),
}


def built(kind, grid=(3, 5), **options):
    layer = BUILD[kind](WIDTH, HEADS, HEAD_DIM, grid=grid, **options).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return layer


def given_tokens(grid, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, grid[0] * grid[1], WIDTH, generator=generator, dtype=torch.float64)


def heads_of(layer, x):
    """q, k and v of the heads one by one, shared ones repeated: lists of (tokens, head_dim), for one image."""
    rows = layer.qkv(x).split(HEAD_DIM, dim=-1)
    group, shared = HEADS // layer.kv_heads, layer.kv_heads
    q, k, v = rows[:HEADS], rows[HEADS:HEADS + shared], rows[HEADS + shared:]
    return q, [k[head // group] for head in range(HEADS)], [v[head // group] for head in range(HEADS)]


def pooled(q, grid, cells):
    """Averages of q over the cells of a grid, cell by cell as adaptive pooling cuts them."""
    def edges(size, parts, part):
        return part * size // parts, -(-(part + 1) * size // parts)

    image, found = q.view(*grid, -1), []
    for row in range(cells[0]):
        for column in range(cells[1]):
            (top, bottom), (left, right) = edges(grid[0], cells[0], row), edges(grid[1], cells[1], column)
            found.append(image[top:bottom, left:right].mean((0, 1)))
    return torch.stack(found)


def shares(layer, q, k, grid):
    """The weight of every token in the answer to every token, for one head: (tokens, tokens)."""
    def softmax(a, b):
        return torch.softmax(a @ b.T / HEAD_DIM ** 0.5, dim=-1)

    if type(layer) is SoftmaxAttention:
        return softmax(q, k)
    if type(layer) is MediatedAttention:
        mediators = pooled(q, grid, layer.mediators)
        return softmax(q, mediators) @ softmax(mediators, k)
    products = focused(q) @ focused(k).T
    return products / (products.sum(-1, keepdim=True) + len(k) * TINY)


def near(conv, head, v, grid):
    """The convolution of a head's values by loops over the kernel, outside being zero."""
    side = conv.weight.shape[-1]
    channels = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    kernel, image = conv.weight[channels, 0], v.view(*grid, HEAD_DIM)
    answer = conv.bias[channels].expand(*grid, HEAD_DIM).clone()
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(side):
                for j in range(side):
                    other = row + i - side // 2, column + j - side // 2
                    if 0 <= other[0] < grid[0] and 0 <= other[1] < grid[1]:
                        answer[row, column] += kernel[:, i, j] * image[other]
    return answer.view(-1, HEAD_DIM)


def naive(layer, x, grid):
    """The layer's answer for one image, head by head and with the matrix of all weights."""
    answers = []
    for head, (q, k, v) in enumerate(zip(*heads_of(layer, x), strict=True)):
        answer = shares(layer, q, k, grid) @ v
        if layer.conv is not None:
            answer = answer + near(layer.conv, head // (HEADS // layer.kv_heads), v, grid)
        answers.append(answer)
    return layer.proj(torch.cat(answers, dim=-1))


@pytest.mark.parametrize("form", ["fused", "explicit"])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"kv_heads": 1, "conv": 3}, {"conv": 5}], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", BUILD)
@torch.no_grad()
def test_is_its_naive_definition(kind, grid, options, form):
    layer, x = built(kind, grid, **options), given_tokens(grid)
    layer.form = form
    torch.testing.assert_close(layer(x), torch.stack([naive(layer, image, grid) for image in x]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BUILD)
@given(st.sampled_from(GRIDS), st.sampled_from([None, 1, 2]), st.integers(0, 2 ** 16))
@settings(max_examples=10, deadline=None)
def test_answers_lie_among_the_values(kind, grid, kv_heads, seed):
    """Weights are never negative and sum to 1 (what focused attention sees nothing of is 0), however many tokens."""
    layer = built(kind, grid, kv_heads=kv_heads)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, grid[0] * grid[1], HEAD_DIM, generator=generator, dtype=torch.float64)
               for heads in (HEADS, layer.kv_heads, layer.kv_heads))
    values = v.repeat_interleave(HEADS // layer.kv_heads, 1)
    if kind == "focused":
        values = torch.cat([values, torch.zeros_like(values[:, :, :1])], dim=2)
    mixed = layer.mix(q, k, v)
    assert (mixed <= values.amax(2, keepdim=True) + 1e-9).all()
    assert (mixed >= values.amin(2, keepdim=True) - 1e-9).all()


@torch.no_grad()
def test_focused_attention_does_not_grow_with_the_number_of_tokens():
    """Every token twice: the same answers. Without the denominator they would double."""
    short, long = built("focused", (3, 5)), built("focused", (6, 5))
    long.load_state_dict(short.state_dict())
    x = given_tokens((3, 5))
    torch.testing.assert_close(long(torch.cat([x, x], dim=1))[:, :15], short(x))


@given(st.integers(0, 2 ** 16), st.floats(1e-2, 1e3))
@settings(max_examples=20, deadline=None)
def test_focusing_keeps_each_tokens_length_and_sharpens_its_direction(seed, size):
    x = size * torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0] = -x[0].abs()  # nothing is left of this one
    turned, positive = focused(x), torch.relu(x)
    assert (turned >= 0).all() and (turned[0] == 0).all()
    torch.testing.assert_close(turned.norm(dim=-1), positive.norm(dim=-1), rtol=1e-3, atol=1e-3)
    share = positive.amax(-1) / positive.norm(dim=-1).clamp(min=1e-9)
    assert (turned.amax(-1) / turned.norm(dim=-1).clamp(min=1e-9) >= share - 1e-3).all()


@torch.no_grad()
def test_gradients_are_finite_where_focused_attention_sees_nothing():
    layer = built("focused").float()
    x = torch.zeros(1, 15, WIDTH)
    layer.qkv.bias.fill_(-1)
    with torch.enable_grad():
        layer(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BUILD)
@torch.no_grad()
def test_low_precision_is_near(kind, dtype):
    layer, x = built(kind, (8, 8), conv=3), given_tokens((8, 8))
    expected = layer(x)
    answer = layer.to(dtype)(x.to(dtype)).double()
    assert (answer - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind, options", [("softmax", {"conv": 3}), ("softmax", {"kv_heads": 2}), ("mediated", {}),
                                           ("focused", {})], ids=str)
@torch.no_grad()
def test_the_kernel_for_plain_softmax_is_not_asked_for_others(kind, options):
    layer, x = built(kind, (4, 4), **options).bfloat16(), given_tokens((4, 4)).bfloat16()
    expected = layer(x)
    layer.form = "native"
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", BUILD)
@torch.no_grad()
def test_a_new_convolution_changes_no_bit(kind):
    layer = built(kind)
    with_conv = BUILD[kind](WIDTH, HEADS, HEAD_DIM, grid=(3, 5), conv=3).double()
    assert with_conv.load_state_dict(layer.state_dict(), strict=False).missing_keys == ["conv.weight", "conv.bias"]
    x = given_tokens((3, 5))
    assert torch.equal(with_conv(x), layer(x))
    with torch.enable_grad():
        with_conv(x).square().sum().backward()
    assert with_conv.conv.weight.grad.abs().sum() > 0  # and it can learn


def test_plain_is_softmax_with_nothing_else():
    assert is_plain(built("softmax"))
    others = built("softmax", conv=3), built("softmax", kv_heads=2), built("mediated"), built("focused"), nn.Identity()
    assert not any(is_plain(layer) for layer in others)


def test_a_grid_is_asked_for_where_it_is_needed():
    layer = SoftmaxAttention(WIDTH, HEADS, HEAD_DIM, conv=3)
    with pytest.raises(ValueError, match="need to know the grid of tokens: name it"):
        layer(torch.zeros(1, 15, WIDTH))


@torch.no_grad()
def test_rows_of_the_grid_come_first():
    x = torch.arange(6.0).view(1, 1, 6, 1)
    assert over_grid(lambda image: image[:, :, :1], x, (2, 3)).flatten().tolist() == [0, 1, 2]
