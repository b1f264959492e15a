"""The main job: a baseline and every recipe against it, each row in its own process, each ending in a record."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .context import require
from .files import read_kept, write_json, write_text
from .protocol import CLOCK, Protocol, find_protocol, unlike
from .recipe import Recipe, find, tour
from .report.record import (
    AA,
    BASELINE,
    RECORD,
    Record,
    Status,
    in_order,
    provenance,
    read,
    read_all,
    record_path,
    write,
)
from .row import Row, recipe_dict
from .strict import nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .report.contrast import Contrast

Show = Callable[[str, str, int, int], None]
"""(row, stage, done, total) to the progress shown."""


@dataclass(frozen=True)
class Plan:
    """A bench before it runs: the rows, first to last, and where they go.

    Attributes:
        options: the words that make `slimdit bench` measure so again, in a folder of its own.
        sources: what a row's recipe was called in the command, where not by its name.
    """

    def command(self, *recipes: str) -> tuple[str, ...]:
        """The words that measure these rows again, and the baseline with them."""
        return ("slimdit", "bench", *dict.fromkeys(self.sources.get(name, name) for name in recipes), *self.options)

    folder: Path
    model: str
    protocol: Protocol
    recipes: tuple[Recipe, ...]
    device: str
    options: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """The baseline, the baseline with other seeds (A/A), and a row per recipe."""
        base = Row(BASELINE, str(self.folder), self.model, self.protocol, seed=self.protocol.seed, device=self.device,
                   command=self.command(*(recipe.name for recipe in self.recipes)))
        floor = replace(base, name=AA, seed=self.protocol.seed + 1, timed=False)
        return [base, floor, *(replace(base, name=recipe.name, recipe=replace(recipe, controls=()).to_toml(),
                                       controls=recipe.controls, command=self.command(recipe.name))
                               for recipe in self.recipes)]

    def identity(self) -> dict[str, Any]:
        """What must not change when a bench is resumed."""
        return {"model": self.model, "device": self.device, "protocol": self.protocol.to_dict()}

    def describe(self) -> dict[str, Any]:
        """What `--dry-run` says: rows, images, model evaluations, disk and memory it will take."""
        from .formats import describe

        found = describe(self.model)
        weights = int(found.get("bytes", 0))
        return {
            "rows": [row.name for row in self.rows()],
            "images per row": self.protocol.images,
            "protocol": self.protocol.to_dict(),
            "processes": sum(len(stages(row)) for row in self.rows()),
            "disk in MB, at most": round(len(self.rows()) * (2 * weights + 2_000_000) / 1e6, 1),
            "time limit per row in s": self.protocol.timeout_s,
            "out": str(self.folder),
        }


def plan(recipes: Sequence[str], *, model: str | None = None, protocol: str, folder: Path, images: int | None = None,
         seed: int | None = None, seeds: int = 1, device: str | None = None, dtype: str | None = None,
         timeout: float | None = None) -> Plan:
    """What will be measured.

    Args:
        model: what the recipes are applied to, instead of what they name.
        seeds: with how many seeds each recipe is carried out that has a method with one: a row more for each.

    Raises:
        ValueError: a recipe or the protocol is refused, two recipes have one name, or name different models.
    """
    sources = list(recipes or tour())
    chosen = [find(name) for name in sources]
    start = common_model(chosen) if model is None else model
    asked = {"model": None if start == "bundled" else start, "protocol": protocol, "images": images, "seed": seed,
             "seeds": None if seeds == 1 else seeds, "device": device, "dtype": dtype, "timeout": timeout}
    words = tuple(word for name, value in asked.items() if value is not None for word in (f"--{name}", str(value)))
    rows = [(replace(one, model=start), source) for source, recipe in zip(sources, chosen)
            for one in (recipe, *map(recipe.reseeded, range(1, seeds))) if one]
    names = [BASELINE, AA, *(recipe.name for recipe, _ in rows)]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"bench: two rows are called {', '.join(sorted(doubled))}: give each recipe a name of its own")
    rules = find_protocol(protocol)
    changes: dict[str, Any] = {"images": images, "seed": seed, "timeout_s": timeout}
    rules = replace(rules, **{name: value for name, value in changes.items() if value is not None})
    if dtype is not None:
        rules = Protocol.from_dict({**rules.to_dict(), "runtime": {**rules.to_dict()["runtime"], "dtype": dtype}})
    return Plan(folder, start, rules, tuple(recipe for recipe, _ in rows), device or default_device(), words,
                {recipe.name: source for recipe, source in rows})


def common_model(recipes: Sequence[Recipe]) -> str:
    """The model that all recipes name.

    Raises:
        ValueError: they name different ones.
    """
    named = {recipe.model: recipe.name for recipe in recipes}
    if len(named) > 1:
        raise ValueError("bench: " + ", ".join(f"{name} is for {model}" for model, name in named.items())
                         + ": say with --model what all are to be applied to")
    return next(iter(named), "bundled")


def default_device() -> str:
    """`cuda` where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run(plan: Plan, *, resume: bool = False, retime: bool = False, console: Console | None = None) -> list[Record]:
    """Measure every row that has no finished record yet, then write the table and the report.

    Args:
        resume: go on with what the folder holds.
        retime: time finished rows again, as the protocol says now, and measure their peak memory; with `resume`, but
            for those that this commit has timed so already. What was measured of their images stays.

    Raises:
        ValueError: the folder belongs to another bench, or is being written by one.
        KeyboardInterrupt: passed on; finished rows stay finished.
    """
    with locked(plan.folder), terminated_as_interrupted():
        begin(plan, resume, retime)
        rows = plan.rows()
        with progress_bars(console, len(rows)) as show:
            for row in rows:
                if finished(row) is None or (row.name == BASELINE and is_needed_again(row, rows)):
                    measure_row(row, show)
                elif retime and is_timed_again(row, resume):
                    time_again(row, show)
                show(row.name, "done", 1, 1)
                if row.name == BASELINE and (ended := read(path_of(row))).status != "done":
                    raise ValueError(f"bench: the baseline, which every row is compared with, ended as {ended.status}: "
                                     f"{ended.reason}")
            records = in_order(read(path_of(row)) for row in rows)
            for row in rows:
                contrast_row(row, {record.name: record for record in records if record.status == "done"}, show)
        write_report(plan.folder, records)
    return records


def is_needed_again(baseline: Row, rows: Sequence[Row]) -> bool:
    """Whether rows are to be compared with a baseline of which the record alone is left, as in a fresh clone."""
    whole = all((baseline.home / name).exists() for name in ("witness.json", "model", "images", "features"))
    if whole or all(finished(row) for row in rows):
        return False
    shutil.rmtree(baseline.home, ignore_errors=True)
    return True


def begin(plan: Plan, resume: bool, retime: bool = False) -> None:
    """Open the folder for this plan, or refuse one that holds another's."""
    path = plan.folder / "bench.json"
    identity = json.loads(json.dumps(plan.identity()))
    if path.exists():
        if not resume and not retime:
            raise ValueError(f"{plan.folder} holds a bench: add --resume to go on with it, or name another folder "
                             "with --out")
        before = read_kept(path, dict)
        before["protocol"] = in_full(before.get("protocol"))
        if retime:
            before["protocol"] |= {name: identity["protocol"][name] for name in CLOCK}
        if changed := [name for name in identity if before.get(name) != identity[name]]:
            clock = changed == ["protocol"] and all(
                name in CLOCK for name, value in identity["protocol"].items() if before["protocol"].get(name) != value)
            raise ValueError(f"{plan.folder} was begun with another {' and '.join(changed)}: use the same settings, "
                             + ("time its rows again with --retime, " if clock else "")
                             + "or another folder with --out")
    write_json(path, identity)


def in_full(protocol: Any) -> dict[str, Any]:
    """A protocol as it was written down, with what it meant by settings that there were not yet."""
    return {**{name: Protocol("").to_dict()[name] for name in CLOCK}, **(protocol or {})}


def finished(row: Row) -> Record | None:
    """The row's record, if it is whole, finished and of the same recipe."""
    try:
        record = read(path_of(row))
    except (FileNotFoundError, ValueError):
        return None
    recipe = json.loads(json.dumps(recipe_dict(row)))
    return record if record.status in ("done", "refused") and record.recipe == recipe else None


def measure_row(row: Row, show: Show) -> None:
    """Run a row's stages; whatever happens, there is a record afterwards.

    Raises:
        KeyboardInterrupt: passed on, with the record written.
    """
    spec = row.home / "row.json"
    if spec.exists() and not is_left_by(row, spec):
        shutil.rmtree(row.home)
    shutil.rmtree(row.timings, ignore_errors=True)
    write_json(spec, row.to_dict())
    deadline = time.monotonic() + row.protocol.timeout_s
    for stage in stages(row):
        if stage == "prepare" and (row.maker.home / "witness.json").exists():
            continue
        show(row.name, stage, 0, 1)
        try:
            status, reason = run_stage(row, stage, spec, deadline, show)
        except KeyboardInterrupt:
            write_failed(row, "interrupted", f"the bench was interrupted in {stage}: --resume goes on with it")
            raise
        if status != "done":
            write_failed(row, status, reason)
            return


def stages(row: Row) -> list[str]:
    """The processes that measure a row."""
    return ["prepare", *["clock"] * (row.protocol.processes if row.timed else 0), "measure"]


def is_timed_again(row: Row, resume: bool) -> bool:
    """Whether a finished row is to be timed: not if it never is, nor, to go on, if this commit has timed it so."""
    record = read(path_of(row))
    if not row.timed or record.status != "done":
        return False
    settings, now = row.protocol.to_dict(), provenance()
    before = record.provenance.get("timed", record.provenance)
    same = all(record.protocol.get(name) == settings[name] for name in CLOCK)
    return not (resume and same and all(before.get(name) == now[name] for name in ("commit", "cpu")))


def time_again(row: Row, show: Show) -> None:
    """Time a finished row anew; one that cannot be keeps its record, and what is shown says why."""
    if not all((one.saved / "model.safetensors").exists() for one in (row, row.baseline())):
        show(row.name, "not timed: its model is gone", 1, 1)
        return
    shutil.rmtree(row.timings, ignore_errors=True)
    spec = row.home / "retime.json"
    write_json(spec, row.to_dict())
    deadline = time.monotonic() + row.protocol.timeout_s
    for stage in [*["clock"] * row.protocol.processes, "retime"]:
        show(row.name, stage, 0, 1)
        status, reason = run_stage(row, stage, spec, deadline, show)
        if status != "done":
            show(row.name, f"not timed: {reason}", 1, 1)
            return


def contrast_row(row: Row, done: Mapping[str, Record], show: Show) -> None:
    """Compare a row with those of its controls that the bench has, unless that is known already.

    A row that cannot be compared, as its images are gone, keeps its record: what is shown says why.
    """
    controls = tuple(name for name in row.controls if name in done)
    known = {one.control for one in read_contrasts(Path(row.folder), done.values()) if one.row == row.name}
    if row.name not in done or known.issuperset(controls):
        return
    spec = row.home / "contrast.json"
    write_json(spec, replace(row, controls=controls).to_dict())
    status, reason = run_stage(row, "contrast", spec, time.monotonic() + row.protocol.timeout_s, show)
    show(row.name, "done" if status == "done" else f"not compared: {reason}", 1, 1)


def write_failed(row: Row, status: Status, reason: str) -> None:
    """Write the record of a row that did not end well."""
    record = Record(name=row.name, status=status, reason=reason, recipe=recipe_dict(row),
                    protocol={**row.protocol.to_dict(), "model": row.model},
                    provenance=provenance(seeds={"images": row.seed}, dtype=row.protocol.runtime.dtype,
                                          device=row.device, command=row.command))
    write(record, Path(row.folder) / "records")


def is_left_by(row: Row, spec: Path) -> bool:
    """Whether the folder that a file describes was left by this row; a damaged file tells nothing."""
    try:
        return same_row(read_kept(spec, dict), row)
    except ValueError:
        return False


def same_row(before: dict[str, Any], row: Row) -> bool:
    """Whether what a row left is this row's: made by the same recipe and protocol, whatever the command and clock."""
    return what_makes(before) == what_makes(json.loads(json.dumps(row.to_dict())))


def what_makes(row: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a row's model and images."""
    protocol = {name: value for name, value in dict(row.get("protocol", {})).items() if name not in CLOCK}
    return {**row, "command": None, "controls": None, "protocol": protocol}


def run_stage(row: Row, stage: str, spec: Path, deadline: float, show: Show) -> tuple[Status, str]:
    """One process: how it ended, and why."""
    from .metrics.speed import WORKER_ENVIRONMENT

    environment = {**WORKER_ENVIRONMENT, **os.environ,
                   "TORCHINDUCTOR_CACHE_DIR": str((Path(row.folder) / "compiled").resolve())}
    with (row.home / "log.txt").open("ab") as log:
        # The row's standard input is never written: its end tells the row that the bench is gone.
        process = subprocess.Popen([sys.executable, "-m", "slimdit.row", stage, str(spec)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True)
        outcome: dict[str, Any] = {}
        listener = threading.Thread(target=listen, args=(process, log, show, outcome))
        listener.start()
        try:
            code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "timeout", f"{stage} took longer than the {row.protocol.timeout_s:g} s a row may take (--timeout)"
        finally:
            kill(process)  # what it started might go on, and hold its output open
            listener.join()
    return how_it_ended(row, stage, code, outcome)


def listen(process: subprocess.Popen[bytes], log: BinaryIO, show: Show, outcome: dict[str, Any]) -> None:
    """Pass on the progress that a process tells, and keep the outcome; what is neither goes to the log."""
    for line in process.stdout or ():
        try:
            told = json.loads(line)
            if "status" in told:
                outcome |= told
            else:
                show(told["row"], told["stage"], told["done"], told["total"])
        except (ValueError, KeyError, TypeError):
            with suppress(OSError):  # the disk may be full, and a log is not worth the row
                log.write(line)
                log.flush()


def how_it_ended(row: Row, stage: str, code: int, outcome: Mapping[str, Any]) -> tuple[Status, str]:
    """A record's status and reason for the exit code of a process and what it said of its outcome."""
    if code == 0:
        return "done", ""
    if outcome:
        return outcome["status"], outcome["reason"]
    if code == -signal.SIGKILL:
        return "out_of_memory", f"{stage} was killed (SIGKILL), most often because memory ran out"
    if code in (-signal.SIGINT, -signal.SIGTERM):
        return "interrupted", f"{stage} was interrupted ({signal.Signals(-code).name}): --resume goes on with it"
    if code < 0:
        return "crashed", f"{stage} died of {signal.Signals(-code).name}; see {row.home / 'log.txt'}"
    return "crashed", f"{stage} ended with exit code {code}; see {row.home / 'log.txt'}"


def kill(process: subprocess.Popen) -> None:
    """End a process and everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone.

    Raises:
        ValueError: another bench is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being written by another bench: wait for it, or name another folder with "
                             "--out") from None
        yield


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM, with which schedulers end a job, for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress_bars(console: Console | None, rows: int) -> Iterator[Show]:
    """Progress on stderr: a bar per row, and the stage each is in."""
    if console is None:
        yield lambda row, stage, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[row]:<22}"), TextColumn("{task.fields[stage]:<16}"), BarColumn(),
               MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}
        stages: dict[str, str] = {}

        def show(row: str, stage: str, done: int, total: int) -> None:
            if row not in tasks:
                tasks[row] = progress.add_task("", row=row, stage=stage)
            if not console.is_terminal and stages.get(row) != stage:  # a log has no bars: a line per stage
                console.print(f"{len(tasks)}/{rows} {row}: {stage}", highlight=False)
                stages[row] = stage
            progress.update(tasks[row], stage=stage, completed=done, total=total)
            if stage == "done":
                progress.stop_task(tasks[row])

        yield show


def path_of(row: Row) -> Path:
    """Where a row's record is."""
    return record_path(Path(row.folder) / "records", row.name)


def read_records(folder: Path) -> list[Record]:
    """The records of a bench's folder.

    Raises:
        ValueError: there are none, or one was changed by hand.
    """
    return read_all(folder / "records" if (folder / "records").is_dir() else folder)


def write_report(folder: Path, records: Sequence[Record]) -> None:
    """Write `report.html` and `table.md`."""
    from .metrics import METRICS
    from .report.contrast import contrast_table
    from .report.html import html
    from .report.render import as_markdown, markdown

    title = f"slimdit: {records[0].protocol.get('model', 'model')} ({records[0].protocol.get('name', '')} protocol)"
    beside = contrast_table(read_contrasts(folder, records), records, METRICS)
    write_text(folder / "report.html", html(records, title, sheets(folder, records), METRICS, beside))
    tables = [markdown(records, METRICS), *([as_markdown(beside)] if beside.rows else [])]
    write_text(folder / "table.md", "\n\n".join(tables) + "\n")


def plain(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records JSON-ready."""
    return [RECORD.dump_python(record, mode="json") for record in records]


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    from .metrics import METRICS
    from .report.render import terminal_table

    return terminal_table(records, METRICS)


def read_contrasts(folder: Path, records: Iterable[Record]) -> list[Contrast]:
    """What is known of these rows beside their controls, in the order of the rows."""
    from .report.contrast import of_records

    named = {record.name: record for record in records}
    return sorted(of_records(folder / "contrasts", named), key=lambda one: list(named).index(one.row))


def contrasts_table(folder: Path, records: Sequence[Record]) -> Table:
    """The rows beside their controls, as a table for a terminal."""
    from .metrics import METRICS
    from .report.contrast import contrast_table
    from .report.render import drawn

    return drawn(contrast_table(read_contrasts(folder, records), records, METRICS))


def update_page(path: Path, name: str, folder: Path, records: Sequence[Record]) -> None:
    """Render anew what a Markdown file shows of a bench: its tables between their markers, and numbers in its prose.

    Raises:
        ValueError: it shows nothing of it, or asks for what was not measured.
    """
    from .metrics import METRICS
    from .report.advice import advice_table
    from .report.contrast import contrast_table
    from .report.prose import update_prose
    from .report.render import as_markdown, markdown, opening, update_markdown
    from .report.repeats import apart, seed_table
    from .report.stacks import stack_table

    firsts = apart(records)[0]
    names = [record.name for record in firsts]
    contrasts = read_contrasts(folder, records)
    beside = [one for one in contrasts if one.row in names]
    tables: Mapping[str, Callable[[], str]] = {
        name: lambda: markdown(firsts, METRICS),
        f"{name}-controls": lambda: as_markdown(contrast_table(beside, firsts, METRICS)),
        f"{name}-seeds": lambda: as_markdown(seed_table(contrasts, records, METRICS)),
        f"{name}-stacks": lambda: as_markdown(stack_table(firsts, METRICS)),
        f"{name}-advice": lambda: as_markdown(advice_table(firsts, METRICS)),
    }
    shown = update_prose(path, name, records, contrasts, METRICS)
    for title, render in tables.items():
        if opening(title) in path.read_text(encoding="utf-8"):
            update_markdown(path, title, render())
            shown += 1
    if not shown:
        raise ValueError(f"{path} must hold '{opening(name)}' once and '<!-- /table -->' after it, for the table to go "
                         "between")


def write_figures(folder: Path, records: Sequence[Record], into: Path) -> list[Path]:
    """Write the pictures that a bench's records give; returns their paths."""
    from .metrics import METRICS
    from .report.figures import write_figures as write_all

    return write_all(records, sheets(folder, records), into, METRICS)


def sheets(folder: Path, records: Sequence[Record]) -> dict[str, Path]:
    """The sheet of samples of each row."""
    return {record.name: (folder / "records" / record.images.grid).resolve() for record in records if record.images}


def gate(condition: str) -> Callable[[Sequence[Record]], list[str]]:
    """A quality gate by its name: the names of the rows that it stops.

    Raises:
        ValueError: there is no such gate.
    """
    if condition not in GATES:
        raise ValueError(f"--fail-if {condition!r} is unknown; {nearest(condition, GATES)}")
    return lambda records: [record.name for record in records if GATES[condition](record)]


GATES: Mapping[str, Callable[[Record], bool]] = {
    "loss": lambda record: record.verdict.startswith("loss"),
    "slower": lambda record: "slower" in record.remarks,
    "failed": lambda record: record.status != "done",
}


def comparable(first: Path, second: Path) -> tuple[list[Record], list[Record]]:
    """The records of two benches that followed one protocol.

    Raises:
        ValueError: they have no row in common.
        Refused: they were measured differently, so their numbers do not compare.
    """
    one, two = read_records(first), read_records(second)
    others = {record.name: record for record in two}
    pairs = [(record, others[record.name]) for record in one if record.name in others]
    if not pairs:
        raise ValueError(f"{first} and {second} have no row in common")
    changed = dict.fromkeys(name for a, b in pairs for name in unlike(conditions(a), conditions(b)))
    require(not changed, f"{first} and {second} were measured by different protocols ({', '.join(changed)}): compare "
                         "runs of one protocol")
    return one, two


def conditions(record: Record) -> Mapping[str, Any]:
    """What a row was measured under: as it was found, or where it ended before that, as its protocol asked."""
    asked = {name: record.protocol.get(name) for name in ("images", "seed", "features", "reference")}
    return record.protocol.get("conditions") or asked


def side_by_side(one: Sequence[Record], two: Sequence[Record]) -> list[dict[str, Any]]:
    """What two benches measured of the same rows, JSON-ready."""
    others = {record.name: record for record in two}
    return [{"row": record.name, "metric": metric, "first": asdict(a), "second": asdict(b)}
            for record in one if record.name in others
            for metric in (*record.metrics, *record.against_baseline)
            if (a := record.quantity(metric)) and (b := others[record.name].quantity(metric))]


def comparison_table(one: Sequence[Record], two: Sequence[Record]) -> Table:
    """Two benches side by side, for a terminal."""
    from .metrics import METRICS
    from .report.render import compare
    from .report.render import comparison_table as drawn

    return drawn(compare(one, two, METRICS))
