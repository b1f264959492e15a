"""Many processes of one run: the same command under `accelerate launch` goes on with, and ends in, the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimdit.cli import app
from slimdit.workers import Workers, workers

# On a CPU, too: `--cpu` would ask for MPI.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
          "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
          "-m", "slimdit.cli"]


def test_alone_there_is_nobody_to_wait_for() -> None:
    alone = workers()
    assert alone == Workers() and alone.first
    alone.wait()


def test_two_processes_go_on_with_what_is_there_and_measure_the_same(tiny_model: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(tiny_model), "--images", "72", "--batch", "8", "--device", "cpu", "--json", "--out"]
    alone = CliRunner().invoke(app, [*words, str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.stderr
    shutil.copytree(tmp_path / "alone", tmp_path / "shared")
    images = sorted((tmp_path / "shared" / "model").glob("*.npz"))
    for path in images[1::2]:
        path.unlink()
    images[2].write_bytes(images[2].read_bytes()[:-1])
    shutil.rmtree(tmp_path / "shared" / "model" / "features-lite0")
    kept = {path: path.stat().st_mtime_ns for path in (images[0], images[4])}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    shared = subprocess.run([*LAUNCH, *words, str(tmp_path / "shared"), "--resume"], capture_output=True, text=True,
                            env=environment, timeout=500)
    assert shared.returncode == 0, shared.stderr
    told, expected = json.loads(shared.stdout), json.loads(alone.stdout)  # one of the two speaks
    assert told["sha256"] == expected["sha256"]
    for name, metric in expected["metrics"].items():
        assert told["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-6)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((tmp_path / "shared" / "model" / "features-lite0").iterdir())) == 2
