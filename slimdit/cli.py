"""The command line: one short function per verb, and the same manners for all of them.

Results go to stdout (one JSON document with `--json`), progress and logs to stderr. Exit codes: 0 done, 1 failed, 2
usage, 3 refused by a rule, 4 quality gate not met, 5 interrupted and resumable. PyTorch is imported only by the verbs
that need it; `--help` and `list` do without what is imported here, too: `__main__.py`.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console

from .answers import colorful, document, kept, lines

if TYPE_CHECKING:
    from .pipeline import Pipeline

P = ParamSpec("P")

FAILED, REFUSED, GATE, INTERRUPTED = 1, 3, 4, 5
FIRST = os.environ.get("RANK", "0") == "0"  # of the processes that share a run, the one that speaks

app = typer.Typer(name="slimdit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Make a trained diffusion transformer cheaper to run, with proof that quality holds.")
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... [default: cuda where there is one]")]
Compile = Annotated[str | None, typer.Option("--compile", metavar="yes|no|auto|openvino", help="Whether to compile the "
                                             "model; auto: where it pays; openvino: by that engine. "
                                             "[default: as the model says]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: as the model says]")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, for how long and in how much room.")]
Weights = Annotated[str, typer.Option(help="Which weights of a training checkpoint: ema or model.")]
Vae = Annotated[str | None, typer.Option("--autoencoder", help="AutoencoderKL: a diffusers folder or a Hub id.")]
Steps = Annotated[int | None, typer.Option(help="Steps, instead of the model's.")]
Solver = Annotated[str | None, typer.Option(help="Solver, instead of the model's: see `list solvers`.")]
Spacing = Annotated[str | None, typer.Option(help="Timestep spacing, instead of the model's: see `list solvers`.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance, instead of the model's; 1 is none.")]
Heads = Annotated[int | None, typer.Option(help="Attention heads, where a checkpoint does not tell.")]


def main() -> None:
    """The `slimdit` command."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    app()


def verb(function: Callable[P, Any]) -> Callable[P, None]:
    """Give a verb the common manners: an error is one sentence on stderr and an exit code that says its kind."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as stop:
            _fail(str(stop) or "interrupted; run the same command with --resume to go on", INTERRUPTED)
        except (ValueError, OSError, ImportError, MemoryError) as error:
            _fail(_sentence(error), getattr(error, "exit_code", FAILED))

    return run


@app.command()
@verb
def bench(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipe files, or names of shipped recipes.")] = None,
    model: Annotated[str | None, typer.Option(help="What to make cheaper, instead of what the recipes name: a path, "
                                              "'bundled' or a Hub id.")] = None,
    protocol: Annotated[str, typer.Option(help="How to measure: a shipped protocol or a TOML file.")] = "quick",
    folder: Annotated[Path, typer.Option("--out", help="Where records and the report go.")] = Path("runs/bench"),
    images: Annotated[int | None, typer.Option(help="Images per row, instead of the protocol's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the images, instead of the protocol's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Carry out each recipe with so many seeds, a row for each.")] = 1,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="The baseline's dtype. [default: the machine's best]")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds a row may take, instead of the protocol's.")] = None,
    fail_if: Annotated[str | None, typer.Option(help="Exit with 4 if any row ends so: loss, slower, failed.")] = None,
    retime: Annotated[bool, typer.Option("--retime", help="Time finished rows again, and go on with others.")] = False,
    resume: Resume = False, dry_run: DryRun = False, as_json: Json = False,
) -> None:
    """Measure a baseline and every recipe against it: records, table, plots and an HTML report.

    With no recipe: a short tour of shipped ones, in minutes.
    """
    from . import bench as room

    plan = room.plan(recipes or [], model=model, protocol=protocol, folder=folder, images=images, seed=seed,
                     seeds=seeds, device=device, dtype=dtype, timeout=timeout)
    if dry_run:
        _answer(plan.describe(), as_json)
        return
    stops = room.gate(fail_if) if fail_if else None
    records = room.run(plan, resume=resume, retime=retime, console=err)
    if as_json:
        _print_json({"folder": str(folder), "report": str(folder / "report.html"),
                     "rows": room.plain(records)})
    else:
        out.print(room.table(records))
        out.print(f"Report: {folder / 'report.html'}")
    if stops and (bad := stops(records)):
        _fail(f"quality gate: {', '.join(bad)} ended as '{fail_if}'", GATE)


@app.command()
@verb
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    folder: Annotated[Path, typer.Option("--out", help="Where the model goes: a new folder.")],
    model: Annotated[str | None, typer.Option(help="The model, instead of the recipe's.")] = None,
    data: Annotated[str | None, typer.Option(help="Images, for methods that learn or calibrate.")] = None,
    diffusers: Annotated[bool, typer.Option("--diffusers", help="Also write DIR/diffusers for diffusers.")] = False,
    seed: Seed = 0, device: Device = None, weights: Weights = "ema", heads: Heads = None, autoencoder: Vae = None,
    resume: Resume = False, dry_run: DryRun = False, as_json: Json = False,
) -> None:
    """Apply a recipe and save the model, with its recipe."""
    from . import recipe as room

    chosen = room.find(recipe)
    source = model or chosen.model
    if dry_run:
        _answer({"recipe": chosen.to_dict(), "model": source, "out": str(folder)}, as_json)
        return
    from .context import Context
    from .files import write_text
    from .formats import save
    from .metrics import METRICS
    from .report.card import model_card
    from .training.data import open_data

    pipeline = _load(source, device, None, weights, heads, autoencoder)
    room.check(chosen, pipeline)  # the twin, in seconds: what its last method refuses is refused before the first works
    context = Context(teacher=pipeline, folder=folder, data=open_data(data) if data else None,
                      device=str(pipeline.device), seed=seed,
                      report=lambda line: err.print(line, highlight=False, markup=False))
    made = room.run(chosen, pipeline, context, resume=resume)
    write_text(folder / "README.md", model_card(chosen.name, made.history, [], METRICS))
    if diffusers:
        save(made, folder / "diffusers", format="diffusers")
    _answer({"model": str(folder), "recipe": chosen.name, "witness": list(context.witnesses)}, as_json)


@app.command()
@verb
def sample(
    model: Annotated[str, typer.Argument(help="A path, 'bundled' or a Hub id.")],
    images: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    folder: Annotated[Path, typer.Option("--out", help="Where the images go.")] = Path("runs/samples"),
    form: Annotated[str, typer.Option("--form", help="png (a file each), grid (one PNG) or npz (ADM's).")] = "grid",
    label: Annotated[int | None, typer.Option(help="One class for all images. [default: balanced]")] = None,
    steps: Steps = None, solver: Solver = None, spacing: Spacing = None, guidance: Guidance = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    seed: Seed = 0, device: Device = None, dtype: Dtype = None, weights: Weights = "ema", heads: Heads = None,
    autoencoder: Vae = None,
    compile_model: Compile = None,
    resume: Resume = False, dry_run: DryRun = False, as_json: Json = False,
) -> None:
    """Make images: PNG files, a grid, or ADM's `.npz`.

    Under `accelerate launch -m slimdit.cli sample ...` many processes share them, and one folder.
    """
    from .commands import sample_images
    from .compiling import as_asked

    began = time.perf_counter()
    pipeline = _load(model, device, dtype, weights, heads, autoencoder,
                     steps=steps, solver=solver, spacing=spacing, guidance=guidance)
    loaded = time.perf_counter() - began
    if not dry_run:
        pipeline = as_asked(pipeline, compile_model, images, batch, err.print)
    _answer(sample_images(pipeline, images, folder, form, label, batch, seed, resume, dry_run, _progress, loaded),
            as_json)


@app.command()
@verb
def evaluate(
    model: Annotated[str | None, typer.Argument(help="A path, 'bundled', a Hub id, or an .npz of samples.")] = None,
    against: Annotated[str | None, typer.Option(help="A model or .npz to compare with, image by image.")] = None,
    reference: Annotated[str, typer.Option(help="'bundled', or an .npz of images or statistics.")] = "bundled",
    features: Annotated[str, typer.Option(help="lite0, or inception (with its weights).")] = "lite0",
    feature_weights: Annotated[Path | None, typer.Option(help="File of the feature network's weights.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the feature weights, checked by hash.")] = False,
    conformance: Annotated[Path | None, typer.Option(help="Measure ADM's published sample in this folder.")] = None,
    images: Annotated[int, typer.Option(min=2, help="How many images.")] = 1000,
    steps: Steps = None, solver: Solver = None, spacing: Spacing = None, guidance: Guidance = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    folder: Annotated[Path, typer.Option("--out", help="Where samples are kept.")] = Path("runs/evaluate"),
    seed: Seed = 0, device: Device = None, dtype: Dtype = None, weights: Weights = "ema", heads: Heads = None,
    autoencoder: Vae = None,
    compile_model: Compile = None,
    resume: Resume = False, dry_run: DryRun = False, as_json: Json = False,
) -> None:
    """Quality and cost of one model, paired with another where given.

    With --conformance and no model: whether ADM's published sample scores what was published, and 4 if not. The folder
    holds VIRTUAL_imagenet256_labeled.npz, admnet_guided_upsampled_imagenet256.npz and Inception's weights.
    Under `accelerate launch -m slimdit.cli evaluate ...` many processes share the images, and one folder.
    """
    from .commands import check_conformance, evaluate_model
    from .compiling import as_asked

    if conformance is not None and model is None:
        told = check_conformance(conformance, feature_weights, download, batch, _device(device), dry_run, _progress)
        _answer(told, as_json)
        if misses := told.get("misses"):
            _fail("conformance: " + "; ".join(misses), GATE)
        return
    if model is None or conformance is not None:
        raise ValueError("evaluate: give a model or an .npz of samples, or --conformance with a folder, and not both")

    def open_model(source: str) -> Pipeline:
        opened = _load(source, device, dtype, weights, heads, autoencoder,
                       steps=steps, solver=solver, spacing=spacing, guidance=guidance)
        return opened if dry_run else as_asked(opened, compile_model, images, batch, err.print)

    _answer(evaluate_model(model, against, open_model, reference=reference, features=features,
                           feature_weights=feature_weights, download=download, images=images, batch=batch,
                           folder=folder, seed=seed, device=_device(device), resume=resume, dry_run=dry_run,
                           progress=_progress), as_json)


@app.command()
@verb
def export(
    model: Annotated[str, typer.Argument(help="A path, 'bundled' or a Hub id.")],
    folder: Annotated[Path, typer.Option("--out", help="Where it goes: a new folder.")],
    form: Annotated[str, typer.Option("--format", help="openvino, diffusers or native: see `list formats`.")]
    = "openvino",
    steps: Steps = None, solver: Solver = None, spacing: Spacing = None, guidance: Guidance = None,
    weights: Weights = "ema", heads: Heads = None, autoencoder: Vae = None, as_json: Json = False,
) -> None:
    """Write a model for another program: OpenVINO or diffusers, or as slimdit's own folder.

    What OpenVINO gains here, `bench` measures: a recipe with compile = {engine = "openvino"}.
    """
    from .commands import export_model

    pipeline = _load(model, "cpu", None, weights, heads, autoencoder, steps=steps, solver=solver, spacing=spacing,
                     guidance=guidance)
    _answer(export_model(pipeline, model, folder, form), as_json)


@app.command()
@verb
def train(
    plan: Annotated[Path | None, typer.Argument(help="A training plan (TOML), or use --preset and --data.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where checkpoints and the model go.")] = Path("runs/train"),
    preset: Annotated[str | None, typer.Option(help="XS/4, S/2 ...: see `list presets`.")] = None,
    data: Annotated[str | None, typer.Option(help="fashion-mnist, a folder, .npz, hf:NAME, latents.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step, over all processes.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Device = None, resume: Resume = False, dry_run: DryRun = False, as_json: Json = False,
) -> None:
    """Train a model from a plan or a preset; interrupted, it resumes to the bit.

    Under `accelerate launch -m slimdit.cli train ...` the same command uses many GPUs.
    """
    from .commands import train_model, training_plan

    chosen = training_plan(plan, preset=preset, data=data, size=size,
                           changes={"steps": steps, "batch": batch, "learning_rate": learning_rate, "seed": seed})
    _answer(train_model(chosen, folder, device, resume, dry_run, err), as_json)


@app.command()
@verb
def encode(
    data: Annotated[str, typer.Argument(help="fashion-mnist, a folder, an .npz or hf:NAME.")],
    autoencoder: Annotated[str, typer.Option(help="A diffusers AutoencoderKL: a folder or a Hub id.")],
    folder: Annotated[Path, typer.Option("--out", help="Where the latents go; workers may share it.")],
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    shard: Annotated[int, typer.Option(min=1, help="Images per file.")] = 1024,
    worker: Annotated[int, typer.Option(min=0, help="Which of the workers this is, from 0.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="How many workers share the folder.")] = 1,
    flips: Annotated[bool, typer.Option(help="Keep the mirrored image's latents too.")] = True,
    seed: Seed = 0, device: Device = None, resume: Resume = False, dry_run: DryRun = False, as_json: Json = False,
) -> None:
    """Encode images to latents once, for `train`."""
    from .commands import encode_images

    _answer(encode_images(data, autoencoder, folder, size=size, batch=batch, shard=shard, worker=worker,
                          workers=workers, flips=flips, seed=seed, device=_device(device), resume=resume,
                          dry_run=dry_run, progress=_progress), as_json)


@app.command()
@verb
def inspect(
    file: Annotated[str | None, typer.Argument(help="A checkpoint: a file, a folder, 'bundled' or a Hub id.")] = None,
    heads: Heads = None, weights: Weights = "ema",
    roofline: Annotated[bool, typer.Option("--roofline", help="Measure where the time goes, against this machine's "
                                           "peak. Takes presets too; without FILE: XS/4, S/2, B/2.")] = False,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at a time, with --roofline; more than once "
                                                    "for several. [default: 1, 8, 32]")] = None,
    dtype: Annotated[str | None, typer.Option(help="With --roofline. [default: the machine's best]")] = None,
    compile_model: Annotated[bool, typer.Option("--compile/--eager", help="With --roofline.")] = True,
    update: Annotated[Path | None, typer.Option(help="A Markdown file whose table `roofline` is to be rendered "
                                                "anew.")] = None,
    as_json: Json = False,
) -> None:
    """What a checkpoint is: format, structure, size, MACs, and what can be applied to it here."""
    if roofline:
        from . import roofline as room
        from .report.record import provenance
        from .report.render import update_markdown

        settings = room.Settings(tuple(batch or room.BATCHES), dtype, compile_model)
        rows = room.measure_all([file] if file else room.MODELS, settings, lambda line: err.print(line))
        where = provenance(dtype=rows[0]["dtype"], threads=rows[0]["threads"])
        if update:
            update_markdown(update, "roofline", room.table(rows, where))
        sys.stdout.write(document({"rows": rows, "provenance": where}) if as_json else room.table(rows, where) + "\n")
        return
    if file is None:
        raise ValueError("inspect: name a checkpoint: a file, a folder, 'bundled' or a Hub id")
    from .commands import inspect_checkpoint

    _answer(inspect_checkpoint(file, weights, heads), as_json)


@app.command()
@verb
def check(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    model: Annotated[str | None, typer.Option(help="The model, instead of the recipe's.")] = None,
    as_json: Json = False,
) -> None:
    """Run a whole recipe on the tiny twin of its model, in seconds."""
    from . import recipe as room

    chosen = room.find(recipe)
    pipeline = _load(model or chosen.model, "cpu", None, "ema", None)
    _answer({"recipe": chosen.name, "witness": room.check(chosen, pipeline)}, as_json)


@app.command()
@verb
def sensitivity(
    model: Annotated[str, typer.Argument(help="A path, 'bundled' or a Hub id.")],
    folder: Annotated[Path, typer.Option("--out", help="Where the numbers and their heat map go.")],
    perturb: Annotated[str, typer.Option(help="What happens to a layer: int8 and its like, prune or drop.")] = "int8",
    bins: Annotated[int, typer.Option(help="Bins of the timesteps that sampling visits.")] = 5,
    images: Annotated[int, typer.Option(help="Images sampled to gather what the model sees.")] = 16,
    calls: Annotated[int, typer.Option(help="Calls of the model measured in each bin.")] = 4,
    minutes: Annotated[float, typer.Option(min=0, help="After which no further layer is begun.")] = 5.0,
    steps: Steps = None, solver: Solver = None, spacing: Spacing = None, guidance: Guidance = None,
    seed: Seed = 0, device: Device = None, weights: Weights = "ema", heads: Heads = None, resume: Resume = False,
    dry_run: DryRun = False, as_json: Json = False,
) -> None:
    """Which layers matter, and at which timesteps: the error when one alone is rounded, pruned or dropped."""
    from . import sensitivity as room

    settings = room.Settings(perturb, bins, images, calls, seed)
    pipeline = _load(model, device, None, weights, heads, steps=steps, solver=solver, spacing=spacing,
                     guidance=guidance)
    if dry_run:
        _answer({"model": model, "out": str(folder), **room.plan(pipeline, settings, minutes)}, as_json)
        return
    found = room.measure(pipeline, settings, folder, source=model, minutes=minutes, resume=resume, bar=_progress)
    if as_json:
        _print_json({"out": str(folder), **room.plain(found)})
        return
    out.print(room.table(found))
    if found.missing:
        out.print(f"{len(found.totals)} of {len(found.layers)} layers in the time given: the same command with "
                  "--resume measures the rest")
    out.print(f"Heat map: {folder / room.HEAT_MAP}")


@app.command()
@verb
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `bench` wrote.")],
    update: Annotated[Path | None, typer.Option(help="A Markdown file whose tables are to be rendered anew.")] = None,
    name: Annotated[str, typer.Option(help="The bench's name in that file's markers.")] = "demo",
    figures: Annotated[Path | None, typer.Option(help="A folder for its pictures: fronts, sweeps, routing, "
                                                 "images.")] = None,
    as_json: Json = False,
) -> None:
    """Render the records of a folder: table, report.html, and where asked pictures and the tables of a page."""
    from . import bench as room

    records = room.read_records(folder)
    room.write_report(folder, records)
    if update:
        room.update_page(update, name, folder, records)
    if figures:
        room.write_figures(folder, records, figures)
    if as_json:
        _print_json(room.plain(records))
    else:
        out.print(room.table(records))
        if room.read_contrasts(folder, records):
            out.print(room.contrasts_table(folder, records))


@app.command()
@verb
def compare(
    first: Annotated[Path, typer.Argument(help="A folder that `bench` wrote.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    as_json: Json = False,
) -> None:
    """Put two runs of the same protocol side by side."""
    from . import bench as room

    one, two = room.comparable(first, second)
    if as_json:
        _print_json(room.side_by_side(one, two))
    else:
        out.print(room.comparison_table(one, two))


@app.command()
@verb
def verify(
    model: Annotated[Path, typer.Argument(help="A model that `bench` made, with its evidence.json.")],
    images: Annotated[int, typer.Option(min=2, help="Images to make again, from the first on.")] = 64,
    device: Device = None, as_json: Json = False,
) -> None:
    """Measure a sample of a model's evidence again, and say whether it holds: exit with 4 if it does not."""
    from . import verify as room

    found = room.verify(model, images=images, device=_device(device), bar=_progress)
    _answer(found, as_json)
    if not found["holds"]:
        broken = [name for name, finding in found["findings"].items() if not finding["holds"]]
        _fail(f"the evidence of {model} does not hold: {', '.join(broken)}", GATE)


@app.command(name="list")
@verb
def list_(
    what: Annotated[str, typer.Argument(help="methods, metrics, solvers, presets, formats, recipes or protocols.")],
    as_json: Json = False,
) -> None:
    """What there is, a line each with its options."""
    lists = kept()["lists"]
    if what not in lists:
        from .strict import nearest

        raise ValueError(f"list: there is no list of {what!r}; {nearest(what, lists)}")
    if as_json:
        _print_json(lists[what])
    else:
        sys.stdout.write(lines(lists[what], colorful(sys.stdout)))


def _load(source: str, device: str | None, dtype: str | None, weights: str, heads: int | None,
          autoencoder: str | None = None, **sampling: Any) -> Pipeline:
    from dataclasses import replace

    from .formats import load
    from .models.autoencoder import KLAutoencoder

    pipeline = load(source, weights=weights, heads=heads)
    if autoencoder is not None:
        pipeline = pipeline.replace(autoencoder=KLAutoencoder(autoencoder))
    pipeline = pipeline.to(_device(device))
    changes: dict[str, Any] = {"dtype": dtype} if dtype else {}
    wanted = {name: value for name, value in sampling.items() if value is not None}
    return pipeline.replace(runtime=replace(pipeline.runtime, **changes), sampling=pipeline.sampling.revised(**wanted))


def _device(name: str | None) -> str:
    import torch

    if name is None:
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: PyTorch sees no CUDA device here; use --device cpu")
    try:
        return str(torch.device(name))
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one PyTorch knows; use cpu, cuda or cuda:N") from error


def _progress(what: str, total: int) -> Any:
    """A progress bar on stderr, as a context manager whose value is called with the number done."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar() -> Any:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, disable=not FIRST) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)

    return bar()


def _answer(result: dict[str, Any], as_json: bool) -> None:
    if not FIRST:
        return
    if as_json:
        _print_json(result)
        return
    for name, value in result.items():
        if isinstance(value, dict):
            out.print(f"[bold]{name}[/]")
            for key, item in value.items():
                out.print(f"  {key}: {item}", highlight=False, markup=False)
        elif isinstance(value, list):
            out.print(f"[bold]{name}[/]")
            for item in value:
                out.print(f"  {item}", highlight=False, markup=False)
        else:
            out.print(f"[bold]{name}[/]: ", end="")
            out.print(str(value), highlight=False, markup=False)


def _print_json(value: Any) -> None:
    sys.stdout.write(document(value))


def _sentence(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory: use fewer images at a time, a smaller model or another dtype"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(sentence: str, code: int) -> None:
    err.print(f"slimdit: {sentence}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
