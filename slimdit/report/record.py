"""A record: what one row of a benchmark measured, with everything needed to believe it and to run it again.

A record is one JSON file that carries the hash of its own content, so that an edited or half-copied one is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BeforeValidator, ConfigDict, PlainSerializer, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..files import write_json

SCHEMA = 2
READABLE = (1, 2)  # 1 had no bias
BASELINE = "baseline"
AA = "A/A"  # the baseline against itself with other seeds: the floor below which nothing is a result

Status = Literal["done", "failed", "refused", "timeout", "out_of_memory", "crashed", "interrupted"]


def _number(value: Any) -> Any:
    # JSON has no infinity, and the PSNR of two equal images is one: it is written as a word.
    value = {"inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("is not a number (NaN): leave out what could not be measured")
    return value


def _word(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else ("inf" if value > 0 else "-inf")


Number = Annotated[float, BeforeValidator(_number), PlainSerializer(_word, when_used="json")]
STRICT = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")


@dataclass(frozen=True, config=STRICT)
class Value:
    """A measured number.

    Attributes:
        value: the point estimate; may be infinite, never NaN.
        low, high: ends of its interval, or None where it has none (a count, a file's size).
        n: how many images, or rounds of a clock, it rests on.
        unit: as in `"dB"`, `"bytes"`, `"images/s"`; `"x"` for a ratio, `""` for a bare number.
        bias: what it is expected to be too high by at this n, by the bootstrap; None where it has none.

    Raises:
        ValueError: a number is NaN or of another type, or the interval has one end or is upside down.
    """

    value: Number
    low: Number | None = None
    high: Number | None = None
    n: int | None = None
    unit: str = ""
    bias: Number | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval needs both ends, low and high, or neither")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"an interval must go from low to high, not from {self.low} to {self.high}")


@dataclass(frozen=True, config=STRICT)
class Images:
    """The images a row was judged on.

    Attributes:
        grid: path of a PNG sheet of some of them, relative to the record.
        sha256: of all of them, so that two runs can be seen to be the same to the bit.
    """

    grid: str
    sha256: str


@dataclass(frozen=True, config=STRICT)
class Record:
    """One row: the baseline, the A/A row, or a recipe against the baseline.

    Attributes:
        name: of the row; `BASELINE` and `AA` are special.
        status: `"done"`, or how it ended instead, with the `reason` as a sentence.
        recipe: the resolved recipe.
        protocol: the resolved protocol: images, seeds, steps, solver, guidance, margin.
        metrics: what was measured of this row alone.
        against_baseline: ratios, paired differences (`fd_lite0_difference`) and paired fidelity (`psnr`).
        verdict: on quality: `no loss within X`, `loss`, or `too few images to say: N more`.
        remarks: said in the row: `slower`, `no speed effect`, `no effect`.
        witness: what each method did, in order: layers changed, bytes saved.
        provenance: see `provenance`.
        seconds: wall-clock seconds of every stage; `prepare` is all methods, each with its own in `witness`.

    Raises:
        ValueError: a field has the wrong type, the name is empty or too long, or an unfinished row has no reason.
    """

    name: str
    status: Status = "done"
    reason: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Value] = field(default_factory=dict)
    against_baseline: dict[str, Value] = field(default_factory=dict)
    verdict: str = ""
    remarks: tuple[str, ...] = ()
    witness: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, Number] = field(default_factory=dict)
    images: Images | None = None

    def __post_init__(self) -> None:
        if not self.name.strip() or len(self.name) > 80:
            raise ValueError(f"a record's name must have 1 to 80 characters, not {len(self.name.strip())}")
        if self.status != "done" and not self.reason:
            raise ValueError(f"record {self.name!r} is {self.status}: say why in its reason")

    def quantity(self, name: str) -> Value | None:
        """The value of a metric, of a comparison with the baseline or of what the methods were trained with.

        None where the row has none.
        """
        return self.metrics.get(name) or self.against_baseline.get(name) or self._training().get(name)

    def _training(self) -> dict[str, Value]:
        """The recovery budget: images seen in training, and its seconds."""
        spent = [(entry.get("images"), entry.get("seconds")) for entry in self.witness if entry.get("steps")]
        known = [(images, seconds) for images, seconds in spent
                 if isinstance(images, (int, float)) and isinstance(seconds, (int, float))]
        return {"trained_images": Value(float(sum(images for images, _ in known))),
                "training_seconds": Value(float(sum(seconds for _, seconds in known)), unit="s")} if known else {}


RECORD = TypeAdapter(Record)


def write(record: Record, folder: Path) -> Path:
    """Write a record into a folder of records, atomically; returns its path.

    Raises:
        ValueError: the recipe, protocol, witness or provenance holds something that JSON cannot.
    """
    path = record_path(folder, record.name)
    try:
        content = json.loads(json.dumps({"schema": SCHEMA, **RECORD.dump_python(record, mode="json")}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"record {record.name!r} cannot be written as JSON: {error}") from error
    write_json(path, {**content, "sha256": content_hash(content)})
    return path


def record_path(folder: Path, name: str) -> Path:
    """Where the record of a row is kept; any name is a file name once quoted, and no two share one."""
    return folder / f"{quote(name, safe=' ')}.json"


def read(path: Path) -> Record:
    """Read a record and check that it is whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a record, was changed after it was written, or has another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}): run its row again") from error
    if not isinstance(content, dict) or not {"schema", "sha256", "name"} <= content.keys():
        raise ValueError(f"{path} is not a slimdit record: it has no schema, name and hash")
    if content["schema"] not in READABLE:
        raise ValueError(f"{path} has record schema {content['schema']!r}, and this slimdit reads "
                         f"{' and '.join(map(str, READABLE))}: "
                         "render it with the slimdit that wrote it, or run its row again")
    if content.pop("sha256") != content_hash(content):
        raise ValueError(f"{path} was changed after it was written (its hash does not match): run its row again")
    del content["schema"]
    return _valid(content, path)


def read_evidence(path: Path) -> list[Record]:
    """The records in the `evidence.json` of a saved model: the baseline's, where it is not its own, then the model's.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}): bench the model again") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} is not a list of records: bench the model again")
    return [_valid(one, path) for one in content]


def _valid(content: Any, path: Path) -> Record:
    try:
        return RECORD.validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path} is not a valid record: {where}: {first['msg']}") from error


def read_all(folder: Path) -> list[Record]:
    """The records of a folder: the baseline first, then A/A, then the others in the order of their dates.

    Raises:
        FileNotFoundError: the folder does not exist or holds no records.
        ValueError: as `read`.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no records (*.json): name a folder that slimdit bench wrote")
    records = sorted((read(path) for path in paths), key=lambda record: str(record.provenance.get("date", "")))
    return in_order(records)


def in_order(records: Iterable[Record]) -> list[Record]:
    """The baseline first, then A/A, then the others as they came."""
    return sorted(records, key=lambda record: {BASELINE: 0, AA: 1}.get(record.name, 2))


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON content, whatever its indentation and the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def provenance(*, seeds: Mapping[str, Any] | None = None, dtype: str = "float32", device: str = "cpu",
               threads: int | None = None, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Where numbers come from: code, versions, machine, settings and the command that makes them again.

    Args:
        seeds: what was seeded with what.
        threads: of the tensor library; as many as usable cores where not given.
        command: the words of the command line; this process's own where not given.
    """
    words = list(command) if command is not None else ["slimdit", *sys.argv[1:]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "command": shlex.join(words),
        "date": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **_commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": cores,
        "threads": cores if threads is None else threads,
        "gpu": _gpu() if device.startswith("cuda") else None,
        "device": device,
        "dtype": dtype,
        "seeds": dict(seeds or {}),
        "schema": SCHEMA,
    }


def _commit() -> dict[str, Any]:
    here = Path(__file__)
    # Installed into somebody's virtual environment, the repository around it is theirs, not ours.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return {"commit": None, "dirty": None}
    # Results are not what numbers come from: a second benchmark may follow a first.
    sources = (":(top)", ":(top,exclude)results")
    changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return {"commit": _git(here.parent, "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("slimdit", "torch", "numpy", "scipy", "diffusers", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
