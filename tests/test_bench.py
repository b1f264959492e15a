"""The bench: every row ends in a record, finished ones are never repeated, and a folder has one bench at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import indent

import pytest
from typer.testing import CliRunner

from slimdit import bench
from slimdit.cli import app
from slimdit.context import Refused
from slimdit.metrics import METRICS
from slimdit.protocol import CONDITIONS, Protocol, find_protocol, shipped_protocols
from slimdit.report import render
from slimdit.report.record import AA, BASELINE, SCHEMA, Record, Value, read, record_path, write
from slimdit.row import Row

FEWER = """
name = "fewer"
model = "{model}"
methods = [{{reduce_steps = {{steps = 3}}}}]
"""


@pytest.fixture(scope="module")
def plan(tiny_model: Path, tiny_protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> bench.Plan:
    folder = tmp_path_factory.mktemp("bench")
    recipe = folder / "fewer.toml"
    recipe.write_text(FEWER.format(model=tiny_model))
    nothing = folder / "same.toml"
    nothing.write_text(f'name = "same"\nmodel = "{tiny_model}"\nmethods = [{{reduce_steps = {{steps = 6}}}}]\n'
                       'controls = ["fewer", "elsewhere"]\n')
    return bench.plan([str(recipe), str(nothing)], model=str(tiny_model), protocol=str(tiny_protocol),
                      folder=folder / "out", device="cpu")


@pytest.fixture(scope="module")
def records(plan: bench.Plan) -> dict[str, Record]:
    return {record.name: record for record in bench.run(plan)}


def test_a_bench_measures_baseline_floor_and_recipes_with_intervals(records: dict[str, Record]) -> None:
    assert list(records) == [BASELINE, AA, "fewer", "same"]
    assert all(record.status == "done" for record in records.values()), [record.reason for record in records.values()]
    for record in records.values():
        distance = record.metrics["fd_lite0"]
        assert distance.n == 16 and distance.low <= distance.value <= distance.high
        assert record.metrics["size"].value > 0 and record.provenance["versions"]["torch"]
    fewer = records["fewer"]
    assert fewer.metrics["run_macs"].value == records[BASELINE].metrics["run_macs"].value / 2
    assert {"fd_lite0_difference", "psnr", "ssim", "throughput_ratio", "latency_ratio_batch1"} <= set(
        fewer.against_baseline)
    assert fewer.metrics["latency_p50_batch1"].value <= fewer.metrics["latency_p95_batch1"].value
    assert fewer.verdict == "no loss within 1000"
    assert fewer.witness[0]["method"] == "reduce_steps"
    assert fewer.metrics["peak_memory"].value > 0


def test_every_record_says_all_that_is_needed_to_believe_it(plan: bench.Plan, records: dict[str, Record]) -> None:
    for name, record in records.items():
        content = json.loads(record_path(plan.folder / "records", name).read_text())
        assert content["schema"] == SCHEMA and len(content["images"]["sha256"]) == 64
        where = record.provenance
        assert where["seeds"] == {"images": 1 if name == AA else 0}
        assert where["dtype"] == "float32" and where["device"] == "cpu" and where["cpu"] and where["threads"] > 0
        assert {"gpu", "commit", "dirty", "date", "command"} <= where.keys()
        assert {"slimdit", "python", "torch", "numpy"} <= where["versions"].keys()
        assert {"load", "sample", "quality"} <= record.seconds.keys() and min(record.seconds.values()) > 0
        assert ("prepare" in record.seconds) == bool(record.recipe)
        assert set(record.protocol["conditions"]) == set(CONDITIONS)
        assert {**plan.protocol.to_dict(), "model": plan.model}.items() <= record.protocol.items()
        assert bool(record.recipe) == (name not in (BASELINE, AA))
    assert records["fewer"].protocol["conditions"] == records[BASELINE].protocol["conditions"]
    assert records[BASELINE].metrics["fd_lite0"].bias > 0  # too few images make a distance too high


def test_a_row_is_compared_with_those_of_its_controls_that_the_bench_has(
        plan: bench.Plan, records: dict[str, Record]) -> None:
    beside, = bench.read_contrasts(plan.folder, records.values())
    assert (beside.row, beside.control) == ("same", "fewer")
    # `same` makes the baseline's images: beside `fewer` it is what `fewer` is beside the baseline, turned round.
    turned, found = records["fewer"].against_baseline["fd_lite0_difference"], beside.differences["fd_lite0_difference"]
    assert found.value == pytest.approx(-turned.value) and found.n == 16
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low), abs=0.1 * (turned.high - turned.low))
    assert beside.differences["psnr"].value == pytest.approx(records["fewer"].against_baseline["psnr"].value)
    assert "| same | fewer |" in (plan.folder / "table.md").read_text()
    assert "Beside their controls" in (plan.folder / "report.html").read_text()


def test_what_is_known_of_a_row_beside_its_controls_is_not_measured_again(
        plan: bench.Plan, records: dict[str, Record]) -> None:
    path = plan.rows()[3].contrasts
    before, changed = path.stat().st_mtime_ns, path.read_text().replace('"fewer"', '"other"')
    bench.run(plan, resume=True)
    assert path.stat().st_mtime_ns == before
    done = {name: record for name, record in records.items() if name in ("fewer", "same")}
    images = replace(records["fewer"].images, sha256="0" * 64)
    assert not bench.read_contrasts(plan.folder, [done["same"], replace(done["fewer"], images=images)])
    path.with_name("changed.json").write_text(changed)
    with pytest.raises(ValueError, match=r"changed\.json does not hold contrasts"):
        bench.read_contrasts(plan.folder, done.values())
    path.with_name("changed.json").unlink()


def test_every_quality_metric_has_its_paired_difference(records: dict[str, Record]) -> None:
    measured = {"fd_lite0", "kid_lite0", "precision_lite0", "recall_lite0", "class_accuracy"}
    assert measured <= records[BASELINE].metrics.keys()
    assert {f"{name}_difference" for name in measured} <= records["fewer"].against_baseline.keys()


def test_a_row_that_changes_nothing_says_so(records: dict[str, Record]) -> None:
    assert "no effect" in records["same"].remarks
    assert records["same"].against_baseline["psnr"].value == 100
    assert records["same"].against_baseline["fd_lite0_difference"].value == 0
    assert "no effect" not in records["fewer"].remarks


def test_the_floor_is_the_baseline_with_other_seeds(records: dict[str, Record]) -> None:
    assert records[AA].provenance["seeds"] != records[BASELINE].provenance["seeds"]
    assert records[AA].images.sha256 != records[BASELINE].images.sha256
    assert "throughput" not in records[AA].metrics and "psnr" not in records[AA].against_baseline


def test_report_and_table_are_written(plan: bench.Plan, records: dict[str, Record]) -> None:
    page = (plan.folder / "report.html").read_text()
    assert all(name in page for name in ("fewer", "same", "plotly"))
    assert "fewer" in (plan.folder / "table.md").read_text()
    assert [record.name for record in bench.read_records(plan.folder)][:2] == [BASELINE, AA]


def test_a_saved_model_carries_its_evidence(plan: bench.Plan, records: dict[str, Record]) -> None:
    folder = plan.folder / "rows" / "fewer" / "model"
    assert [record["name"] for record in json.loads((folder / "evidence.json").read_text())] == [BASELINE, "fewer"]
    card = (folder / "README.md").read_text()
    assert "`reduce_steps` with steps = 3" in card and "| baseline |" in card and "| fewer |" in card


FAULTS = {
    "segfault": ("prepare", "import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
    "interrupted": ("prepare", "signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it\n"
                               "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", "interrupted", "SIGINT"),
    "hungry": ("prepare", "import resource, torch; from slimdit import recipe, formats, training\n"
                          "resource.setrlimit(resource.RLIMIT_AS, (2 ** 33, 2 ** 33)); torch.empty(2 ** 40)",
               "out_of_memory", "allocate memory"),
    "nan": ("measure", "sample = row.sample\n"
                       "row.sample = lambda this, pipeline: sample(this, spoilt(pipeline))\n"
                       "def spoilt(pipeline):\n"
                       "    next(pipeline.model.parameters()).data.fill_(float('nan')); return pipeline",
            "failed", "image 0 has pixels that are not finite numbers"),
}
"""Rows that end badly: the stage, the code that it begins with there, and the status and reason of the record."""


SPOILT = """
import os, signal, sys, time
from slimdit import row

def begin(this):
{code}

usual = row.STAGES["{stage}"]
row.STAGES = {{"{stage}": lambda this: (begin(this), usual(this))}}
row.main()
"""


def spoil(monkeypatch: pytest.MonkeyPatch, faults: dict[str, tuple[str, str]]) -> None:
    """Have the rows of these names begin a stage with some code."""
    started = subprocess.Popen

    def instead(command: list[str], **options: object) -> subprocess.Popen:
        if "slimdit.row" in command:
            stage, spec = command[-2:]
            at, code = faults.get(json.loads(Path(spec).read_text())["name"], ("", ""))
            if at == stage:
                command = [command[0], "-c", SPOILT.format(stage=stage, code=indent(code, "    ")), stage, spec]
        return started(command, **options)

    monkeypatch.setattr(bench.subprocess, "Popen", instead)


def named(plan: bench.Plan, names: Iterable[str]) -> bench.Plan:
    """The plan with further rows, first, that do what `fewer` does."""
    more = [replace(plan.recipes[0], name=name) for name in names]
    return replace(plan, recipes=(*more, *plan.recipes))


def test_rows_that_end_badly_are_records_and_what_is_damaged_is_redone(
        plan: bench.Plan, records: dict[str, Record], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {name: record_path(plan.folder / "records", name) for name in records}
    before = {name: path.read_bytes() for name, path in paths.items()}
    content = json.loads(paths["fewer"].read_text())
    content["metrics"]["psnr"] = {"value": 99.0}
    paths["fewer"].write_text(json.dumps(content))  # edited by hand: its hash no longer matches
    for kind in ("images", "features"):
        shard = next((plan.folder / "rows" / "fewer" / kind).glob("*.npz"))
        shard.write_bytes(shard.read_bytes()[:-1])
    spoil(monkeypatch, {name: (stage, code) for name, (stage, code, _, _) in FAULTS.items()})
    again = {record.name: record for record in bench.run(named(plan, FAULTS), resume=True)}
    assert {name for name, path in paths.items() if path.read_bytes() != before[name]} == {"fewer"}
    assert again["fewer"].status == "done" and again["fewer"].images == records["fewer"].images
    for name, (_, _, status, reason) in FAULTS.items():
        assert again[name].status == status and reason in again[name].reason, again[name]
        assert again[name].recipe["name"] == name and again[name].provenance["seeds"] == {"images": 0}
    assert bench.gate("failed")(list(again.values())) == list(FAULTS)
    assert all(name in (plan.folder / "report.html").read_text() for name in FAULTS)


def test_a_folder_of_another_bench_is_refused(plan: bench.Plan, records: dict[str, Record]) -> None:
    with pytest.raises(ValueError, match="add --resume"):
        bench.run(plan)
    with pytest.raises(ValueError, match="another protocol"):
        bench.run(replace(plan, protocol=replace(plan.protocol, images=17)), resume=True)


def test_finished_rows_are_timed_again_in_several_processes_and_nothing_else_of_them_changes(
        plan: bench.Plan, records: dict[str, Record], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(plan.folder, folder)
    rules = replace(plan.protocol, processes=3, rounds=3, latency_batches=(1, 2))
    slower = replace(plan, folder=folder, protocol=rules)
    with pytest.raises(ValueError, match="time its rows again with --retime"):
        bench.run(slower, resume=True)
    shutil.rmtree(folder / "rows" / "same" / "model")  # as in a fresh clone
    again = {record.name: record for record in bench.run(slower, retime=True)}
    kept, timed = read(record_path(plan.folder / "records", "fewer")), again["fewer"]
    assert timed.metrics["latency_p50_batch2"].n == timed.against_baseline["throughput_ratio"].n == 9
    assert timed.protocol["processes"] == 3 and timed.images == kept.images and timed.verdict == kept.verdict
    assert timed.provenance["timed"]["date"] > timed.provenance["date"] == kept.provenance["date"]
    assert timed.metrics["peak_memory"].value > 0 and timed.metrics["size"] == kept.metrics["size"]
    evidence = json.loads((folder / "rows" / "fewer" / "model" / "evidence.json").read_text())
    assert [one["protocol"]["processes"] for one in evidence] == [3, 3]
    for name in ("same", AA):
        assert again[name] == read(record_path(plan.folder / "records", name))
    before = {path: path.read_bytes() for path in (folder / "records").iterdir()}
    bench.run(slower, resume=True, retime=True)  # goes on: all that can be timed was, by this commit
    assert before == {path: path.read_bytes() for path in (folder / "records").iterdir()}


def test_a_row_that_cannot_be_timed_again_keeps_its_record(plan: bench.Plan, records: dict[str, Record], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    shutil.copytree(plan.folder, folder)
    spoil(monkeypatch, {"fewer": ("clock", "raise ValueError('no clock')")})
    shown: list[str] = []
    row = next(one for one in replace(plan, folder=folder).rows() if one.name == "fewer")
    bench.time_again(row, lambda name, stage, done, total: shown.append(stage))
    assert read(bench.path_of(row)) == read(record_path(plan.folder / "records", "fewer"))
    assert shown[-1] == "not timed: no clock"


def test_two_benches_do_not_share_a_folder(plan: bench.Plan, records: dict[str, Record]) -> None:
    with bench.locked(plan.folder), pytest.raises(ValueError, match="being written by another bench"):
        bench.run(plan, resume=True)


def test_killed_in_the_middle_it_resumes(tiny_model: Path, tiny_protocol: Path, tmp_path: Path,
                                         records: dict[str, Record]) -> None:
    recipe = tmp_path / "fewer.toml"
    recipe.write_text(FEWER.format(model=tiny_model))
    command = [sys.executable, "-m", "slimdit.cli", "bench", str(recipe), "--model", str(tiny_model), "--protocol",
               str(tiny_protocol), "--out", str(tmp_path / "out"), "--device", "cpu", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    first = record_path(tmp_path / "out" / "records", BASELINE)
    deadline = time.monotonic() + 300
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = CliRunner().invoke(app, [*command[3:], "--resume"])
    assert second.exit_code == 1 and "is being written by another bench" in second.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while rows_running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not rows_running(tmp_path)  # a row does not outlive its bench
    kept = first.read_bytes()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert first.read_bytes() == kept
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert rows["fewer"]["images"]["sha256"] == records["fewer"].images.sha256


def rows_running(folder: Path) -> list[str]:
    """Processes of rows in a folder, where the system lists them."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may end as we look
            commands.append(path.read_bytes().decode())
    return [command for command in commands if "slimdit.row" in command and str(folder) in command]


@pytest.fixture
def row(tmp_path: Path, tiny_protocol: Path) -> Row:
    return Row("bad", str(tmp_path), "missing", find_protocol(str(tiny_protocol)))


def stage(monkeypatch: pytest.MonkeyPatch, row: Row, code: str) -> Record:
    """What becomes of a row whose process runs `code` instead."""
    started = subprocess.Popen

    def instead(command: list[str], **options: object) -> subprocess.Popen:
        if "slimdit.row" in command:
            command = [command[0], "-c", code, *command[-2:]]
        return started(command, **options)

    monkeypatch.setattr(bench.subprocess, "Popen", instead)
    bench.measure_row(row, lambda *told: None)
    return read(record_path(Path(row.folder) / "records", row.name))


CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"


@pytest.mark.parametrize(("code", "status", "reason"), [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "SIGSEGV"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "out_of_memory", "memory ran out"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "interrupted", "--resume"),
    ("raise SystemExit(7)", "crashed", "exit code 7"),
    (f"{CHILD}; raise SystemExit(8)", "crashed", "exit code 8"),  # whose child would hold its output open
    ("print('[1]\\nno JSON\\n{}', flush=True); raise SystemExit(9)", "crashed", "exit code 9"),
])
def test_a_row_that_dies_is_a_record_with_its_reason(monkeypatch: pytest.MonkeyPatch, row: Row, code: str, status: str,
                                                     reason: str) -> None:
    record = stage(monkeypatch, replace(row, recipe='name = "bad"\nmethods = [{quantize = {}}]'), code)
    assert record.status == status and reason in record.reason
    assert record.recipe["methods"] and record.protocol["model"] == "missing" and record.provenance["seeds"]


def test_a_row_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    hurried = replace(row, protocol=replace(row.protocol, timeout_s=1))
    record = stage(monkeypatch, hurried, "import time; time.sleep(60)")
    assert record.status == "timeout" and "--timeout" in record.reason


def test_an_interrupted_bench_says_so_in_the_record_of_its_row(monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    with pytest.raises(KeyboardInterrupt), bench.terminated_as_interrupted():
        stage(monkeypatch, row, "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    record = read(record_path(Path(row.folder) / "records", row.name))
    assert record.status == "interrupted" and "--resume" in record.reason
    assert bench.finished(row) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"no small disk may be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_row_that_fills_the_disk_makes_room_for_the_others(monkeypatch: pytest.MonkeyPatch, row: Row,
                                                             small_disk: Path) -> None:
    greedy = replace(row, folder=str(small_disk))
    record = stage(monkeypatch, greedy, HOARD)
    assert record.status == "failed" and "the disk is full" in record.reason and "No space left" in record.reason
    assert not greedy.saved.exists() and shutil.disk_usage(small_disk).used < 2 ** 20
    record = stage(monkeypatch, replace(greedy, name="next"), "raise SystemExit(7)")
    assert "exit code 7" in record.reason


HOARD = """
from slimdit import row

def hoard(this):
    with open(this.home / "hoard", "wb", buffering=0) as file:
        while True:  # until nothing is left, not even for a log
            file.write(bytes(4096))

row.STAGES = {"prepare": hoard}
row.main()
"""


def test_a_row_whose_model_is_missing_says_so(row: Row) -> None:
    bench.measure_row(row, lambda *told: None)
    record = read(record_path(Path(row.folder) / "records", row.name))
    assert record.status == "failed" and "missing does not exist" in record.reason


def test_a_baseline_of_which_only_the_record_is_left_is_made_again_for_rows_to_come(row: Row) -> None:
    base = row.baseline()
    write(Record(name=base.name), Path(row.folder) / "records")
    assert not bench.is_needed_again(base, [base])  # nothing is to be compared with it
    for name in ("model", "images", "features"):
        (base.home / name).mkdir(parents=True)
    (base.home / "witness.json").write_text("[]")
    assert not bench.is_needed_again(base, [base, row])
    (base.home / "model").rmdir()
    assert bench.is_needed_again(base, [base, row]) and not base.home.exists()


def test_gates() -> None:
    good = Record(name="good", verdict="no loss within 1")
    bad = Record(name="bad", verdict="loss", remarks=("slower",))
    dead = Record(name="dead", status="crashed", reason="SIGSEGV")
    rows = [good, bad, dead]
    assert bench.gate("loss")(rows) == ["bad"] and bench.gate("slower")(rows) == ["bad"]
    assert bench.gate("failed")(rows) == ["dead"]
    with pytest.raises(ValueError, match="did you mean 'slower'"):
        bench.gate("slow")


def test_what_a_row_left_is_used_whatever_command_goes_on_with_it(row: Row) -> None:
    before = json.loads(json.dumps(row.to_dict()))
    assert bench.same_row(before, replace(row, command=("slimdit", "bench", "--resume")))
    assert bench.same_row(before, replace(row, protocol=replace(row.protocol, processes=5, rounds=9)))
    assert not bench.same_row(before, replace(row, seed=1))
    assert not bench.same_row(before, replace(row, protocol=replace(row.protocol, images=17)))


def test_compare_refuses_other_protocols(tmp_path: Path) -> None:
    for name, images in (("one", 16), ("two", 16), ("three", 32)):
        (tmp_path / name / "records").mkdir(parents=True)
        record = Record(name=BASELINE, protocol={"images": images}, metrics={"fd_lite0": Value(1.0, 0.5, 1.5, images)})
        write(record, tmp_path / name / "records")
    one, two = bench.comparable(tmp_path / "one", tmp_path / "two")
    assert bench.side_by_side(one, two)[0]["first"]["value"] == 1.0
    with pytest.raises(Refused, match="different protocols \\(images \\(16 and 32\\)\\)"):
        bench.comparable(tmp_path / "one", tmp_path / "three")


MEASURED = {"images": 16, "seed": 0, "labels": "aa", "reference": "real, sha256 bb", "features": "lite0", "dither": 8.0,
            "resize": "112 x 112"}
OTHER = {"images": 17, "seed": 1, "labels": "ab", "reference": "real, sha256 cc", "features": "inception",
         "dither": 0.0, "resize": "299 x 299"}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_compare_refuses_rows_measured_otherwise(tmp_path: Path, condition: str) -> None:
    for folder, changed in (("one", {}), ("two", {condition: OTHER[condition]})):
        write(Record(BASELINE, protocol={"conditions": {**MEASURED, **changed}}), tmp_path / folder / "records")
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "one"), str(tmp_path / "two")])
    assert result.exit_code == 3 and f"({condition} (" in result.stderr and "Traceback" not in result.stderr


def test_compare_puts_rows_of_other_steps_and_guidance_side_by_side(tmp_path: Path) -> None:
    for folder, steps in (("one", 50), ("two", 10)):
        sampling = {"solver": "ddim", "steps": steps, "guidance": 1.5}
        record = Record(BASELINE, protocol={"conditions": MEASURED, "row_sampling": sampling},
                        metrics={"fd_lite0": Value(1.0, 0.5, 1.5, 16)})
        write(record, tmp_path / folder / "records")
    one, two = bench.comparable(tmp_path / "one", tmp_path / "two")
    row = render.compare(one, two, METRICS).table.rows[0]
    assert row.note == "ddim, 50 steps, guidance 1.5 → ddim, 10 steps, guidance 1.5"


def test_two_recipes_of_one_name_are_refused(tiny_model: Path, tiny_protocol: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "fewer.toml"
    recipe.write_text(FEWER.format(model=tiny_model))
    with pytest.raises(ValueError, match="two rows are called fewer"):
        bench.plan([str(recipe), str(recipe)], model=str(tiny_model), protocol=str(tiny_protocol), folder=tmp_path)


def test_a_model_given_goes_before_what_recipes_name(tiny_model: Path, tiny_protocol: Path, tmp_path: Path) -> None:
    planned = bench.plan(["few-steps"], model=str(tiny_model), protocol=str(tiny_protocol), folder=tmp_path)
    assert planned.model == str(tiny_model)
    assert [recipe.model for recipe in planned.recipes] == [str(tiny_model)]
    other = tmp_path / "fewer.toml"
    other.write_text(FEWER.format(model=tiny_model))
    with pytest.raises(ValueError, match="say with --model"):
        bench.plan(["few-steps", str(other)], protocol=str(tiny_protocol), folder=tmp_path)


def test_more_seeds_are_rows_of_what_trains_and_every_row_has_its_own_command(tmp_path: Path) -> None:
    planned = bench.plan(["few-steps", "finetune-control"], protocol="study", seeds=2, images=64, folder=tmp_path)
    commands = {row.name: " ".join(row.command) for row in planned.rows()}
    options = "--protocol study --images 64 --seeds 2"
    assert commands == {
        BASELINE: f"slimdit bench few-steps finetune-control {options}",
        "A/A": f"slimdit bench few-steps finetune-control {options}",
        "few-steps": f"slimdit bench few-steps {options}",
        "finetune-control": f"slimdit bench finetune-control {options}",
        "finetune-control-seed1": f"slimdit bench finetune-control {options}"}


def test_shipped_protocols_read_and_round_trip() -> None:
    assert {"quick", "standard"} <= set(shipped_protocols())
    for name in shipped_protocols():
        protocol = find_protocol(name)
        assert Protocol.from_dict(protocol.to_dict()) == protocol and protocol.margin["fd_lite0"] > 0


@pytest.mark.parametrize(("text", "sentence"), [
    ("images = 4", "'name' is missing"),
    ('name = "x"\nimage = 4', "did you mean 'images'"),
    ('name = "x"\nimages = 1', "at least 2"),
    ('name = "x"\nsampling = {solver = 3}', "sampling"),
    ("name = ", "not a TOML file"),
])
def test_a_bad_protocol_is_refused_with_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        find_protocol(str(path))


@pytest.mark.parametrize("low, high, said", [(0.97, 1.02, ["no speed effect"]), (1.01, 1.2, []),
                                             (0.8, 0.99, ["slower"])])
def test_a_row_whose_time_is_the_baselines_says_no_speed_effect(tmp_path, low, high, said):
    from slimdit.protocol import find_protocol
    from slimdit.report.record import BASELINE, Record, Value, write
    from slimdit.row import Row, notes

    write(Record(name=BASELINE), tmp_path / "records")
    row = Row("row", str(tmp_path), "bundled", find_protocol("quick"))
    against = {"throughput_ratio": Value((low + high) / 2, low, high, 4, "x")}
    assert notes(row, "", against) == said


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda", False)])
def test_what_a_gpu_holds_is_all_the_models(device, expected, tmp_path):
    from slimdit.row import held_already

    before = held_already(Row("row", str(tmp_path), "bundled", find_protocol("quick"), device=device))
    assert (before > 10 * 2**20) if expected else before == 0
