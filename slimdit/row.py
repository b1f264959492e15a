"""One row of a bench, in a process of its own: apply its recipe, then measure what came out.

`python -m slimdit.row STAGE SPEC` runs a stage of the row that the JSON file SPEC describes. A crash, a hang or a lack
of memory ends this process alone; the bench that started it makes a record of how it ended. Progress is told as JSON
lines on stdout.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_json, write_text
from .protocol import CLOCK, Protocol
from .report.record import BASELINE, RECORD, Images, Record, Status, Value, provenance, read, record_path, write

if TYPE_CHECKING:
    import numpy as np

    from .metrics.features import Extractor, Features, Reference
    from .pipeline import Pipeline
    from .sample_set import SampleSet

GRID = 40  # images shown of a row


@dataclass(frozen=True)
class Row:
    """What a row is.

    Attributes:
        name: of its record.
        folder: of the whole bench.
        model: what the recipe starts from.
        recipe: the recipe as TOML; None for the baseline.
        seed: of its images.
        timed: whether it is timed; the A/A row is the baseline's model, and is not.
        controls: rows that it is compared with once all are measured; nothing measured of it alone depends on them.
    """

    name: str
    folder: str
    model: str
    protocol: Protocol
    recipe: str | None = None
    seed: int = 0
    timed: bool = True
    device: str = "cpu"
    command: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The row's name as a folder's."""
        return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in self.name)

    @property
    def home(self) -> Path:
        """Where the row keeps its model, images and features."""
        return Path(self.folder) / "rows" / self.slug

    @property
    def timings(self) -> Path:
        """Where the processes that time the row leave what they found."""
        return self.home / "timings"

    @property
    def contrasts(self) -> Path:
        """The file that says how the row differs from its controls."""
        return Path(self.folder) / "contrasts" / record_path(Path(), self.name)

    @property
    def maker(self) -> Row:
        """The row that makes this row's model: without a recipe, the baseline."""
        return self if self.recipe is not None or self.name == BASELINE else self.baseline()

    @property
    def saved(self) -> Path:
        """The folder of the row's model."""
        return self.maker.home / "model"

    def baseline(self) -> Row:
        """The row it is compared with."""
        return replace(self, name=BASELINE, recipe=None, seed=self.protocol.seed, timed=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "protocol": self.protocol.to_dict(), "command": list(self.command),
                "controls": list(self.controls)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The row that `to_dict` described."""
        protocol = Protocol.from_dict(values["protocol"])
        lists = {name: tuple(values[name]) for name in ("command", "controls")}
        return cls(**{**values, "protocol": protocol, **lists})


def prepare(row: Row) -> None:
    """Make the row's model and save it: the baseline's, or what its recipe makes of that."""
    from .context import Context
    from .formats import save
    from .recipe import parse
    from .recipe import run as run_recipe

    pipeline = baseline_pipeline(row)
    context = Context(teacher=pipeline, folder=row.saved, device=row.device, seed=row.seed,
                      report=lambda line: tell(row, line, 0, 1))
    if row.recipe is not None:
        run_recipe(parse(row.recipe, row.name), pipeline, context, resume=True)
    else:
        save(pipeline, row.saved)
    write_json(row.home / "witness.json", list(context.witnesses))


def baseline_pipeline(row: Row) -> Pipeline:
    """The model as the protocol's baseline runs it: the protocol's sampling, the best float, compiled."""
    from .context import Context
    from .formats import load
    from .methods.compile import Compile

    pipeline = load(row.model).to(row.device)
    wanted = {name: value for name, value in asdict(row.protocol.sampling).items() if value is not None}
    runtime = row.protocol.runtime
    pipeline = pipeline.replace(sampling=replace(pipeline.sampling.revised(**wanted), cache=None))
    context = Context(teacher=pipeline, folder=row.home, device=row.device, seed=row.seed)
    chosen = Compile(dtype=runtime.dtype, attention=runtime.attention).apply(pipeline, context)
    return chosen.replace(runtime=replace(chosen.runtime, compile=runtime.compile))


def measure(row: Row) -> Record:
    """Sample, judge and time the row's saved model, and write its record."""
    from .compiling import warm_up
    from .formats import load

    watch = Stopwatch()
    import_libraries(row)
    started = held_already(row)
    with watch.stage("load"):
        pipeline = load(row.saved).to(row.device)
    metrics: dict[str, Value] = {}
    if row.timed:
        with watch.stage("compile"):
            warm_up(pipeline, max(row.protocol.latency_batches))
        with watch.stage("memory"):
            metrics["peak_memory"] = peak_memory(row, pipeline, started)
    with watch.stage("sample"):
        images, labels, sampled = sample(row, pipeline)
    with watch.stage("quality"):
        quality, against, verdict, conditions = judge(row, images, labels)
    metrics |= quality | costs(row, pipeline)
    remarks = []
    if row.timed:
        speeds, ratios, watch.seconds["speed"] = clocked(row)
        metrics |= speeds
        against |= ratios
    if row.name != BASELINE:
        remarks = notes(row, sampled, against)
    witness = json.loads((row.maker.home / "witness.json").read_text())
    record = Record(
        name=row.name, recipe=recipe_dict(row), protocol=resolved(row, pipeline, conditions), metrics=metrics,
        against_baseline=against, verdict=verdict, remarks=tuple(remarks),
        witness=witness,
        provenance=provenance(seeds={"images": row.seed}, dtype=pipeline.runtime.dtype, device=row.device,
                              threads=row.protocol.threads, command=row.command or None),
        seconds=({"prepare": sum(entry.get("seconds", 0.0) for entry in witness)} if witness else {}) | watch.seconds,
        images=Images(grid=f"../rows/{row.slug}/grid.png", sha256=sampled))
    write(record, Path(row.folder) / "records")
    if row.maker is row:
        attach(row, pipeline, record)
    return record


def attach(row: Row, pipeline: Pipeline, record: Record) -> None:
    """Put the evidence beside the model: its record, the baseline's, and a card rendered from them."""
    from .metrics import METRICS
    from .report.card import model_card

    records = [record] if row.name == BASELINE else [read(record_path(Path(row.folder) / "records", BASELINE)), record]
    write_json(row.saved / "evidence.json", [RECORD.dump_python(one, mode="json") for one in records])
    write_text(row.saved / "README.md", model_card(row.name, pipeline.history, records, METRICS))


def import_libraries(row: Row) -> None:
    """Import what running takes, so that it is not counted as the model's memory."""
    import torch

    from . import formats, pipeline  # noqa: F401

    if row.protocol.threads:
        torch.set_num_threads(row.protocol.threads)
    if row.protocol.runtime.compile:
        import torch._inductor.compile_fx
    if json.loads((row.saved / "config.json").read_text())["runtime"].get("engine") == "openvino":
        from .models.openvino import library

        library()


def held_already(row: Row) -> int:
    """Bytes that are not the model's: the interpreter and its libraries, and on a GPU nothing."""
    from .metrics.speed import resident_bytes

    return resident_bytes() if row.device == "cpu" else 0


def peak_memory(row: Row, pipeline: Pipeline, started: int) -> Value:
    """The most memory a warmed-up sampling run holds, beyond the interpreter and its libraries."""
    from .metrics.speed import peak_memory as measured

    batch = max(row.protocol.latency_batches)
    tell(row, "warm up", 0, 1)
    pipeline.sample(range(batch), seed=row.seed, batch=batch)
    with measured(row.device, started) as peak:
        pipeline.sample(range(batch), seed=row.seed, batch=batch)
    return Value(float(peak.bytes), unit="bytes")


def sample(row: Row, pipeline: Pipeline) -> tuple[np.ndarray, np.ndarray, str]:
    """The row's images, resumed where they stopped, with their labels and their hash."""
    from .report.charts import grid_png
    from .sample_set import fingerprint

    sampled = sample_set(row)
    sampled.make(pipeline, lambda done: tell(row, "sample", done, sampled.count))
    images, labels = sampled.read()
    grid_png(images[:GRID], 10, row.home / "grid.png", scale=2)
    return images, labels, fingerprint(images)


def sample_set(row: Row) -> SampleSet:
    """Where a row's images are kept."""
    from .sample_set import SampleSet

    origin = {"model": model_hash(row.saved), "protocol": row.protocol.name}
    return SampleSet(row.home / "images", row.protocol.images, row.seed, row.protocol.batch, origin)


def contrast(row: Row) -> None:
    """Put down how the row's images differ from those of each of its controls, of the same noise and labels."""
    from .metrics.evaluate import compare
    from .report.contrast import Contrast, images_of
    from .report.contrast import write as write_contrasts

    network, reference = judges(row)
    records = Path(row.folder) / "records"
    (images, labels), features = sample_set(row).read(), features_of(row, network)
    found = []
    for name in row.controls:
        tell(row, f"compare with {name}", 0, 1)
        control = replace(row, name=name)
        others, other_labels = sample_set(control).read()
        compared = compare(images, features, others, features_of(control, network), reference, network.name,
                           labels=labels, base_labels=other_labels, resamples=row.protocol.resamples,
                           seed=row.protocol.seed)
        made_of = [images_of(read(record_path(records, one.name))) for one in (row, control)]
        found.append(Contrast(row.name, name, (made_of[0], made_of[1]),
                              {metric: as_value(metric, value) for metric, value in compared.intervals.items()}))
    write_contrasts(found, row.contrasts)


def judge(row: Row, images: np.ndarray,
          labels: np.ndarray) -> tuple[dict[str, Value], dict[str, Value], str, dict[str, Any]]:
    """Quality metrics, differences to the baseline with intervals, the verdict, and what they were measured under."""
    from .metrics.evaluate import compare, conditions, distributions

    protocol = row.protocol
    network, reference = judges(row)
    features = features_of(row, network)
    settings = {"resamples": protocol.resamples, "seed": protocol.seed}
    tell(row, "intervals", 0, 1)
    metrics = {name: as_value(name, interval) for name, interval in
               distributions(features, labels, reference, network.name, **settings).items()}
    found = conditions(len(images), row.seed, labels, reference, network)
    if row.name == BASELINE:
        return metrics, {}, "", found
    base = row.baseline()
    base_images, base_labels = sample_set(base).read()
    comparison = compare(images, features, base_images, features_of(base, network), reference, network.name,
                         labels=labels, base_labels=base_labels,
                         paired_images=row.seed == base.seed, margin=protocol.margin, **settings)
    against = {name: as_value(name, interval) for name, interval in comparison.intervals.items()}
    return metrics, against, comparison.verdict, found


def judges(row: Row) -> tuple[Extractor, Reference]:
    """The network that looks at the images, and the real images' statistics they are measured against."""
    from .metrics.evaluate import open_reference
    from .metrics.features import extractor

    weights = Path(row.protocol.feature_weights) if row.protocol.feature_weights else None
    network = extractor(row.protocol.features, weights=weights, device=row.device)
    return network, open_reference(row.protocol.reference, network)


def features_of(row: Row, network: Extractor) -> Features:
    """What a network sees in a row's images; computed once, and kept for the rows that are compared with it."""
    from .metrics.features import FeatureSet

    sampled = sample_set(row)
    kept = FeatureSet(row.home / "features", sampled.count, network, sampled.shards.digest())
    kept.make(sampled.images, lambda done: tell(row, "features", done, sampled.count))
    return kept.read()


def clock(row: Row) -> None:
    """Time whole sampling runs, the row's in turns with the baseline's, and leave what this process found."""
    from .formats import load
    from .metrics.speed import alone, interleaved

    began = time.perf_counter()
    import_libraries(row)
    pipeline = load(row.saved).to(row.device)
    base = None if row.name == BASELINE else load(row.baseline().saved).to(row.device)
    found = {}
    settle = int(pipeline.runtime.in_openvino)  # its threads and PyTorch's stay awake a while, and slow each other
    for batch in sorted(row.protocol.latency_batches):
        tell(row, f"time batch {batch}", 0, 1)

        def run(which: Pipeline, batch: int = batch) -> None:
            which.sample(range(batch), seed=row.seed, batch=batch)

        rounds = row.protocol.rounds
        timed = (alone(lambda: run(pipeline), rounds, warmup=1) if base is None
                 else interleaved(lambda: run(base), lambda: run(pipeline), rounds, warmup=1, settle=settle))
        found[str(batch)] = asdict(timed)
    number = len(list(row.timings.glob("*.json")))
    write_json(row.timings / f"{number}.json", {"batches": found, "seconds": time.perf_counter() - began})


def clocked(row: Row) -> tuple[dict[str, Value], dict[str, Value], float]:
    """Latency and throughput of whole sampling runs, their ratios to the baseline, and the seconds that timing took.

    From what the row's processes left.
    """
    from .metrics.speed import SpeedComparison, Timing

    left = [json.loads(path.read_text()) for path in sorted(row.timings.glob("*.json"))]
    speeds: dict[str, Value] = {}
    ratios: dict[str, Value] = {}
    for batch in sorted(row.protocol.latency_batches):
        timed = Timing(tuple(SpeedComparison(**one["batches"][str(batch)]) for one in left))
        latency = timed.latency()
        speeds[f"latency_p50_batch{batch}"] = Value(latency.p50, n=timed.rounds, unit="s")
        speeds[f"latency_p95_batch{batch}"] = Value(latency.p95, n=timed.rounds, unit="s")
        speeds["throughput"] = Value(*timed.throughput(batch), timed.rounds, "images/s")  # of the largest batch
        if row.name != BASELINE:
            ratios[f"latency_ratio_batch{batch}"] = Value(*timed.ratio(), timed.rounds, "x")
            ratios["throughput_ratio"] = ratios[f"latency_ratio_batch{batch}"]
    return speeds, ratios, sum(one["seconds"] for one in left)


def retime(row: Row) -> None:
    """Put what the row's processes found in the place of the times in its record, and its peak memory anew."""
    from .compiling import warm_up
    from .formats import load

    import_libraries(row)
    started = held_already(row)
    pipeline = load(row.saved).to(row.device)
    warm_up(pipeline, max(row.protocol.latency_batches))
    memory = peak_memory(row, pipeline, started)
    record = read(record_path(Path(row.folder) / "records", row.name))
    speeds, ratios, seconds = clocked(row)
    metrics = {name: value for name, value in record.metrics.items() if not is_timed(name)} | speeds | {
        "peak_memory": memory}
    against = {name: value for name, value in record.against_baseline.items() if not is_timed(name)} | ratios
    remarks = [] if row.name == BASELINE else notes(row, record.images.sha256 if record.images else "", against)
    timed = provenance(seeds={"images": row.seed}, dtype=str(record.provenance["dtype"]), device=row.device,
                       threads=row.protocol.threads, command=row.command or None)
    settings = row.protocol.to_dict()
    again = replace(record, metrics=metrics, against_baseline=against, remarks=tuple(remarks),
                    protocol={**record.protocol, **{name: settings[name] for name in CLOCK}},
                    provenance={**record.provenance, "timed": timed}, seconds={**record.seconds, "speed": seconds})
    write(again, Path(row.folder) / "records")
    attach(row, pipeline, again)


def is_timed(metric: str) -> bool:
    """Whether a number of a record is by the clock."""
    return metric.startswith(("latency_", "throughput"))


def as_value(name: str, interval: Any) -> Value:
    """A metric's interval as a record keeps it."""
    from .metrics import METRICS

    metric = METRICS.get(name.removesuffix("_difference"))
    return Value(float(interval.value), interval.low, interval.high, interval.n, metric.unit if metric else "",
                 interval.bias)


def costs(row: Row, pipeline: Pipeline) -> dict[str, Value]:
    """What can be computed without running: MACs, FLOPs, parameters, bytes on disk."""
    from .metrics.cost import macs, parameters, run_macs

    forward = macs(pipeline.model.config).total
    return {
        "macs": Value(float(forward), unit="MACs"),
        "flops": Value(float(2 * forward), unit="FLOPs"),
        "run_macs": Value(float(run_macs(pipeline.model.config, pipeline.process, pipeline.sampling)), unit="MACs"),
        "parameters": Value(float(parameters(pipeline.model.config))),
        "size": Value(float((row.saved / "model.safetensors").stat().st_size), unit="bytes"),
    }


def notes(row: Row, sampled: str, against: Mapping[str, Value]) -> list[str]:
    """What must be said of a row: that it changed nothing, or is no faster."""
    said = []
    baseline = read(record_path(Path(row.folder) / "records", BASELINE))
    if baseline.images and sampled == baseline.images.sha256:
        said.append("no effect")
    slower = [name.removeprefix("latency_ratio_") for name, value in against.items()
              if name.startswith("latency_ratio") and value.high is not None and value.high < 1]
    whole = against.get("throughput_ratio")
    if whole is not None and whole.high is not None and whole.high < 1:
        said.append("slower")
    elif whole is not None and whole.low is not None and whole.high is not None and whole.low <= 1 <= whole.high:
        said.append("no speed effect")
    elif slower:
        said.append(f"slower at {', '.join(slower).replace('batch', 'batch ')}")
    return said


def resolved(row: Row, pipeline: Pipeline, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol as it came to be for this row: its conditions, the model measured, its sampling and runtime."""
    return {**row.protocol.to_dict(), "model": row.model, "row_model": model_hash(row.saved),
            "row_sampling": pipeline.sampling.to_dict(), "row_runtime": asdict(pipeline.runtime),
            "conditions": dict(conditions)}


def recipe_dict(row: Row) -> dict[str, Any]:
    """The resolved recipe, or an empty one."""
    from .recipe import parse

    return parse(row.recipe, row.name).to_dict() if row.recipe is not None else {}


def model_hash(folder: Path) -> str:
    """The hash of a saved model: its weights and its config."""
    from .sample_set import file_hash

    return file_hash(folder / "model.safetensors")[:16] + file_hash(folder / "config.json")[:16]


@dataclass
class Stopwatch:
    """Wall-clock seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def tell(row: Row, stage: str, done: int, total: int) -> None:
    """Tell the bench how far the row is."""
    print(json.dumps({"row": row.name, "stage": stage, "done": done, "total": total}), flush=True)  # noqa: T201


def end_with_bench() -> None:
    """End this process when the bench that started it does: its end of our standard input closes."""
    while os.read(0, 1024):  # not sys.stdin, whose lock a waiting thread would hold as the process ends
        pass
    os._exit(1)


def die_first() -> None:
    """Where memory runs out, the kernel is to end this process and not the bench."""
    with suppress(OSError):  # where there is no such file, it chooses by itself
        Path("/proc/self/oom_score_adj").write_text("1000")


def how_it_failed(error: Exception) -> tuple[Status, str]:
    """A record's status and reason for an error."""
    reason = " ".join(str(error).split())[:600] or type(error).__name__
    if says(error, *OUT_OF_MEMORY):
        return "out_of_memory", reason
    if says(error, *DISK_FULL):
        return "failed", f"the disk is full: {reason}"
    if getattr(error, "exit_code", 1) == 3:
        return "refused", reason
    if isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):
        return "failed", reason
    return "crashed", f"{type(error).__name__}: {reason}"


OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError", "allocate memory")
DISK_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def says(error: BaseException | None, *words: str) -> bool:
    """Whether an error, or one that it came from, is called so or says so."""
    while error is not None:
        if any(word in f"{type(error).__name__}: {error}" for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


STAGES: Mapping[str, Callable[[Row], Any]] = {"prepare": prepare, "clock": clock, "measure": measure,
                                              "retime": retime, "contrast": contrast}


def main() -> None:
    """Run a stage; an error is told to the bench as one line, and to the log in full."""
    threading.Thread(target=end_with_bench, daemon=True).start()
    die_first()
    stage, spec = sys.argv[1:]
    row = Row.from_dict(json.loads(Path(spec).read_text()))
    try:
        STAGES[stage](row)
    except Exception as error:
        status, reason = how_it_failed(error)
        print(json.dumps({"status": status, "reason": reason}), flush=True)  # noqa: T201
        if says(error, *DISK_FULL):  # room for the record, and for the other rows
            shutil.rmtree(row.home, ignore_errors=True)
        with suppress(OSError):
            traceback.print_exc()
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
