"""Files of weights: what goes in comes out, bit for bit, and what is bad is refused with one sentence."""

import argparse
import json
import logging
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from slimdit import formats
from slimdit.files import read_tensors, write_tensors
from slimdit.formats import FormatError
from slimdit.models.autoencoder import KLAutoencoder, PixelSpace, autoencoder_from_dict
from slimdit.models.dit import BlockConfig, DiT, DiTConfig, preset, uniform
from slimdit.models.linear import pack_linear
from slimdit.pipeline import Pipeline, Runtime
from slimdit.sampling.process import NoiseProcess
from slimdit.sampling.seeds import ImageNoise, image_labels
from slimdit.sampling.solvers import Sampling, timesteps


def randomised(config, seed=0):
    """A model whose every weight matters: adaLN-Zero's own initialisation is silent."""
    model, generator = DiT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def tiny(**options):
    return uniform(**{"depth": 2, "width": 32, "heads": 4, "patch": 2, "input_size": (8, 8), "channels": 3,
                      "classes": 5, **options})


@torch.no_grad()
def output(model, t=(3, 500, 999)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(t), model.config.channels, *model.config.input_size, generator=generator)
    return model(x, torch.tensor(t), torch.arange(len(t)) % model.config.classes)


@pytest.fixture
def pipeline():
    return Pipeline(randomised(tiny()), Sampling(steps=4, guidance=1.5, guidance_interval=(10, 900)),
                    NoiseProcess(beta_end=0.019), runtime=Runtime(attention="explicit"), name="tiny",
                    history=({"reduce_steps": {"steps": 4}},))


def refused(source, *words, code=None, **options):
    """The sentence that loading ends in: one line, naming the file, with these words."""
    with pytest.raises(FormatError) as caught:
        formats.load(source, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence
    assert caught.value.exit_code in (1, 3)
    assert code in (None, caught.value.exit_code), sentence
    return sentence


# --- native ------------------------------------------------------------------------------------------------------


def test_a_native_folder_gives_the_pipeline_back_bit_for_bit(pipeline, tmp_path):
    formats.save(pipeline, tmp_path / "model")
    again = formats.load(tmp_path / "model")
    assert again.model.config == pipeline.model.config
    assert (again.sampling, again.process, again.runtime) == (pipeline.sampling, pipeline.process, pipeline.runtime)
    assert (again.name, again.history) == (pipeline.name, pipeline.history)
    for name, tensor in pipeline.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert torch.equal(output(again.model), output(pipeline.model))
    np.testing.assert_array_equal(again.sample([0, 1, 2]), pipeline.sample([0, 1, 2]))
    assert not any(p.is_meta for p in (*again.model.parameters(), *again.model.buffers()))
    assert all(p.requires_grad for p in again.model.parameters())


@pytest.mark.parametrize("config", [
    tiny(input_size=(8, 12)), tiny(learn_sigma=False), tiny(label_dropout=0.0), tiny(frequency_shift=1),
    DiTConfig((8, 8), 1, 3, 4, 32, (BlockConfig(2, 8, 40), BlockConfig(4, 8, 128), BlockConfig(1, 4, 4)))])
def test_every_structure_survives_a_native_folder(config, tmp_path):
    model = randomised(config)
    formats.save(Pipeline(model), tmp_path / "model")
    again = formats.load(tmp_path / "model").model
    assert again.config == config
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("kind", ["int8_weight_only", "int8_dynamic"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_packed_integers_stay_integers(kind, dtype, tmp_path):
    from dataclasses import replace

    model, name = randomised(tiny()), "blocks.0.mlp.fc1"
    pack_linear(model, name, kind)
    model.config = replace(model.config, linears={name: kind})
    formats.save(Pipeline(model), tmp_path / "model", **({"dtype": dtype} if dtype else {}))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    again = formats.load(tmp_path / "model").model
    assert stored[f"{name}.weight"].dtype == torch.int8
    assert stored[f"{name}.scale"].dtype == torch.float32
    assert torch.equal(again.get_submodule(name).weight, model.get_submodule(name).weight)
    if dtype is None:
        assert torch.equal(output(again), output(model))


def test_bfloat16_stays_bfloat16_on_disk_and_loads_as_float32(pipeline, tmp_path):
    formats.save(pipeline, tmp_path / "full")
    formats.save(pipeline, tmp_path / "half", dtype="bfloat16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16} == {"pos_embed"}
    full, half = (formats.describe(tmp_path / name)["bytes"] for name in ("full", "half"))
    assert half < 0.6 * full
    again = formats.load(tmp_path / "half").model
    weight = pipeline.model.blocks[0].attn.qkv.weight
    assert again.blocks[0].attn.qkv.weight.dtype == torch.float32
    assert torch.equal(again.blocks[0].attn.qkv.weight, weight.bfloat16().float())


def test_a_failed_save_leaves_the_old_model_and_nothing_else(pipeline, tmp_path, monkeypatch):
    formats.save(pipeline, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("slimdit.formats.native.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        formats.save(Pipeline(randomised(tiny(), seed=5)), tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert torch.equal(output(formats.load(tmp_path / "model").model), output(pipeline.model))


def test_saving_again_replaces_a_model_but_never_other_files(pipeline, tmp_path):
    formats.save(pipeline, tmp_path / "model")
    other = randomised(tiny(), seed=7)
    formats.save(Pipeline(other), tmp_path / "model")
    assert torch.equal(output(formats.load(tmp_path / "model").model), output(other))
    (tmp_path / "model" / "thesis.tex").write_text("years of work")
    with pytest.raises(FormatError, match=r"thesis\.tex"):
        formats.save(pipeline, tmp_path / "model")
    assert (tmp_path / "model" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(FormatError, match="native, diffusers"):
        formats.save(pipeline, tmp_path / "new", format="onnx")


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c.update(samplin={}), ["'samplin'", "did you mean 'sampling'"]),
    (lambda c: c.pop("process"), ["'process'", "missing"]),
    (lambda c: c.update(version=2), ["version 2"]),
    (lambda c: c["model"].update(widht=3), ["'widht'", "did you mean 'width'"]),
    (lambda c: c["model"].update(width="32"), ["width"]),
    (lambda c: c["model"].update(width=64), ["shape"]),
    (lambda c: c["model"]["blocks"][1].update(attention="softmx"), ["softmx"]),
    (lambda c: c["model"]["blocks"].pop(), ["unexpected", "blocks.1."]),
    (lambda c: c["model"]["blocks"].append(c["model"]["blocks"][0]), ["missing blocks.2.", "more"]),
    (lambda c: c["model"].update(linears={"blocks.0.nothing": "int8_dynamic"}), ["blocks.0.nothing"]),
    (lambda c: c["sampling"].update(solver="dimm"), ["dimm", "ddim"]),
    (lambda c: c["sampling"].update(steps=0), ["steps"]),
    (lambda c: c["runtime"].update(dtype="int4"), ["int4"]),
    (lambda c: c["autoencoder"].update(kind="vq"), ["vq"]),
    (lambda c: c.update(history="none"), ["history"]),
    (lambda c: c.update(model=[]), ["model"]),
])
def test_a_wrong_native_config_is_a_sentence(pipeline, tmp_path, change, words):
    formats.save(pipeline, tmp_path / "model")
    change_config(tmp_path / "model", change)
    refused(tmp_path / "model", str(tmp_path), *words)


@pytest.mark.parametrize("change", [
    lambda c: c["model"].update(width=10 ** 9), lambda c: c["model"].update(classes=10 ** 9),
    lambda c: c["model"].update(input_size=[10 ** 9, 10 ** 9]),
    lambda c: c["model"].update(blocks=c["model"]["blocks"][:1] * 10 ** 5),
    lambda c: c["model"]["blocks"][0].update(mlp_width=10 ** 12)])
def test_an_absurd_config_is_refused_before_anything_is_built(pipeline, tmp_path, change, monkeypatch):
    formats.save(pipeline, tmp_path / "model")
    change_config(tmp_path / "model", change)

    def never(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr("slimdit.formats.tensors.DiT", never)
    refused(tmp_path / "model", "refused", code=3)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": NaN}', "[" * 100_000])
def test_a_config_that_is_no_json_object_is_a_sentence(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json")


def test_damaged_native_weights_are_a_sentence(pipeline, tmp_path):
    formats.save(pipeline, tmp_path / "model")
    stored = tmp_path / "model" / "model.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-100])
    refused(tmp_path / "model", "model.safetensors", code=1)
    stored.write_bytes(whole[:100])
    refused(tmp_path / "model", "model.safetensors", code=1)
    stored.write_bytes(b"")
    refused(tmp_path / "model", "empty", code=1)
    stored.unlink()
    refused(tmp_path / "model", "missing", code=1)
    huge = {"dtype": "F32", "shape": [10 ** 6, 10 ** 6], "data_offsets": [0, 4 * 10 ** 12]}
    header = json.dumps({"x": huge}).encode()
    stored.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    refused(tmp_path / "model", "model.safetensors")
    stored.write_bytes(struct.pack("<Q", 2 ** 62) + whole[8:])
    refused(tmp_path / "model", "model.safetensors")


def test_weights_with_nan_or_of_a_wrong_kind_are_a_sentence(pipeline, tmp_path):
    formats.save(pipeline, tmp_path / "model")
    stored = tmp_path / "model" / "model.safetensors"
    tensors, name = load_file(stored), "final_layer.linear.bias"
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, stored)
    refused(tmp_path / "model", name, "NaN", code=1)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, stored)
    refused(tmp_path / "model", name, "int8", code=1)


# --- original: DiT and fast-DiT ------------------------------------------------------------------------------------


def fast_dit(model, ema, /, **args):
    return {"model": model.state_dict(), "ema": ema.state_dict(), "opt": {"state": {0: {"step": torch.tensor(3.0)}}},
            "args": argparse.Namespace(**args)}


def test_a_bare_state_dict_tells_its_structure(tmp_path):
    config = preset("XS/2", input_size=(8, 8), channels=3, classes=7)
    model = randomised(config)
    torch.save(model.state_dict(), tmp_path / "DiT.pt")
    again = formats.load(tmp_path / "DiT.pt")
    assert again.model.config == config
    assert isinstance(again.autoencoder, PixelSpace)
    assert torch.equal(output(again.model), output(model))
    described = formats.describe(tmp_path / "DiT.pt")
    assert described["preset"] == "XS/2"
    assert described["format"] == "original"
    assert described["parameters"] == sum(p.numel() for p in model.parameters())
    assert described["bytes"] == (tmp_path / "DiT.pt").stat().st_size
    assert "null class" in " ".join(described["notes"])
    json.dumps(described)


@pytest.mark.parametrize("options", [{"learn_sigma": False}, {"input_size": (8, 16)}, {"input_size": (16, 8)},
                                     {"patch": 4}, {"channels": 1}, {"classes": 1}])
def test_every_size_is_read_off_the_tensors(options, tmp_path):
    config = tiny(**options)
    torch.save(randomised(config).state_dict(), tmp_path / "x.pt")
    assert formats.load(tmp_path / "x.pt", heads=4).model.config == config


def test_fast_dit_gives_its_average_and_says_so(tmp_path, caplog):
    config = preset("XS/4", input_size=(8, 8), channels=1, classes=10)
    model, ema = randomised(config, seed=1), randomised(config, seed=2)
    torch.save(fast_dit(model, ema, model="DiT-XS/4", num_classes=10), tmp_path / "0001000.pt")
    with caplog.at_level(logging.INFO, logger="slimdit"):
        chosen = formats.load(tmp_path / "0001000.pt")
    assert "EMA" in caplog.text
    assert torch.equal(output(chosen.model), output(ema))
    assert chosen.name == "DiT-XS/4"
    assert chosen.model.config == config
    last = formats.load(tmp_path / "0001000.pt", weights="model")
    assert torch.equal(output(last.model), output(model))
    assert any("EMA" in note for note in formats.describe(tmp_path / "0001000.pt")["notes"])
    assert chosen.sample([0], batch=1).shape == (1, 8, 8, 1)


def test_arguments_say_classes_and_heads(tmp_path):
    model = randomised(tiny(label_dropout=0.0, width=384, heads=6, depth=1))
    torch.save(fast_dit(model, model, model="DiT-S/2", num_classes=5), tmp_path / "x.pt")
    config = formats.load(tmp_path / "x.pt").model.config
    assert (config.classes, config.label_rows, config.blocks[0].heads) == (5, 5, 6)
    torch.save(fast_dit(model, model, model="DiT-S/2", num_classes=9), tmp_path / "y.pt")
    refused(tmp_path / "y.pt", "9 classes", "5 rows")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_wrappers_and_safetensors(prefix, suffix, tmp_path):
    model = randomised(tiny())
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, tmp_path / f"x{suffix}")
    assert torch.equal(output(formats.load(tmp_path / f"x{suffix}", heads=4).model), output(model))


def test_wrappers_inside_names_and_twins(tmp_path):
    model = randomised(tiny())
    state = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "x.pt")
    assert torch.equal(output(formats.load(tmp_path / "x.pt", heads=4).model), output(model))
    torch.save({**model.state_dict(), **state}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "twice", heads=4)


def test_four_channels_are_latents(tmp_path):
    torch.save(randomised(tiny(channels=4)).state_dict(), tmp_path / "x.pt")
    loaded = formats.load(tmp_path / "x.pt", heads=4)
    assert isinstance(loaded.autoencoder, KLAutoencoder)
    assert loaded.image_size == (64, 64)  # nothing was fetched to know it


def test_heads_are_asked_for_only_where_nothing_tells(tmp_path):
    model = randomised(tiny())
    torch.save(model.state_dict(), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "--heads", code=1)
    refused(tmp_path / "x.pt", "5 heads", heads=5)
    refused(tmp_path / "x.pt", "-4 heads", heads=-4)
    refused(tmp_path / "x.pt", "'ema' or 'model'", weights="last")


def test_a_bare_state_dict_saves_to_everything(tmp_path):
    model = randomised(tiny())
    torch.save(model.state_dict(), tmp_path / "x.pt")
    loaded = formats.load(tmp_path / "x.pt", heads=4)
    for format in ("native", "diffusers"):
        formats.save(loaded, tmp_path / format, format=format)
        assert torch.equal(output(formats.load(tmp_path / format).model), output(model))


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_bomb_runs_nothing(writer, tmp_path):
    exploded, path = tmp_path / "exploded", tmp_path / "bomb.pt"
    content = {"model": {"x": 0.0}, "args": Bomb(exploded)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    assert "mkdir" in refused(path, str(path), "refused", code=3)
    assert not exploded.exists()


@pytest.mark.parametrize("content", [
    {"args": argparse.Namespace(x=1)}, {"x": 1}, [torch.zeros(2)], torch.zeros(2), {}, {"state": {"x": torch.zeros(2)}},
    {"conv1.weight": torch.zeros(3, 3)}, {"x_embedder.proj.weight": torch.zeros(3)},
    {"x_embedder.proj.weight": torch.zeros(0, 3, 2, 2)}, {"ema": 3, "model": 4}])
def test_foreign_checkpoints_are_a_sentence(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "x.pt", code=1)


def test_damaged_checkpoints_are_a_sentence(tmp_path):
    path = tmp_path / "x.pt"
    model = randomised(tiny())
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    for broken in (whole[:len(whole) // 2], whole[:100], b"", b"not weights at all", whole[1000:]):
        path.write_bytes(broken)
        refused(path, "x.pt", code=1, heads=4)
    state = model.state_dict()
    torch.save({**state, "blocks.1.attn.proj.bias": torch.full((32,), torch.inf)}, path)
    refused(path, "blocks.1.attn.proj.bias", "NaN", code=1, heads=4)
    torch.save({name: tensor for name, tensor in state.items() if "blocks.0.attn" not in name}, path)
    refused(path, "missing blocks.0.attn.proj.bias", "and 1 more", heads=4)
    torch.save({**state, "extra": torch.zeros(1)}, path)
    refused(path, "unexpected extra", heads=4)
    torch.save({**state, "pos_embed": torch.randn(1, 16, 32)}, path)
    refused(path, "pos_embed", heads=4)


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    state = randomised(tiny()).state_dict()
    state["y_embedder.embedding_table.weight"] = torch.zeros(1, 1).expand(10 ** 9, 32)
    torch.save(state, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "declares", code=3, heads=4)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10 ** 7)
    refused(tmp_path / "bomb.pt", "unpacks", code=3)


# --- diffusers -----------------------------------------------------------------------------------------------------


def test_a_diffusers_folder_gives_the_pipeline_back(pipeline, tmp_path):
    formats.save(pipeline, tmp_path / "model", format="diffusers")
    again = formats.load(tmp_path / "model")
    assert again.model.config == pipeline.model.config
    assert torch.equal(output(again.model), output(pipeline.model))  # at any timestep: the original embedder is kept
    assert (again.sampling, again.process, again.name) == (pipeline.sampling, pipeline.process, pipeline.name)
    assert not (tmp_path / "model" / "model_index.json").exists()
    readme = (tmp_path / "model" / "README.md").read_text()
    assert "largest deviation" in readme
    assert "DiTTransformer2DModel" in readme


def test_a_schedule_too_long_for_the_width_is_said_not_to_be_equal(pipeline, tmp_path, caplog):
    for steps, equal in ((50, True), (250, False)):
        formats.save(pipeline.replace(sampling=Sampling(steps=steps)), tmp_path / str(steps), format="diffusers")
        assert ("NOT" not in (tmp_path / str(steps) / "README.md").read_text()) == equal
        assert ("NOT" not in caplog.text) == equal


@pytest.mark.parametrize("shape", ["DiT", "fast-DiT"])
def test_plain_diffusers_samples_the_images_of_a_pt(shape, tmp_path):
    config = preset("XS/4", input_size=(8, 8), channels=1, classes=10)
    model = randomised(config)
    torch.save(fast_dit(model, model, model="DiT-XS/4", num_classes=10) if shape == "fast-DiT" else model.state_dict(),
               tmp_path / "x.pt")
    pipeline = formats.load(tmp_path / "x.pt").replace(sampling=Sampling(steps=5))
    formats.save(pipeline, tmp_path / "out", format="diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer").eval()
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == timesteps(pipeline.process, pipeline.sampling)
    x, labels = ImageNoise(0, range(3), (1, 8, 8)).draw(), image_labels(0, range(3), 10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = theirs(x, timestep=t.expand(3), class_labels=labels).sample[:, :1]
            assert (eps - model(x, t.expand(3), labels)[:, :1]).abs().max() < 1e-5
            x = scheduler.step(eps, t, x).prev_sample
    images = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    ours = pipeline.sample(range(3))
    assert ours.std() > 10
    assert np.abs(images.astype(int) - ours.astype(int)).max() <= 1  # a rounding of float32 may tip one level


@pytest.mark.parametrize("part", ["whole", "transformer only", "stale sidecar"])
def test_a_folder_without_our_file_loads_too(pipeline, part, tmp_path):
    formats.save(pipeline, tmp_path / "model", format="diffusers")
    folder = tmp_path / "model"
    if part == "stale sidecar":
        theirs = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        with torch.no_grad():
            theirs.proj_out_2.bias += 1
        theirs.save_pretrained(folder / "transformer")
    else:
        (folder / "slimdit.json").unlink()
    again = formats.load(folder / "transformer" if part == "transformer only" else folder)
    assert again.model.config.frequency_shift == 1
    assert again.process == (NoiseProcess() if part == "transformer only" else pipeline.process)
    # The trained bias changes the output by 1 at every token; the rest is the refitted embedder on its schedule.
    schedule = timesteps(pipeline.process, pipeline.sampling)
    shift = 1.0 if part == "stale sidecar" else 0.0
    assert (output(again.model, schedule) - output(pipeline.model, schedule) - shift).abs().max() < 2e-5
    notes = " ".join(formats.describe(folder)["notes"])
    assert ("left aside" in notes) == (part == "stale sidecar")


def test_parts_are_read_into_their_place_where_all_are_there_and_alike(tmp_path):
    parts = {name: torch.randn(2, 3) for name in "qkv"}
    others = {"q2": torch.randn(2, 3), "k2": torch.randn(2, 4), "v2": torch.randn(2, 3), "q3": torch.randn(2),
              "b": torch.ones(1)}
    write_tensors(tmp_path / "x.safetensors", {**parts, **others}, {})

    def part_of(name):
        return (f"whole{name[1:]}", "qkv".index(name[0]), 3) if name[0] in "qkv" else None

    tensors, _ = read_tensors(tmp_path / "x.safetensors", mapped=False, part_of=part_of)
    assert set(tensors) == {"whole", *others}
    assert torch.equal(tensors["whole"], torch.cat([parts[name] for name in "qkv"]))
    assert all(torch.equal(tensors[name], others[name]) for name in others)


def test_sharded_weights_load_and_stay_in_their_folder(pipeline, tmp_path):
    formats.save(pipeline, tmp_path / "model", format="diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "model", subfolder="transformer")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    index = tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json"
    whole, shards = (formats.load(tmp_path / name) for name in ("model/transformer", "shards"))
    assert torch.equal(output(whole.model), output(shards.model))
    listed = json.loads(index.read_text())
    listed["weight_map"] = dict.fromkeys(listed["weight_map"], "../elsewhere.safetensors")
    index.write_text(json.dumps(listed))
    refused(tmp_path / "shards", "outside", code=3)


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, layers_per_block=1, sample_size=16,
                  scaling_factor=0.25).save_pretrained(tmp_path / "vae-source")
    return tmp_path / "vae-source"


def test_with_an_autoencoder_the_folder_is_a_dit_pipeline(vae, tmp_path):
    model = randomised(tiny(channels=4, classes=1000))
    pipeline = Pipeline(model, Sampling(steps=3), autoencoder=KLAutoencoder(str(vae)))
    assert pipeline.image_size == (16, 16)
    formats.save(pipeline, tmp_path / "model", format="diffusers")
    again = formats.load(tmp_path / "model")
    assert Path(again.autoencoder.source).parent == tmp_path / "model"
    np.testing.assert_array_equal(again.sample([0, 1]), pipeline.sample([0, 1]))
    theirs = DiTPipeline.from_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    images = theirs([1, 2], guidance_scale=1.0, num_inference_steps=3, output_type="np",
                    generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (2, 16, 16, 3)
    (tmp_path / "model" / "slimdit.json").unlink()
    assert formats.load(tmp_path / "model").autoencoder.scale == 0.25


def test_the_autoencoder_scales_samples_and_describes_itself(vae):
    coder = KLAutoencoder(str(vae))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = coder.encode(images)
    assert mean.shape == (2, 4, 8, 8)
    assert coder.decode(mean).shape == images.shape
    drawn = [coder.encode(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    torch.testing.assert_close(KLAutoencoder(str(vae), scale=0.5).encode(images), 2 * mean)
    again = autoencoder_from_dict(coder.to_dict())
    assert (again.scale, again.factor, again.source) == (0.25, 2, str(vae))
    with pytest.raises(ValueError, match="could not be loaded"):
        KLAutoencoder(str(vae.parent / "nothing")).decode(mean)
    for wrong in ({}, {"kind": "kl"}, {"kind": "kl", "source": 3}, {"kind": "kl", "source": "x", "scale": 0},
                  {"kind": "kl", "source": "x", "size": 3}, {"kind": "pixels", "scale": 2}):
        with pytest.raises(ValueError, match="autoencoder"):
            autoencoder_from_dict(wrong)


def test_what_diffusers_cannot_be_is_refused(tmp_path):
    from dataclasses import replace

    uneven = replace(tiny(), blocks=(BlockConfig(4, 8, 128), BlockConfig(2, 8, 128)))
    narrow = replace(tiny(), blocks=(BlockConfig(2, 8, 128),) * 2)
    thin, thin_end = replace(tiny(), blocks=(BlockConfig(4, 8, 128, adaln_rank=5),) * 2), tiny(final_adaln_rank=6)
    focused, grouped, conv = (replace(tiny(), blocks=(BlockConfig(4, 8, 128, **options),) * 2) for options in (
        {"attention": "focused"}, {"kv_heads": 2}, {"conv": 3}))
    packed = DiT(tiny())
    pack_linear(packed, "blocks.0.mlp.fc1", "int8_dynamic")
    packed.config = replace(packed.config, linears={"blocks.0.mlp.fc1": "int8_dynamic"})
    for model, word in ((DiT(tiny(input_size=(8, 12))), "square"), (DiT(uneven), "alike"), (DiT(narrow), "as wide"),
                        (DiT(tiny(mlp_ratio=2.0)), "four times"), (packed, "int8_dynamic"),
                        (DiT(focused), "this model's is focused"), (DiT(grouped), "share keys and values"),
                        (DiT(conv), "convolution of the values"), (DiT(thin), "pair of rank 5"),
                        (DiT(thin_end), "pair of rank 6")):
        with pytest.raises(FormatError, match=word) as caught:
            formats.save(Pipeline(model), tmp_path / "x", format="diffusers")
        assert caught.value.exit_code == 3
        assert not list(tmp_path.iterdir())


def test_a_model_without_null_class_survives_diffusers(tmp_path):
    model = randomised(tiny(label_dropout=0.0, frequency_shift=1))
    formats.save(Pipeline(model), tmp_path / "model", format="diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "model", subfolder="transformer").eval()
    x, t, y = torch.randn(5, 3, 8, 8), torch.full((5,), 40), torch.arange(5)
    with torch.no_grad():
        assert (theirs(x, timestep=t, class_labels=y).sample - model(x, t, y)).abs().max() < 1e-5
    assert formats.load(tmp_path / "model").model.config == model.config


@pytest.mark.parametrize(("file", "change", "words"), [
    ("transformer/config.json", {"norm_type": "layer_norm"}, ["norm_type"]),
    ("transformer/config.json", {"num_layers": 10 ** 9}, ["num_layers", "1..4,096"]),
    ("transformer/config.json", {"num_layers": 3}, ["missing", "transformer_blocks.2"]),
    ("transformer/config.json", {"num_layers": 1}, ["unexpected", "transformer_blocks.1"]),
    ("transformer/config.json", {"in_channels": "3"}, ["in_channels"]),
    ("transformer/config.json", {"attention_head_dim": 16}, ["wide"]),
    ("transformer/config.json", {"out_channels": 5}, ["out_channels"]),
    ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, ["beta_schedule"]),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, ["prediction_type"]),
    ("scheduler/scheduler_config.json", {"timestep_spacing": "karras"}, ["karras"]),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, ["num_train_timesteps"]),
    ("scheduler/scheduler_config.json", {"beta_start": "0"}, ["beta_start"]),
])
def test_a_wrong_diffusers_folder_is_a_sentence(pipeline, tmp_path, file, change, words):
    formats.save(pipeline, tmp_path / "model", format="diffusers")
    (tmp_path / "model" / "slimdit.json").unlink()
    config = tmp_path / "model" / file
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    refused(tmp_path / "model", str(tmp_path), *words)


def test_blocks_that_disagree_on_the_embedders_are_refused(pipeline, tmp_path):
    formats.save(pipeline, tmp_path / "model", format="diffusers")
    stored = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(stored)
    tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"] += 1
    save_file(tensors, stored)
    refused(tmp_path / "model", "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias", code=3)
    stored.write_bytes(stored.read_bytes()[:1000])
    refused(tmp_path / "model", "diffusion_pytorch_model.safetensors", code=1)
    stored.unlink()
    refused(tmp_path / "model", "no diffusion_pytorch_model", code=1)


# --- sources -------------------------------------------------------------------------------------------------------


def test_sources_that_are_no_model_are_a_sentence(tmp_path, monkeypatch):
    refused(tmp_path, "is not a folder of weights")
    (tmp_path / "x.onnx").write_text("x")
    refused(tmp_path / "x.onnx", "is not a file of weights")
    refused(tmp_path / "nothing.pt", "does not exist")
    monkeypatch.setattr(formats, "BUNDLED", tmp_path / "nowhere")
    refused("bundled", "no bundled model")


def test_a_hub_id_fetches_only_weights_and_json(monkeypatch, pipeline, tmp_path):
    formats.save(pipeline, tmp_path / "model", format="diffusers")
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert torch.equal(output(formats.load("org/tiny-DiT").model), output(pipeline.model))
    repo, patterns = asked[0]
    assert repo == "org/tiny-DiT"
    assert {Path(pattern).suffix for pattern in patterns} == {".json", ".safetensors"}

    def offline(*_, **__):
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused("org/tiny-DiT", "org/tiny-DiT", "no route to host", "connection", code=1)
