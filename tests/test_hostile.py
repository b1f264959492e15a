"""Files that nobody vouches for: whatever is in one, its reader ends well or with a sentence, soon, and writes nothing.

`SLIMDIT_FUZZ=10000 pytest tests/test_hostile.py` makes so many damaged files in all, instead of a few hundred.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from slimdit import bench, formats, recipe
from slimdit.allocation import open_sensitivity
from slimdit.cli import verb
from slimdit.files import read_kept, write_json
from slimdit.metrics import lite0
from slimdit.metrics.adm import read_samples, read_statistics, write_samples, write_statistics
from slimdit.metrics.features import extractor
from slimdit.metrics.lite0 import load_lite0
from slimdit.metrics.quality import Statistics
from slimdit.metrics.speed import peak_memory, resident_bytes
from slimdit.models.autoencoder import PixelSpace
from slimdit.models.dit import DiT, uniform
from slimdit.pipeline import Pipeline
from slimdit.protocol import find_protocol, shipped_protocols
from slimdit.report import contrast
from slimdit.report.contrast import Contrast
from slimdit.report.record import RECORD, Record, Value, content_hash, read_evidence, record_path, write
from slimdit.sampling.settings import Sampling
from slimdit.shards import Shards
from slimdit.training.data import open_data
from slimdit.training.encode import KIND
from slimdit.training.loop import TrainConfig, TrainState
from slimdit.training.plan import read_plan

FEW = 600  # damaged files in all by default
SECONDS, BYTES = 2.0, 2 ** 30  # that one may take
random = np.random.default_rng(0)


@dataclass(frozen=True)
class Reader:
    """A kind of file: how a whole one is made in a folder, which of its files to damage, and what reads them.

    Attributes:
        mend: done to the folder after the damage.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    mend: Callable[[Path], Any] = lambda folder: None


def pipeline() -> Pipeline:
    torch.manual_seed(0)
    model = DiT(uniform(depth=2, width=16, heads=2, patch=4, input_size=(8, 8), channels=1, classes=3))
    return Pipeline(model.eval(), sampling=Sampling(steps=4).with_cache((0, 2), 1), name="tiny")


def checkpoint() -> dict[str, Any]:
    state = pipeline().model.state_dict()
    return {"model": state, "ema": state, "args": Namespace(model="DiT-S/4", num_classes=3)}


def images() -> np.ndarray:
    return random.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)


def sharded(folder: Path) -> None:
    formats.save(pipeline(), folder, format="diffusers")
    name = "diffusion_pytorch_model.safetensors"
    weights = formats.diffusers.read_safetensors(folder / "transformer" / name)
    save_file(weights, folder / "transformer" / "part.safetensors")
    (folder / "transformer" / name).unlink()
    (folder / "transformer" / f"{name}.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(weights, "part.safetensors")}))


def pickled_diffusers(folder: Path) -> None:
    formats.save(pipeline(), folder, format="diffusers")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(formats.diffusers.read_safetensors(weights), weights.with_suffix(".bin"))
    weights.unlink()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_folder(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images()[..., 0])))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(6, dtype=np.uint8) % 3))


def pictures(folder: Path) -> None:
    for kind in ("a", "b"):
        (folder / kind).mkdir()
        for name in ("1.png", "2.jpg"):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / kind / name)


def latents(folder: Path) -> None:
    pair = {"mean": torch.zeros(4, 1, 4, 2, 2), "std": torch.ones(4, 1, 4, 2, 2)}
    save_file({**pair, "labels": torch.arange(4)}, folder / "shard-00000.safetensors")
    (folder / "index.json").write_text(json.dumps({
        "kind": KIND, "shape": [4, 2, 2], "classes": 4, "flips": False, "scale": 1.0, "count": 4,
        "shard": 4, "autoencoder": PixelSpace().to_dict()}))


def all_of(folder: Path) -> None:
    data = open_data(str(folder))
    data.batch(torch.arange(min(len(data), 16)), torch.Generator().manual_seed(0))


RECIPE = """
name = "lean"  # a recipe
model = "bundled"
methods = [
  {reduce_steps = {solver = "unipc", steps = 10}},
  {quantize = {weights = "int8", protect = ["blocks.0.*"]}},
]
"""
PLAN = """
name = "tiny"
model = {depth = 1, width = 16, heads = 2, patch = 4}
data = {source = "bundled"}
training = {steps = 3, batch = 4, log_every = 1}
"""


def training() -> TrainState:
    model = pipeline().model
    return TrainState(model, torch.optim.AdamW(model.parameters()), TrainConfig(steps=1, batch=1))


def marker(folder: Path) -> Any:
    return read_kept(folder / "x.json", dict, ["witness"])


def beside(folder: Path) -> None:
    difference = {"fd_lite0_difference": Value(1.0, 0.5, 2.0, 4)}
    contrast.write([Contrast("lean", "control", ("a" * 64, "b" * 64), difference)], folder / "x.json")


def evidence(folder: Path) -> None:
    write_json(folder / "x.json", [RECORD.dump_python(Record(name), mode="json") for name in ("baseline", "lean")])


def records(folder: Path) -> None:
    for name in ("baseline", "lean"):
        write(Record(name, protocol={"images": 4}, metrics={"fd_lite0": Value(3.0, 2.0, 4.0, 4, bias=0.5)},
                     witness=[{"method": "quantize"}], verdict="no loss within 1", provenance={"date": "2030"},
                     seconds={"load": 1.0}), folder)


def sign(folder: Path) -> None:
    """Give the record a hash that fits, so that damage is not noticed by that alone."""
    path = record_path(folder, "lean")
    try:
        content = json.loads(path.read_text())
        content.pop("sha256", None)
        path.write_text(json.dumps({**content, "sha256": content_hash(content)}))
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass  # no JSON object any more


READERS = {
    "native": Reader(lambda folder: formats.save(pipeline(), folder), formats.load,
                     ("config.json", "model.safetensors")),
    "diffusers": Reader(lambda folder: formats.save(pipeline(), folder, format="diffusers"), formats.load,
                        ("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
                         "scheduler/scheduler_config.json", "slimdit.json", "slimdit.safetensors")),
    "sharded": Reader(sharded, formats.load, ("transformer/diffusion_pytorch_model.safetensors.index.json",)),
    "bin": Reader(pickled_diffusers, formats.load, ("transformer/diffusion_pytorch_model.bin",)),
    "pt": Reader(lambda folder: torch.save(checkpoint(), folder / "x.pt"),
                 lambda folder: formats.load(folder / "x.pt", heads=2), ("x.pt",)),
    "old pt": Reader(lambda folder: torch.save(checkpoint(), folder / "x.pt", _use_new_zipfile_serialization=False),
                     lambda folder: formats.load(folder / "x.pt", heads=2), ("x.pt",)),
    "safetensors": Reader(lambda folder: save_file(pipeline().model.state_dict(), folder / "x.safetensors"),
                          lambda folder: formats.load(folder / "x.safetensors", heads=2), ("x.safetensors",)),
    "samples": Reader(lambda folder: write_samples(folder / "x.npz", images(), range(6)),
                      lambda folder: read_samples(folder / "x.npz"), ("x.npz",)),
    "stored samples": Reader(lambda folder: np.savez(folder / "x.npz", arr_0=images(), arr_1=np.arange(6)),
                             lambda folder: read_samples(folder / "x.npz"), ("x.npz",)),
    "statistics": Reader(lambda folder: write_statistics(folder / "x.npz", Statistics(np.zeros(4), np.eye(4), 9)),
                         lambda folder: read_statistics(folder / "x.npz"), ("x.npz",)),
    "training npz": Reader(lambda folder: np.savez(folder / "x.npz", arr_0=images(), arr_1=np.arange(6)),
                           lambda folder: all_of(folder / "x.npz"), ("x.npz",)),
    "idx": Reader(idx_folder, all_of, ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte")),
    "pictures": Reader(pictures, all_of, ("a/1.png", "b/2.jpg")),
    "latents": Reader(latents, all_of, ("index.json", "shard-00000.safetensors")),
    "lite0": Reader(lambda folder: shutil.copy(lite0.WEIGHTS, folder / "x.safetensors"),
                    lambda folder: load_lite0(folder / "x.safetensors"), ("x.safetensors",)),
    "recipe": Reader(lambda folder: (folder / "x.toml").write_text(RECIPE),
                     lambda folder: recipe.find(str(folder / "x.toml")), ("x.toml",)),
    "protocol": Reader(lambda folder: shutil.copy(shipped_protocols()["quick"], folder / "x.toml"),
                       lambda folder: find_protocol(str(folder / "x.toml")), ("x.toml",)),
    "plan": Reader(lambda folder: (folder / "x.toml").write_text(PLAN),
                   lambda folder: read_plan(folder / "x.toml"), ("x.toml",)),
    "records": Reader(records, bench.read_records, ("lean.json",)),
    "signed record": Reader(records, bench.read_records, ("lean.json",), sign),
    "contrasts": Reader(beside, lambda folder: contrast.read(folder / "x.json"), ("x.json",)),
    "evidence": Reader(evidence, lambda folder: read_evidence(folder / "x.json"), ("x.json",)),
    "what a run left": Reader(lambda folder: write_json(folder / "x.json", {"witness": {"method": "quantize"}}),
                              marker, ("x.json",)),
    "training checkpoint": Reader(lambda folder: training().save(folder / "x.safetensors", 1),
                                  lambda folder: training().load(folder / "x.safetensors"), ("x.safetensors",)),
    "sensitivity": Reader(lambda folder: (folder / "sensitivity.json").write_text(json.dumps({
        "model": "bundled", "fingerprint": "ab", "settings": {"perturb": "int8"}, "provenance": {},
        "bins": [[999, 500]], "layers": ["a", "b"], "errors": {"a": [0.1]}, "totals": {"a": 0.1}})),
        open_sensitivity, ("sensitivity.json",)),
}


def outcome(call: Callable[[], Any]) -> tuple[int, str]:
    """A call as the command line makes it: its exit code and what stands on stderr. Anything else is a traceback."""
    with redirect_stderr(io.StringIO()) as said:
        try:
            verb(call)()
        except typer.Exit as end:
            return end.exit_code, said.getvalue()
    return 0, ""


WRITING: list[str] | None = None  # what was written, run or called since it was a list
CALLS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.system", "os.exec",
         "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree"}


def notice(event: str, arguments: tuple[Any, ...]) -> None:
    if WRITING is not None and (event in CALLS or (event == "open" and is_writing(*arguments[1:3]))):
        WRITING.append(f"{event} {arguments[0]}")


def is_writing(mode: str | None, flags: int) -> bool:
    return bool(set(mode or "") & set("wax+")) if mode else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


sys.addaudithook(notice)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What a block writes, deletes, starts or connects to."""
    global WRITING
    WRITING = []
    try:
        yield WRITING
    finally:
        WRITING = None


def endures(call: Callable[[], Any]) -> tuple[int, str]:
    """The outcome of reading a damaged file: soon, in little memory, touching nothing, in a sentence if not well."""
    before, began = resident_bytes(), time.process_time()  # of the processor, which others may hold
    with peak_memory("cpu", before) as peak, watched() as touched:
        code, said = outcome(call)
    assert time.process_time() - began < SECONDS and peak.bytes < BYTES
    assert touched == []
    assert code in (0, 1, 3)
    assert code == 0 or (said.startswith("slimdit: ") and said.count("\n") == 1 and len(said) > 30), said
    assert "Traceback" not in said and "out of memory" not in said
    return code, said


HOSTILE = ("-1", "0", "1e308", "1e-320", "99999999999999999999", "true", "null", '"x"', "[]", "{}", "NaN", "-",
           "[" * 3000, '{"a":' * 3000, '"\\ud800"', "\0", "../../x", "\u202e")


def damaged(draw: Callable[..., Any], whole: bytes) -> bytes:
    """The bytes after one to four mishaps, at places and of kinds that are drawn."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("flip", "byte", "cut", "drop", "twice", "zero", "insert", "word", "header")))
        length = draw(st.integers(1, 64))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at:at + length]
        elif kind == "twice":
            data[at:at] = data[at:at + length]
        elif kind == "zero":
            data[at:at + length] = bytes(len(data[at:at + length]))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=64))
        elif kind == "header" and data:  # formats say what they hold at the beginning
            data[draw(st.integers(0, min(len(data), 128) - 1))] ^= draw(st.integers(1, 255))
        elif kind == "word":  # a value of a text, or a number of a header's
            words = [found.span() for found in re.finditer(rb"[\w.+-]+", data[:20_000])]
            if words:
                start, end = draw(st.sampled_from(words))
                data[start:end] = draw(st.sampled_from(HOSTILE)).encode("utf-8", "surrogatepass")
    return bytes(data)


FILES = [(name, file) for name, reader in READERS.items() for file in reader.files]
EACH = -(-int(os.environ.get("SLIMDIT_FUZZ", FEW)) // len(FILES))  # damaged ones of every file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "file"), FILES)
def test_damaged_files_end_in_a_sentence_and_nothing_else(name: str, file: str, tmp_path: Path) -> None:
    reader, path = READERS[name], tmp_path / file
    reader.make(tmp_path)
    whole = path.read_bytes()
    code, said = outcome(lambda: reader.read(tmp_path))  # what it imports and caches is there from now on
    assert code == 0, said

    @settings(max_examples=EACH, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(st.data())
    def each_is_endured(data: st.DataObject) -> None:
        path.write_bytes(damaged(data.draw, whole))
        reader.mend(tmp_path)
        endures(lambda: reader.read(tmp_path))

    each_is_endured()


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    with watched() as touched:
        (tmp_path / "x").write_text("x")
        (tmp_path / "x").read_text()
        (tmp_path / "d").mkdir()
    assert touched == [f"open {tmp_path / 'x'}", f"os.mkdir {tmp_path / 'd'}"]
    with pytest.raises(KeyError):
        outcome(lambda: {}["x"])
    for wrong in (lambda: bytearray(2 ** 30 + 2 ** 24).extend(b"x"), lambda: (tmp_path / "y").touch()):
        with pytest.raises(AssertionError):
            endures(wrong)


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def bomb_npz(path: Path, bomb: Bomb, *names: str) -> None:
    whole = {"arr_1": np.arange(6), "sigma": np.eye(4)}
    np.savez(path, **{name: whole.get(name, np.array([bomb] * 6, object)) for name in names})


def bomb_shard(folder: Path, bomb: Bomb) -> None:
    bomb_npz(folder / "x.npz", bomb, "pool")
    named = Shards(folder, {})._hash(range(6), (folder / "x.npz").read_bytes())  # or it would not be read
    (folder / "x.npz").rename(folder / f"00000000-00000006.{named}.npz")


BOMBS: dict[str, tuple[Callable[[Path, Bomb], Any], Callable[[Path], Any]]] = {
    "pt": (lambda folder, bomb: torch.save({"model": bomb}, folder / "x.pt"),
           lambda folder: formats.load(folder / "x.pt")),
    "plain pickle": (lambda folder, bomb: (folder / "x.ckpt").write_bytes(pickle.dumps(bomb, protocol=2)),
                     lambda folder: formats.load(folder / "x.ckpt")),
    "pickle as safetensors": (lambda folder, bomb: (folder / "x.safetensors").write_bytes(pickle.dumps(bomb)),
                              lambda folder: formats.load(folder / "x.safetensors")),
    "diffusers": (lambda folder, bomb: (pickled_diffusers(folder), torch.save(
                      {"x": bomb}, folder / "transformer" / "diffusion_pytorch_model.bin")), formats.load),
    "native": (lambda folder, bomb: (formats.save(pipeline(), folder), (folder / "model.safetensors").write_bytes(
                   pickle.dumps(bomb))), formats.load),
    "inception": (lambda folder, bomb: torch.save({"fc.weight": bomb}, folder / "x.pth"),
                  lambda folder: extractor("inception", weights=folder / "x.pth")),
    "lite0": (lambda folder, bomb: (folder / "x").write_bytes(pickle.dumps(bomb)),
              lambda folder: extractor("lite0", weights=folder / "x")),
    "samples": (lambda folder, bomb: bomb_npz(folder / "x.npz", bomb, "arr_0", "arr_1"),
                lambda folder: read_samples(folder / "x.npz")),
    "statistics": (lambda folder, bomb: bomb_npz(folder / "x.npz", bomb, "mu", "sigma"),
                   lambda folder: read_statistics(folder / "x.npz")),
    "npz that is a pickle": (lambda folder, bomb: (folder / "x.npz").write_bytes(pickle.dumps(bomb)),
                             lambda folder: read_samples(folder / "x.npz")),
    "training npz": (lambda folder, bomb: bomb_npz(folder / "x.npz", bomb, "arr_0", "arr_1"),
                     lambda folder: open_data(str(folder / "x.npz"))),
    "shard": (lambda folder, bomb: bomb_shard(folder, bomb), lambda folder: Shards(folder, {}).read(range(6))),
    "latents": (lambda folder, bomb: (latents(folder), (folder / "shard-00000.safetensors").write_bytes(
                    pickle.dumps(bomb))), all_of),
}


@pytest.mark.parametrize("loader", BOMBS)
def test_a_pickle_bomb_runs_nothing(loader: str, tmp_path: Path) -> None:
    arm, load = BOMBS[loader]
    (tmp_path / "in").mkdir()
    arm(tmp_path / "in", Bomb(tmp_path / "exploded"))
    with watched() as touched:
        code, said = outcome(lambda: load(tmp_path / "in"))
    assert code in (1, 3) and said.startswith("slimdit: ") and said.count("\n") == 1
    assert touched == [] and not (tmp_path / "exploded").exists()


def test_the_bomb_would_explode(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").is_dir()
