"""What the model promises: its config is the truth, any shape works, and bad configs are refused with a sentence."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.models.dit import (
    PATCHES,
    PRESETS,
    BlockConfig,
    DiT,
    DiTConfig,
    position_embedding,
    preset,
    preset_name,
    timestep_features,
    twin,
    uniform,
    unpatchify,
)
from slimdit.models.feedforward import gelu
from slimdit.sampling.seeds import seeded

UNEVEN = DiTConfig(input_size=(4, 12), channels=3, classes=5, patch=2, width=12,
                   blocks=(BlockConfig(2, 3, 10), BlockConfig(3, 4, 31), BlockConfig(1, 8, 7)), label_dropout=0.0)


def awake(config, seed=0):
    """A model whose every weight is random: as initialised, a DiT says 0 whatever it is asked."""
    model = DiT(config).eval()
    generator = seeded(seed, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def ask(model, batch=2, seed=0):
    config, generator = model.config, seeded(seed, "input")
    x = torch.randn(batch, config.channels, *config.input_size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    y = torch.randint(0, config.classes, (batch,), generator=generator)
    return x, t, y


configs = st.builds(
    DiTConfig,
    input_size=st.tuples(st.sampled_from([4, 8]), st.sampled_from([4, 12])),
    channels=st.integers(1, 4),
    classes=st.integers(1, 12),
    patch=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([4, 8, 20]),
    blocks=st.lists(st.builds(BlockConfig, heads=st.integers(1, 3), head_dim=st.integers(1, 5),
                              mlp_width=st.integers(1, 9)), max_size=3).map(tuple),
    learn_sigma=st.booleans(),
    label_dropout=st.sampled_from([0.0, 0.1]),
    frequency_shift=st.sampled_from([0, 1]),
    mlp_norm_eps=st.sampled_from([1e-6, 1e-5]),
)


@given(configs)
@settings(max_examples=30, deadline=None)
def test_the_config_is_the_truth(config):
    model = awake(config)
    x, t, y = ask(model)
    assert model(x, t, y).shape == (2, config.out_channels, *config.input_size)
    assert model(x, t, torch.full_like(y, config.label_rows - 1)).isfinite().all()
    again = DiT(DiTConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))))
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again.eval()(x, t, y), model(x, t, y))


def test_names_are_those_of_the_original():
    names = {name: tuple(tensor.shape) for name, tensor in DiT(UNEVEN).state_dict().items()}
    block = {"blocks.1.attn.qkv.weight": (36, 12), "blocks.1.attn.qkv.bias": (36,),
             "blocks.1.attn.proj.weight": (12, 12), "blocks.1.attn.proj.bias": (12,),
             "blocks.1.mlp.fc1.weight": (31, 12), "blocks.1.mlp.fc1.bias": (31,),
             "blocks.1.mlp.fc2.weight": (12, 31), "blocks.1.mlp.fc2.bias": (12,),
             "blocks.1.adaLN_modulation.1.weight": (72, 12), "blocks.1.adaLN_modulation.1.bias": (72,)}
    rest = {"x_embedder.proj.weight": (12, 3, 2, 2), "x_embedder.proj.bias": (12,), "pos_embed": (1, 12, 12),
            "t_embedder.mlp.0.weight": (12, 256), "t_embedder.mlp.0.bias": (12,),
            "t_embedder.mlp.2.weight": (12, 12), "t_embedder.mlp.2.bias": (12,),
            "y_embedder.embedding_table.weight": (5, 12),
            "final_layer.linear.weight": (24, 12), "final_layer.linear.bias": (24,),
            "final_layer.adaLN_modulation.1.weight": (24, 12), "final_layer.adaLN_modulation.1.bias": (24,)}
    assert {name: shape for name, shape in names.items() if not name.startswith("blocks.")} == rest
    assert {name: shape for name, shape in names.items() if name.startswith("blocks.1.")} == block
    assert names["blocks.0.attn.proj.weight"] == (12, 6) and names["blocks.2.attn.qkv.weight"] == (24, 12)


def test_a_new_model_says_nothing_and_learns_everywhere():
    model = DiT(UNEVEN)
    assert not model(*ask(model)).any()
    other = awake(UNEVEN)
    other(*ask(other)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for name, parameter in other.named_parameters())


def test_every_input_matters():
    model = awake(UNEVEN)
    x, t, y = ask(model)
    answer = model(x, t, y)
    for changed in (model(x + 0.1, t, y), model(x, t + 1, y), model(x, t, (y + 1) % 5)):
        assert (changed - answer).abs().max() > 1e-3
    torch.testing.assert_close(model(x, t.float(), y), answer)


def test_images_of_a_batch_do_not_see_each_other():
    model = awake(UNEVEN)
    x, t, y = ask(model, batch=5)
    for image in range(5):
        alone = model(x[image:image + 1], t[image:image + 1], y[image:image + 1])
        torch.testing.assert_close(alone[0], model(x, t, y)[image], atol=1e-5, rtol=1e-5)


def test_both_attention_forms_are_one_function():
    model = awake(UNEVEN)
    inputs = ask(model)
    fused = model(*inputs)
    model.use_attention("explicit")
    torch.testing.assert_close(model(*inputs), fused, atol=1e-5, rtol=1e-4)


def test_patches_go_back_where_they_came_from():
    """Cutting an image into patches by hand and putting the tokens together gives the image."""
    config = replace(UNEVEN, learn_sigma=False)
    image = torch.arange(3 * 4 * 12.0).view(1, 3, 4, 12)
    tokens = [image[0, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2].permute(1, 2, 0).flatten()
              for row in range(2) for column in range(6)]
    assert torch.equal(unpatchify(torch.stack(tokens)[None], config), image)


# Embeddings


def test_positions_are_sines_and_cosines_of_column_then_row():
    table = position_embedding((3, 5), 8)
    assert table.shape == (15, 8) and table.dtype == torch.float32
    for row in range(3):
        for column in range(5):
            place = table[row * 5 + column].tolist()
            expected = [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100),
                        math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
            assert place == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 12, 32]))
@settings(deadline=None)
def test_similarity_of_positions_depends_on_their_offset_only(rows, columns, width):
    """What makes it a position embedding, whatever the formula: <p, q> is a function of p - q."""
    table = position_embedding((rows, columns), width).double()
    similarity = (table @ table.T).view(rows, columns, rows, columns)
    torch.testing.assert_close(similarity[0, 0, 0, 0].item(), width / 2)
    torch.testing.assert_close(similarity[:-1, :, :-1], similarity[1:, :, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(similarity[:, :-1, :, :-1], similarity[:, 1:, :, 1:], atol=1e-5, rtol=0)
    assert len(torch.unique(table, dim=0)) == rows * columns


@pytest.mark.parametrize("shift, last", [(0, 10000 ** (-127 / 128)), (1, 1e-4)])
def test_timestep_features(shift, last):
    features = timestep_features(torch.tensor([0.0, 700.0]), shift)
    assert features.shape == (2, 256)
    assert features[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert features[1, 0].item() == pytest.approx(math.cos(700), abs=1e-5)
    assert features[1, 255].item() == pytest.approx(math.sin(700 * last), abs=1e-5)


def test_compiled_gelu_is_the_eager_one(monkeypatch):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])])
    eager = gelu(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gelu(x), eager, atol=1e-6, rtol=1e-6)


# Configs


@pytest.mark.parametrize("name", [f"{size}/{patch}" for size in PRESETS for patch in PATCHES])
def test_presets_know_their_names(name):
    config = preset(name, classes=10)
    assert preset_name(config) == name == preset_name(preset(f"DiT-{name}", classes=10))
    assert config.input_size == (32, 32) and config.channels == 4 and config.classes == 10
    assert preset_name(replace(config, blocks=config.blocks[1:])) is None


def test_presets_have_the_published_shapes():
    xl = preset("XL/2")
    assert (len(xl.blocks), xl.width, xl.tokens, xl.label_rows, xl.out_channels) == (28, 1152, 256, 1001, 8)
    assert xl.blocks[0] == BlockConfig(heads=16, head_dim=72, mlp_width=4608)


@given(configs)
@settings(max_examples=30, deadline=None)
def test_the_twin_keeps_what_recipes_look_at(config):
    small = twin(config)
    assert small.tokens == config.tokens and small.classes == config.classes
    assert [block.heads for block in small.blocks] == [block.heads for block in config.blocks]
    assert DiT(small)(*ask(DiT(small))).shape[1] == config.out_channels


def test_the_twin_is_tiny():
    small = twin(preset("XL/2"))
    assert sum(parameter.numel() for parameter in DiT(small).parameters()) < 3e6


def test_low_rank_adaln_has_its_names_begins_silent_and_shrinks_with_the_twin():
    block = BlockConfig(heads=2, head_dim=8, mlp_width=8, adaln_rank=4)
    config = replace(UNEVEN, width=16, blocks=(block, replace(block, adaln_rank=None)), final_adaln_rank=15)
    model = DiT(config)
    assert {name: tuple(tensor.shape) for name, tensor in model.blocks[0].adaLN_modulation.state_dict().items()} == {
        "1.down.weight": (4, 16), "1.up.weight": (96, 4), "1.up.bias": (96,)}
    assert model.blocks[0].adaLN_modulation(torch.randn(3, 16)).abs().max() == 0
    assert model.blocks[0].adaLN_modulation[1].down.weight.abs().max() > 0  # or nothing of the pair could learn
    small = twin(config)
    assert (small.width, [one.adaln_rank for one in small.blocks], small.final_adaln_rank) == (8, [2, None], 7)
    assert DiTConfig.from_dict(config.to_dict()) == config
    old = config.to_dict()
    del old["final_adaln_rank"], old["blocks"][1]["adaln_rank"]
    assert DiTConfig.from_dict(old) == replace(config, final_adaln_rank=None)


@pytest.mark.parametrize("change, sentence", [
    ({"channels": 0}, "channels must be a whole number above 0"),
    ({"classes": -1}, "classes must be a whole number above 0"),
    ({"width": 10}, "not a multiple of 4"),
    ({"width": 12.0}, "width must be a whole number"),
    ({"patch": True}, "patch must be a whole number"),
    ({"patch": 8}, "does not divide the input size"),
    ({"input_size": (4, 0)}, "input_size must be a whole number above 0"),
    ({"label_dropout": 1.5}, "label_dropout 1.5 is outside 0..1"),
    ({"final_adaln_rank": 0}, "final_adaln_rank must be a whole number above 0"),
    ({"final_adaln_rank": UNEVEN.width}, "is not below the width"),
    ({"blocks": (BlockConfig(2, 4, 8, adaln_rank=UNEVEN.width + 1),)}, "is not below the width"),
    ({"blocks": (BlockConfig(2, 4, 8, "mediated", mediators=UNEVEN.grid),)}, "tokens save nothing: use fewer"),
    ({"blocks": (BlockConfig(2, 4, 8, "mediated", mediators=(UNEVEN.grid[0] + 1, 1)),)}, "no more along a side than"),
])
def test_bad_configs_are_refused_with_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(UNEVEN, **change)


@pytest.mark.parametrize("block, sentence", [
    ({"heads": 0}, "heads must be a whole number above 0"),
    ({"head_dim": 1.5}, "head_dim must be a whole number above 0"),
    ({"attention": "softmx"}, "attention 'softmx' is unknown; use one of softmax"),
    ({"adaln_rank": 0}, "adaln_rank must be a whole number above 0"),
    ({"kv_heads": 0}, "kv_heads must be a whole number above 0"),
    ({"heads": 6, "kv_heads": 4}, "4 heads of keys and values do not divide 6 heads into groups"),
    ({"kv_heads": 2}, "2 heads of keys and values do not divide 2 heads into groups"),
    ({"conv": 4}, "conv is the side of the convolution, 3 or 5, not 4"),
    ({"mediators": (1, 2)}, r"mediators go with mediated attention .* this is softmax with \(1, 2\)"),
    ({"attention": "mediated"}, "this is mediated with None"),
    ({"attention": "mediated", "mediators": (1, 0)}, "mediators must be a whole number above 0"),
    ({"attention": "mediated", "mediators": (1, 2, 3)}, "mediators are rows and columns"),
])
def test_bad_blocks_are_refused_with_a_sentence(block, sentence):
    with pytest.raises(ValueError, match=sentence):
        BlockConfig(**{"heads": 2, "head_dim": 4, "mlp_width": 8, **block})


def test_blocks_of_every_attention_are_described_and_built_again():
    blocks = (BlockConfig(4, 4, 8), BlockConfig(4, 4, 8, "mediated", mediators=(1, 3), kv_heads=2),
              BlockConfig(4, 4, 8, "focused", conv=3, kv_heads=1), BlockConfig(4, 2, 8, conv=5))
    config = DiTConfig(input_size=(4, 24), channels=1, classes=3, patch=2, width=16, blocks=blocks)
    again = DiTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    model = DiT(again)
    assert model(torch.randn(2, 1, 4, 24), torch.tensor([3, 700]), torch.tensor([0, 3])).shape == (2, 2, 4, 24)
    model.use_attention("explicit")
    assert {block.attn.form for block in model.blocks} == {"explicit"}
    small = DiT(twin(config))
    assert [block.attn.kv_heads for block in small.blocks] == [4, 2, 1, 4]
    assert small.blocks[1].attn.mediators == (1, 3)


def test_other_refusals():
    with pytest.raises(ValueError, match="preset 'M/2' is unknown"):
        preset("M/2")
    with pytest.raises(ValueError, match="patch"):
        preset("S/3")
    with pytest.raises(ValueError, match="5 heads do not divide the width 12"):
        uniform(depth=1, width=12, heads=5, patch=2, input_size=(4, 4), channels=1, classes=2)
    described = UNEVEN.to_dict()
    with pytest.raises(ValueError, match=r"model config.*colour"):
        DiTConfig.from_dict({**described, "colour": 1})
    del described["blocks"]
    with pytest.raises(ValueError, match=r"model config.*blocks"):
        DiTConfig.from_dict(described)
