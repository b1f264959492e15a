"""Weights without their zeros: the same tensors to the bit, fewer bytes, and hostile files end in a sentence."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slimdit import formats
from slimdit.formats import FormatError, sparse
from slimdit.formats.sparse import decode, encode, pack, sparse_bytes, stored_bytes
from slimdit.models.dit import DiT, uniform
from slimdit.models.surgery import zero_weights
from slimdit.pipeline import Pipeline

QKV = "blocks.0.attn.qkv.weight"


def pruned(share: float = 0.5) -> Pipeline:
    """A model whose block linears have a share of zeros at random places."""
    torch.manual_seed(0)
    model = DiT(uniform(depth=2, width=32, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
              and name.startswith("blocks")]
    zero_weights(model, {name: torch.rand(model.get_submodule(name).weight.shape) < share for name in layers})
    return Pipeline(model)


@pytest.fixture
def folder(tmp_path):
    formats.save(pruned(), tmp_path / "model")
    return tmp_path / "model"


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]))
def test_what_is_encoded_comes_back_to_the_bit(rows, columns, share, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = (100 * torch.randn(rows, columns, generator=generator)).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) < share] = 0
    mask, values = encode(weight)
    assert mask.numel() + values.numel() * values.element_size() == sparse_bytes(weight)
    assert torch.equal(decode(mask, values, weight.shape, "here"), weight)


def test_negative_zero_is_kept_and_a_bit_is_the_weight_of_its_place():
    weight = torch.tensor([[0.0, -0.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 7.0]])
    mask, values = encode(weight)
    assert mask.tolist() == [0b00000110, 0b1] and values.tolist() == [0.0, 3.0, 7.0]
    assert torch.equal(torch.signbit(decode(mask, values, weight.shape, "here")), torch.signbit(weight))


def test_a_weight_is_stored_sparse_only_where_that_saves_bytes():
    weight = torch.ones(64, 64)
    weight.view(-1)[:192] = 0  # 1 zero in 32 pays for the mask, 64 more for the second entry of the header
    assert pack({"a.weight": weight})[1] == []
    weight.view(-1)[192] = 0
    packed, names = pack({"a.weight": weight, "a.bias": torch.zeros(4096), "pos_embed": torch.zeros(1, 64, 64)})
    assert names == ["a.weight"] and set(packed) == {"a.weight.mask", "a.weight.values", "a.bias", "pos_embed"}
    assert stored_bytes({"a.weight": weight}) == 512 + 4 * (4096 - 193)


def test_a_pruned_model_saves_smaller_and_reloads_to_the_bit(folder, tmp_path):
    pipeline = pruned()
    formats.save(pruned(0), tmp_path / "dense")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "dense")]
    assert sizes[0] < 0.72 * sizes[1]  # the embedders and biases stay whole
    assert abs(sizes[0] - stored_bytes(pipeline.model.state_dict())) < 0.1 * sizes[0]
    config = json.loads((folder / "config.json").read_text())
    assert QKV in config["sparse"] and len(config["sparse"]) == 10
    assert "sparse" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = formats.load(folder)
    for name, tensor in pipeline.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert again.model.config == pipeline.model.config


def test_two_of_four_takes_a_half_and_a_thirty_second():
    weight = torch.ones(64, 64)
    weight[:, ::2] = 0
    assert sparse_bytes(weight) == weight.numel() * 4 * (1 / 2 + 1 / 32)


def test_bfloat16_is_sparse_too(folder, tmp_path):
    formats.save(pruned(), tmp_path / "half", dtype="bfloat16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored[f"{QKV}.values"].dtype is torch.bfloat16
    assert torch.equal(formats.load(tmp_path / "half").model.state_dict()[QKV],
                       pruned().model.state_dict()[QKV].bfloat16().float())


def test_integers_packed_after_pruning_are_sparse_too(tmp_path):
    from slimdit.models.surgery import pack_linears

    pipeline = pruned()
    pack_linears(pipeline.model, {"blocks.0.attn.qkv": "int8_weight_only"})
    formats.save(pipeline, tmp_path / "packed")
    assert load_file(tmp_path / "packed" / "model.safetensors")[f"{QKV}.values"].dtype is torch.int8
    assert torch.equal(formats.load(tmp_path / "packed").model.state_dict()[QKV], pipeline.model.state_dict()[QKV])


# --- hostile files -----------------------------------------------------------------------------------------------


def cut(tensors):
    tensors[f"{QKV}.values"] = tensors[f"{QKV}.values"][:-1].clone()


def too_many_bits(tensors):
    tensors[f"{QKV}.mask"][:] = 255


def long_mask(tensors):
    tensors[f"{QKV}.mask"] = torch.cat([tensors[f"{QKV}.mask"], torch.zeros(1, dtype=torch.uint8)])


def float_mask(tensors):
    tensors[f"{QKV}.mask"] = tensors[f"{QKV}.mask"].float()


def square_values(tensors):
    tensors[f"{QKV}.values"] = tensors[f"{QKV}.values"][:64].view(8, 8).clone()


def integer_values(tensors):
    tensors[f"{QKV}.values"] = tensors[f"{QKV}.values"].to(torch.int32)


def not_a_number(tensors):
    tensors[f"{QKV}.values"][3] = float("nan")


def no_mask(tensors):
    del tensors[f"{QKV}.mask"]


def dense_as_well(tensors):
    tensors[QKV] = torch.zeros(96, 32)


@pytest.mark.parametrize("change, words", [
    (cut, "values are stored"), (too_many_bits, "keeps 3,072 of 3,072"), (long_mask, "(385,) where 3,072"),
    (float_mask, "torch.float32"), (square_values, "save the model again"), (integer_values, "torch.int32"),
    (not_a_number, "NaN"), (no_mask, f"has no {QKV}.mask"), (dense_as_well, "dense too")])
def test_a_wrong_sparse_weight_is_a_sentence(change, words, folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(FormatError) as caught:
        formats.load(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("names, words", [
    ("all", "must be a list"), ([3], "must be a list"), ([QKV, QKV], "must be a list"), ({}, "must be a list"),
    ([], "unexpected"), (["pos_embed"], "has no pos_embed.mask"), ([QKV[:-1]], "has no"), (None, "must be a list")])
def test_a_wrong_list_of_sparse_weights_is_a_sentence(names, words, folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "sparse": names}))
    with pytest.raises(FormatError, match=words):
        formats.load(folder)


def test_a_bit_beyond_the_last_weight_is_refused():
    mask, values = encode(torch.tensor([[1.0, 0.0, 2.0]]))
    with pytest.raises(FormatError, match="keeps 3 of 3 weights"):
        decode(mask | 0b10000000, torch.ones(3), torch.Size([1, 3]), "here")
    with pytest.raises(FormatError, match="keeps 2 of 3 weights"):
        decode(mask, values[:1], torch.Size([1, 3]), "here")


def test_what_unpacks_beyond_any_file_is_refused_before_it_is_allocated(folder, monkeypatch):
    monkeypatch.setattr(sparse, "LARGEST_FILE", 16 * 1024)
    monkeypatch.setattr(sparse, "decode", lambda *_: torch.zeros(1))
    with pytest.raises(FormatError, match="unpacks to more than") as caught:
        formats.load(folder)
    assert caught.value.exit_code == 3


def test_a_bare_file_of_sparse_weights_is_no_checkpoint_and_says_so(folder):
    with pytest.raises(FormatError) as caught:
        formats.load(folder / "model.safetensors")
    assert "\n" not in str(caught.value)
