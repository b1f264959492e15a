"""What cutting a model promises: what stays computes what it did, and the config says what is left."""

import copy

import pytest
import torch

from slimdit.models.dit import DiT, uniform
from slimdit.models.linear import LowRank
from slimdit.models.surgery import (
    enlarge_patch,
    even_blocks,
    keep_blocks,
    keep_heads,
    keep_units,
    pack_linears,
    put_modulation,
)
from slimdit.recipe import config_mismatch

CONFIG = uniform(depth=3, width=16, heads=4, patch=2, input_size=(8, 4), channels=1, classes=3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DiT(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def answer(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(2, 1, 8, 4, generator=generator), torch.tensor([3, 900]), torch.tensor([0, 3]))


def test_units_that_are_silent_can_go_without_a_difference(model):
    gone = [0, 7, 63]
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, gone] = 0
    before = answer(model)
    keep_units(model, 1, [unit for unit in range(64) if unit not in gone])
    torch.testing.assert_close(answer(model), before, rtol=1e-5, atol=1e-5)
    assert [block.mlp_width for block in model.config.blocks] == [64, 61, 64] and config_mismatch(model) == ""


def test_heads_that_are_silent_can_go_without_a_difference(model):
    with torch.no_grad():
        model.blocks[2].attn.proj.weight[:, 4:8] = 0  # head 1 of four, 4 wide
    before = answer(model)
    keep_heads(model, 2, [0, 2, 3])
    torch.testing.assert_close(answer(model), before, rtol=1e-5, atol=1e-5)
    assert [block.heads for block in model.config.blocks] == [4, 4, 3] and config_mismatch(model) == ""


def test_a_head_that_speaks_is_missed(model):
    before = answer(model)
    keep_heads(model, 2, [0, 2, 3])
    assert (answer(model) - before).abs().max() > 1e-3


def test_blocks_that_are_silent_can_go_without_a_difference(model):
    with torch.no_grad():
        model.blocks[1].adaLN_modulation[1].weight.zero_()
        model.blocks[1].adaLN_modulation[1].bias.zero_()
    before = answer(model)
    keep_blocks(model, [0, 2])
    assert torch.equal(answer(model), before)
    assert len(model.config.blocks) == 2 and config_mismatch(model) == ""


def pooled(tokens, grid, times):
    """The mean of every square of `times` x `times` tokens, written out: (batch, tokens / times^2, width)."""
    rows, columns = grid
    table = tokens.view(len(tokens), rows, columns, -1)
    return torch.stack([table[:, row:row + times, column:column + times].mean((1, 2))
                        for row in range(0, rows, times) for column in range(0, columns, times)], dim=1)


@pytest.mark.parametrize("patch", [2, 4])
def test_a_token_of_a_larger_patch_is_the_mean_of_those_it_replaces(model, patch):
    x = torch.randn(2, 1, 8, 4)
    small = model.x_embedder(x)
    enlarge_patch(model, patch)
    torch.testing.assert_close(model.x_embedder(x), pooled(small, (4, 2), patch // 2))
    assert torch.equal(model.pos_embed, DiT(model.config).pos_embed)
    assert model.config.patch == patch and config_mismatch(model) == ""


def test_a_larger_patch_answers_as_before_where_its_small_patches_are_alike(model):
    """Equal tokens count once in softmax attention, however many there are: nothing else may have changed."""
    patches = torch.randn(2, 1, 2, 1, 2, 1, 1, 2)  # image, channel, (square, patch, pixel) of rows and of columns
    x = patches.expand(2, 1, 2, 2, 2, 1, 2, 2).reshape(2, 1, 8, 4)
    t, y = torch.tensor([3, 900]), torch.tensor([0, 3])
    before = copy.deepcopy(model)
    enlarge_patch(model, 4)
    positions = model.pos_embed.view(1, 2, 1, 1, 1, 16)  # of a grid of 2 x 1
    before.pos_embed = positions.expand(1, 2, 2, 1, 2, 16).reshape(1, 8, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), before(x, t, y), rtol=1e-4, atol=1e-4)
        x = torch.randn(2, 1, 8, 4)
        assert (model(x, t, y) - before(x, t, y)).abs().max() > 1e-2


@pytest.mark.parametrize("patch, sentence", [(3, "no multiple of the model's 2"), (1, "no multiple of the model's 2"),
                                             (0, "no multiple"), (8, "patch 8 does not divide the input size")])
def test_a_patch_that_does_not_fit_is_refused(model, patch, sentence):
    with pytest.raises(ValueError, match=sentence):
        enlarge_patch(model, patch)
    assert config_mismatch(model) == ""


def test_even_blocks_have_both_ends():
    assert (even_blocks(6, 3), even_blocks(6, 6), even_blocks(6, 1)) == ([0, 3, 5], [*range(6)], [0])
    assert all(chosen[0] == 0 and chosen[-1] == 11 and len(set(chosen)) == keep
               for keep in range(2, 13) for chosen in [even_blocks(12, keep)])


@pytest.mark.parametrize("block", [0, None])
def test_a_pair_of_the_layers_own_product_stands_for_it(model, block):
    owner = model.final_layer if block is None else model.blocks[block]
    outputs = owner.adaLN_modulation[1].out_features
    pair = LowRank(16, outputs, 5)
    torch.nn.init.normal_(pair.up.bias)
    with torch.no_grad():
        owner.adaLN_modulation[1].weight.copy_(pair.up.weight @ pair.down.weight)
        owner.adaLN_modulation[1].bias.copy_(pair.up.bias)
    before = answer(model)
    put_modulation(model, block, pair)
    torch.testing.assert_close(answer(model), before, rtol=1e-5, atol=1e-5)
    assert config_mismatch(model) == ""
    ranks = [block.adaln_rank for block in model.config.blocks], model.config.final_adaln_rank
    assert ranks == (([None] * 3, 5) if block is None else ([5, None, None], None))


@pytest.mark.parametrize("cut, numbers", [(keep_units, []), (keep_units, [64]), (keep_units, [1, 0]),
                                          (keep_units, [-1]), (keep_heads, [2, 2]), (keep_heads, [4])])
def test_numbers_out_of_range_or_order_are_refused(model, cut, numbers):
    with pytest.raises(ValueError, match=r"block 0: .* to keep must be at least one of 0\.\."):
        cut(model, 0, numbers)


def test_no_block_cannot_be_kept(model):
    with pytest.raises(ValueError, match=r"blocks to keep must be at least one of 0\.\.2"):
        keep_blocks(model, [])


def test_a_pair_of_other_sizes_is_refused(model):
    with pytest.raises(ValueError, match="from 16 to 32 features cannot stand for"):
        put_modulation(model, 0, LowRank(16, 32, 4))


def test_packed_layers_are_refused(model):
    pack_linears(model, {"blocks.2.mlp.fc1": "int8_weight_only"})
    for cut in (lambda: keep_units(model, 0, [0]), lambda: keep_heads(model, 0, [0]), lambda: keep_blocks(model, [0]),
                lambda: put_modulation(model, 0, LowRank(16, 96, 4)), lambda: enlarge_patch(model, 4)):
        with pytest.raises(ValueError, match="1 layers are packed integers: cut the float model"):
            cut()
    assert config_mismatch(model) == ""
