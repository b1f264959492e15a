"""What stands behind the verbs `sample`, `evaluate`, `train`, `encode` and `inspect`; results are dictionaries."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .compiling import warm_up
from .files import write_json, write_text, writing
from .formats import describe, load, save, size_on_disk
from .metrics import METRICS
from .metrics.cost import macs, parameters, run_macs
from .metrics.speed import keep_freed_memory
from .models.autoencoder import autoencoder_from_dict
from .models.dit import DiT, DiTConfig
from .pipeline import Pipeline
from .report.card import model_card
from .report.charts import curve_svg, grid_png
from .report.record import provenance
from .sample_set import SampleSet, fingerprint
from .sampling.solvers import evaluations
from .training.data import open_data
from .training.encode import EncodedLatents
from .training.loop import Progress, read_curve, train
from .training.plan import DataPlan, ModelPlan, TrainingPlan, read_plan
from .workers import Workers, workers

if TYPE_CHECKING:
    from rich.console import Console

    from .metrics.features import Extractor, Features

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what, total) to a progress bar."""


def sample_images(pipeline: Pipeline, count: int, folder: Path, form: str, label: int | None, batch: int, seed: int,
                  resume: bool, dry_run: bool, bar: Bar, loaded: float = 0.0) -> dict[str, Any]:
    """Make `count` images and write them as PNG files, a grid or ADM's `.npz`.

    `seconds` are told apart: set-up (`loaded`, which it took to load the model), compiling, and sampling with neither.

    Raises:
        ValueError: the form is unknown, or the folder holds images already.
    """
    if form not in ("png", "grid", "npz"):
        raise ValueError(f"sample: form {form!r} is unknown; use png, grid or npz")
    told = {"images": count, "sampling": pipeline.sampling.to_dict(), "seed": seed, "out": str(folder),
            "model evaluations": count * evaluations(pipeline.process, pipeline.sampling)}
    if dry_run:
        return told
    together = workers()
    origin = {"model": pipeline.name, "sampling": pipeline.sampling.to_dict(), "runtime": asdict(pipeline.runtime)}
    sampled = SampleSet(folder / "shards", count, seed, batch, origin, label)
    begin_together(sampled, resume, together)
    compiling = [0.0]
    began = time.perf_counter()
    sample_together(sampled, pipeline, together, partial(bar, "sampling"),
                    lambda: compiling.append(warm_up(pipeline, batch)))
    seconds = {"set-up": loaded, "compile": sum(compiling), "sample": time.perf_counter() - began - sum(compiling)}
    if not together.first:
        return told
    told["seconds"] = {name: round(spent, 3) for name, spent in seconds.items()}
    images, labels = sampled.read()
    return {**told, "files": write_images(images, labels, folder, form), "sha256": fingerprint(images)}


def begin_together(sampled: SampleSet, resume: bool, together: Workers) -> None:
    """Refuse a folder that holds images, unless it is to be gone on with, before anything is made.

    Raises:
        FileExistsError: it does.
    """
    if together.first:
        begin_folder(sampled.folder, resume)
    together.wait()


def sample_together(sampled: SampleSet, pipeline: Pipeline, together: Workers,
                    bar: Callable[[int], AbstractContextManager], before: Callable[[], None] = lambda: None) -> None:
    """Make a set of images, this worker's part of it; they are all there when this returns.

    Raises:
        ValueError: the folder holds images of something else.
    """
    keep_freed_memory()
    with bar(sampled.count) as progress:
        sampled.make(pipeline, progress, worker=together.index, workers=together.count, before=before)
    together.wait()


def write_images(images: np.ndarray, labels: np.ndarray, folder: Path, form: str) -> list[str]:
    """Write images in the form asked for; returns the paths (the first three of many)."""
    if form == "npz":
        path = folder / "samples.npz"
        with writing(path) as beside, beside.open("wb") as file:
            np.savez(file, arr_0=images, arr_1=labels)
        return [str(path)]
    if form == "grid":
        path = folder / "grid.png"
        grid_png(images, max(1, round(len(images) ** 0.5)), path, scale=2 if images.shape[1] < 128 else 1)
        return [str(path)]
    for image_id, image in enumerate(images):
        grid_png(image[None], 1, folder / f"{image_id:06d}.png", gap=0)
    return [str(folder / f"{image_id:06d}.png") for image_id in range(min(3, len(images)))]


def begin_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that holds images, unless it is to be gone on with.

    Raises:
        FileExistsError: it does.
    """
    if (folder / "manifest.json").exists() and not resume:
        raise FileExistsError(f"{folder} holds images already: add --resume to go on with them, or name another folder "
                              "with --out")


def evaluate_model(source: str, against: str | None, open_model: Callable[[str], Pipeline], *, reference: str,
                   features: str, feature_weights: Path | None, download: bool, images: int, batch: int, folder: Path,
                   seed: int, device: str, resume: bool, dry_run: bool, progress: Bar) -> dict[str, Any]:
    """Quality and cost of a model, or quality of an `.npz` of samples, beside another where given.

    Raises:
        Refused: the two have different numbers of images, or different labels.
        ValueError: a file is refused.
    """
    from .metrics.evaluate import compare, distributions, open_reference
    from .metrics.features import extractor

    told = {"model": source, "against": against, "images": images, "seed": seed, "features": features,
            "reference": reference}
    if dry_run:
        return told
    together = workers()
    network = extractor(features, weights="download" if download else feature_weights, device=device)

    target = open_reference(reference, network) if together.first else None

    def make(source: str, name: str) -> Callable[[], Seen]:
        if source.endswith(".npz"):
            return partial(see_file, Path(source), network)
        return make_and_see(source, open_model(source), folder / name, network, images, batch, seed, resume, together,
                            progress)

    see, see_against = make(source, "model"), None if against is None else make(against, "against")
    if target is None:
        return told
    first = see()
    result: dict[str, Any] = {**told, "images": len(first.images), "definition": network.definition,
                              "metrics": as_plain(distributions(first.features, first.labels, target, network.name)),
                              "cost": first.cost, "sha256": fingerprint(first.images)}
    if see_against is not None:
        second = see_against()
        comparison = compare(first.images, first.features, second.images, second.features, target, network.name,
                             labels=first.labels, base_labels=second.labels)
        result |= {"against_metrics": as_plain(distributions(second.features, second.labels, target, network.name)),
                   "comparison": as_plain(comparison.intervals), "verdict": comparison.verdict,
                   "against_cost": second.cost}
    return result


@dataclass(frozen=True)
class Seen:
    """Images with what a feature network sees in them, and what the model that made them costs, where one did."""

    images: np.ndarray
    labels: np.ndarray | None
    features: Features
    cost: Mapping[str, Any]


def see_file(path: Path, network: Extractor) -> Seen:
    """The images of an `.npz` file."""
    from .metrics.adm import read_samples

    images, labels = read_samples(path)
    return Seen(images, labels, network(images, range(len(images))), {})


def make_and_see(source: str, pipeline: Pipeline, folder: Path, network: Extractor, count: int, batch: int, seed: int,
                 resume: bool, together: Workers, bar: Bar) -> Callable[[], Seen]:
    """Make a model's images and their features together, resumed where they stopped; returns what reads them."""
    from .metrics.features import FeatureSet

    sampled = SampleSet(folder, count, seed, batch, {"model": source, "sampling": pipeline.sampling.to_dict(),
                                                     "runtime": asdict(pipeline.runtime)})
    begin_together(sampled, resume, together)
    sample_together(sampled, pipeline, together, partial(bar, f"sampling {source}"))
    features = FeatureSet(folder / f"features-{network.name}", count, network, sampled.shards.digest())
    with bar(f"features of {source}", count) as progress:
        features.make(sampled.images, progress, worker=together.index, workers=together.count)
    together.wait()
    return lambda: Seen(*sampled.read(), features.read(), {**costs(pipeline), "sampling": pipeline.sampling.to_dict()})


def check_conformance(folder: Path, weights: Path | None, download: bool, batch: int, device: str, dry_run: bool,
                      bar: Bar) -> dict[str, Any]:
    """Measure ADM's published sample with the weights in its folder, unless others are named.

    `checks` says of every metric how far it is from what was published; `misses` are those that are too far.

    Raises:
        FileNotFoundError: the sample, the reference batch or the weights are missing.
        ValueError: a file is not what it should be; the weights by their checksum.
    """
    from .metrics import conformance as room
    from .metrics.features import extractor

    path = "download" if download else weights or room.weights_in(folder)
    told = {"sample": str(folder / room.SAMPLE), "reference": str(folder / room.REFERENCE), "weights": str(path)}
    for name in ("sample", "reference"):
        if not Path(told[name]).is_file():
            raise FileNotFoundError(f"there is no {told[name]}: download ADM's {name} batch of ImageNet 256 x 256, "
                                    "which github.com/openai/guided-diffusion names under evaluations")
    if dry_run:
        return told
    network = extractor("inception", weights=path, device=device)
    with bar("features", room.IMAGES) as progress:
        checks = room.conformance(folder, network, batch=batch, progress=progress)
    misses = [str(check) for check in checks if not check.holds]
    return {**told, "definition": network.definition, "metrics": {check.metric: check.found for check in checks},
            "checks": [str(check) for check in checks], "misses": misses, "holds": not misses}


def export_model(pipeline: Pipeline, source: str, folder: Path, form: str) -> dict[str, Any]:
    """Write a pipeline in a format, and say what was written."""
    save(pipeline, folder, format=form)
    return {"model": source, "format": form, "out": str(folder),
            "files": sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()),
            "bytes": size_on_disk(folder)}


def costs(pipeline: Pipeline) -> dict[str, Any]:
    """What can be computed of a pipeline without running it."""
    config = pipeline.model.config
    forward = macs(config).total
    return {"parameters": parameters(config), "macs": forward, "flops": 2 * forward,
            "run_macs": run_macs(config, pipeline.process, pipeline.sampling),
            "evaluations per image": evaluations(pipeline.process, pipeline.sampling)}


def as_plain(intervals: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals as JSON-ready dictionaries."""
    return {name: {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n,
                   "bias": interval.bias}
            for name, interval in intervals.items()}


def training_plan(path: Path | None, *, preset: str | None, data: str | None, size: int | None,
                  changes: Mapping[str, Any]) -> TrainingPlan:
    """The plan in a file, or one of a preset and a data set; with the changes that are not None.

    Raises:
        ValueError: neither is given, or a value is refused.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if path is not None:
        if preset is not None:
            raise ValueError("train: give a plan or --preset, not both")
        plan = read_plan(path)
        where: dict[str, Any] = {name: value for name, value in (("source", data), ("size", size)) if value is not None}
        return replace(plan, training=replace(plan.training, **given), data=replace(plan.data, **where))
    if preset is None or data is None or "steps" not in given:
        raise ValueError("train: give a plan (a TOML file), or --preset, --data and --steps")
    from .training.loop import TrainConfig

    return TrainingPlan(name=preset.replace("/", "-"), model=ModelPlan(preset=preset), data=DataPlan(data, size),
                        training=TrainConfig(**given))


def train_model(plan: TrainingPlan, folder: Path, device: str | None, resume: bool, dry_run: bool,
                console: Console) -> dict[str, Any]:
    """Train a plan's model; write checkpoints and the curve as it goes, then the model and its record."""
    data = open_data(plan.data.source, size=plan.data.size, split=plan.data.split, flip=plan.data.flip)
    config = plan.model.config(data.shape, data.classes)
    told = {"plan": plan.name, "parameters": parameters(config), "data": plan.data.source, "images in data": len(data),
            "steps": plan.training.steps, "images seen": plan.training.steps * plan.training.batch, "out": str(folder)}
    if dry_run:
        return told
    model = first_model(plan, config)
    pipeline = Pipeline(model, sampling=plan.sampling, name=plan.name)
    if isinstance(data, EncodedLatents):
        pipeline = pipeline.replace(autoencoder=autoencoder_from_dict(data.autoencoder))
    with training_bar(console, plan.training.steps) as show:
        train(model, pipeline.process, data, plan.training, folder, resume=resume, device=device, report=show)
    if int(os.environ.get("RANK", "0")) == 0:
        save_trained(pipeline, plan, folder, told)
    return {**told, "model": str(folder / "model")}


def first_model(plan: TrainingPlan, config: DiTConfig) -> DiT:
    """The model that training begins with: random weights, or those of the model the plan starts from.

    Raises:
        ValueError: that model has another structure than the plan.
    """
    if plan.start_from is None:
        torch.manual_seed(plan.training.seed)
        return DiT(config)
    model = load(plan.start_from).model
    if model.config != config:
        changed = [name for name, value in model.config.to_dict().items() if config.to_dict()[name] != value]
        raise ValueError(f"train: {plan.start_from} and the plan differ in {', '.join(changed)}: give the plan the "
                         "structure of the model it starts from")
    return model


def save_trained(pipeline: Pipeline, plan: TrainingPlan, folder: Path, told: Mapping[str, Any]) -> None:
    """The model with its averaged weights, what it took, and its curve as a picture."""
    save(pipeline, folder / "model", dtype=plan.stored)
    training = {"data": plan.data.source, "steps": plan.training.steps, "batch": plan.training.batch,
                "learning_rate": plan.training.learning_rate, "ema": plan.training.ema}
    write_text(folder / "model" / "README.md", model_card(plan.name, [{"train": training}], [], METRICS))
    curve = read_curve(folder / "curve.jsonl")
    write_text(folder / "curve.svg", curve_svg([(row["images"], row["loss"]) for row in curve],
                                               title=f"{plan.name}: training loss"))
    write_json(folder / "record.json", {
        **told, "training": asdict(plan.training), "final loss": curve[-1]["loss"],
        "seconds": round(sum(row["seconds"] for row in curve), 1),
        "provenance": provenance(seeds={"training": plan.training.seed})})


def training_bar(console: Console, steps: int) -> Any:
    """A progress bar with loss and images/s, whose value takes a `Progress`."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    @contextmanager
    def bar() -> Any:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
                   TimeRemainingColumn())
        with Bars(*columns, console=console) as bars:
            task = bars.add_task("", total=steps)

            def show(progress: Progress) -> None:
                bars.update(task, completed=progress.step, description=f"loss {progress.loss:.4f}  "
                                                                       f"{progress.images_per_second:.0f} images/s")
                if not console.is_terminal:
                    console.print(f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f}  "
                                  f"{progress.images_per_second:.0f} images/s", highlight=False)

            yield show

    return bar()


def encode_images(source: str, autoencoder: str, folder: Path, *, size: int | None, batch: int, shard: int, worker: int,
                  workers: int, flips: bool, seed: int, device: str, resume: bool, dry_run: bool,
                  progress: Bar) -> dict[str, Any]:
    """Encode a data set's images to latents, this worker's shards of them.

    Raises:
        FileExistsError: the folder holds latents, and neither resuming nor several workers were asked for.
    """
    from .models.autoencoder import KLAutoencoder
    from .training.encode import encode

    data = open_data(source, size=size)
    told = {"data": source, "images": len(data), "out": str(folder), "worker": f"{worker} of {workers}"}
    if dry_run:
        return told
    if folder.exists() and any(folder.iterdir()) and not resume and workers == 1:
        raise FileExistsError(f"{folder} is not empty: add --resume to go on with it, or name another with --out")
    with progress("encoding", len(data)) as show:
        whole = encode(data, KLAutoencoder(autoencoder).to(device), folder, source=source, flips=flips, batch=batch,
                       shard=shard, seed=seed, worker=worker, workers=workers, progress=lambda done, total: show(done))
    return {**told, "whole": whole}


def inspect_checkpoint(source: str, weights: str, heads: int | None) -> dict[str, Any]:
    """What a checkpoint is, what it costs, and which methods apply to it here."""
    from .methods import METHODS
    from .recipe import applicable

    found = describe(source)
    pipeline = load(source, weights=weights, heads=heads)
    return {**found, "sampling": pipeline.sampling.to_dict(), "cost": costs(pipeline),
            "methods": {name: applicable(name, pipeline) for name in METHODS}}
