"""What computed costs promise: parts add up, a run counts its steps and guidance, files are weighed as they lie."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimdit.metrics.cost import file_bytes, macs, parameters, run_macs
from slimdit.models.dit import BlockConfig, DiT, uniform
from slimdit.sampling.process import NoiseProcess
from slimdit.sampling.solvers import Sampling

CONFIG = uniform(depth=3, width=16, heads=2, patch=2, input_size=(8, 4), channels=3, classes=7)


def test_parts_by_hand():
    counted = macs(CONFIG)
    tokens, width = 8, 16
    assert counted.embedding == tokens * 12 * width
    assert counted.condition == 256 * 16 + 16 * 16
    assert counted.modulation == 3 * 16 * 96 + 16 * 32
    assert counted.attention_linears == 3 * tokens * (16 * 48 + 16 * 16)
    assert counted.attention_mixing == 3 * 2 * tokens * tokens * width
    assert counted.mlp == 3 * tokens * 2 * 16 * 64
    assert counted.output == tokens * 16 * 24
    assert counted.total == sum(getattr(counted, field.name) for field in fields(counted))
    assert counted.flops == 2 * counted.total


def test_a_block_removed_is_a_block_saved():
    whole, cut = macs(CONFIG), macs(replace(CONFIG, blocks=CONFIG.blocks[:2]))
    block = whole.mlp // 3 + whole.attention_linears // 3 + whole.attention_mixing // 3 + 16 * 96
    assert whole.total - cut.total == block


def test_blocks_may_differ():
    narrow = replace(CONFIG, blocks=(BlockConfig(1, 8, 10), *CONFIG.blocks[1:]))
    assert macs(CONFIG).mlp - macs(narrow).mlp == 8 * 2 * 16 * (64 - 10)
    assert macs(CONFIG).attention_mixing - macs(narrow).attention_mixing == 2 * 64 * (16 - 8)


def test_a_pair_in_adaln_is_counted_as_its_two_layers():
    block = replace(CONFIG.blocks[0], adaln_rank=5)
    thin = replace(CONFIG, blocks=(block, *CONFIG.blocks[1:]), final_adaln_rank=3)
    assert macs(thin).modulation == 5 * (16 + 96) + 2 * 16 * 96 + 3 * (16 + 32)
    assert macs(replace(thin, blocks=CONFIG.blocks)).total - macs(thin).total == 16 * 96 - 5 * (16 + 96)
    assert parameters(CONFIG) - parameters(thin) == 16 * 96 - 5 * (16 + 96) + 16 * 32 - 3 * (16 + 32)


def test_every_attention_by_hand():
    """8 tokens of width 16, 2 heads of 8."""
    def counted(**options):
        one = macs(replace(CONFIG, blocks=(BlockConfig(2, 8, 64, **options),)))
        return one.attention_linears, one.attention_mixing

    softmax, convolution = 2 * 8 * 8 * 16, 8 * 9 * 16
    assert counted() == (8 * 16 * 64, softmax)
    assert counted(conv=3) == (8 * 16 * 64, softmax + convolution)
    assert counted(kv_heads=1) == (8 * 16 * (16 + 8 + 8 + 16), softmax)
    assert counted(kv_heads=1, conv=3) == (8 * 16 * 48, softmax + convolution // 2)
    assert counted(attention="mediated", mediators=(3, 1)) == (8 * 16 * 64, 4 * 3 * 8 * 16)
    assert counted(attention="focused") == (8 * 16 * 64, 8 * 2 * (8 * 8 + 8 * 8 + 8))
    assert counted(attention="focused", kv_heads=1) == (8 * 16 * 48, 8 * (8 * 8 + 2 * (8 * 8 + 8)))


def test_linear_attention_costs_a_token_the_same_however_many_there_are():
    def a_token(side, **options):
        config = replace(CONFIG, input_size=(side, side), blocks=(BlockConfig(2, 8, 64, **options),))
        return macs(config).attention_mixing / config.tokens

    for linear in ({"attention": "focused", "conv": 5}, {"attention": "mediated", "mediators": (2, 2)}):
        assert a_token(8, **linear) == a_token(32, **linear)
    assert a_token(32) == 16 * a_token(8)


def test_unknown_attention_is_refused_not_guessed():
    block = replace(CONFIG.blocks[0])
    object.__setattr__(block, "attention", "novel")
    with pytest.raises(ValueError, match="attention 'novel' has no MAC count"):
        macs(replace(CONFIG, blocks=(block,)))


@given(st.integers(2, 60), st.floats(1.1, 9))
def test_a_run_is_its_steps_and_guidance_doubles_it(steps, guidance):
    once = macs(CONFIG).total
    assert run_macs(CONFIG, NoiseProcess(), Sampling(steps=steps)) == steps * once
    assert run_macs(CONFIG, NoiseProcess(), Sampling(steps=steps, guidance=guidance)) == 2 * steps * once


def test_an_interval_of_guidance_costs_what_it_covers():
    sampling = Sampling(steps=4, guidance=2.0, guidance_interval=(400, 800))  # 999, 749, 499, 249
    assert run_macs(CONFIG, NoiseProcess(), sampling) == 6 * macs(CONFIG).total


def test_parameters_are_the_models():
    model = DiT(CONFIG)
    assert parameters(CONFIG) == sum(tensor.numel() for tensor in model.state_dict().values())
    assert parameters(replace(CONFIG, linears={"blocks.0.mlp.fc1": "int8_weight_only"})) == parameters(CONFIG)


def test_file_bytes(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "part" / "more.safetensors").write_bytes(b"x" * 24)
    (tmp_path / "config.json").write_text("{}")
    assert file_bytes(tmp_path) == 1024
    assert file_bytes(tmp_path / "model.safetensors") == 1000
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        file_bytes(tmp_path / "nothing")
