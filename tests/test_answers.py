"""What slimdit.answers promises: what it keeps is what the code says, and it is quick because nothing is imported."""

from __future__ import annotations

import fcntl
import io
import json
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimdit import answers
from slimdit.assets.build import build_catalogue
from slimdit.cli import app

AGAIN = "write it again: python -m slimdit.assets.build catalogue"


class Terminal(io.StringIO):
    """A stream that says it is a terminal of some kind."""

    encoding = "utf-8"

    def __init__(self, terminal: bool = True) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_what_is_kept_is_what_the_code_says(tmp_path: Path) -> None:
    build_catalogue(tmp_path / "catalogue.json")
    now, kept = json.loads((tmp_path / "catalogue.json").read_text(encoding="utf-8")), answers.kept()
    assert kept["lists"] == now["lists"], AGAIN
    assert kept["help"] == now["help"], AGAIN


def test_the_kept_page_is_typers_for_its_width() -> None:
    page = answers.kept()["help"]
    assert all(len(line) == answers.COLUMNS for line in page["plain"].splitlines() if line)
    assert "╭─ Commands" in page["plain"] and "\x1b[" not in page["plain"] and "\x1b[1" in page["color"]
    assert all(f"│ {verb.name or verb.callback.__name__} " in page["plain"] for verb in app.registered_commands)


@pytest.mark.parametrize("words", [["--help"], ["list", "methods"], ["list", "recipes", "--json"]])
def test_the_command_imports_next_to_nothing(words: list[str]) -> None:
    heavy = {"torch", "numpy", "typer", "rich", "pydantic", "dataclasses", "inspect", "logging", "slimdit.methods"}
    code = ("import sys; import slimdit.__main__ as front; front.main()\n"
            f"assert not (found := {heavy} & sys.modules.keys()), found")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answers.answer(words, Terminal(terminal=False))


@pytest.mark.parametrize("words", [["list", "presets"], ["list", "protocols", "--json"]])
def test_run_or_kept_a_list_reads_the_same(words: list[str]) -> None:
    assert CliRunner().invoke(app, words).stdout == answers.answer(words, Terminal(terminal=False))


@pytest.mark.parametrize("words", [[], ["list"], ["list", "solver"], ["list", "--help"], ["list", "--json", "methods"],
                                   ["list", "methods", "presets"], ["bench", "--help"], ["--help", "bench"]])
def test_everything_else_is_run(words: list[str]) -> None:
    assert answers.answer(words, Terminal()) is None


def test_a_page_that_would_not_fit_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Terminal()
    monkeypatch.setattr(answers, "columns", lambda stream: 60)
    assert answers.answer(["--help"], narrow) is None
    monkeypatch.undo()
    narrow.encoding = "ascii"  # which has no lines to draw boxes with
    assert answers.answer(["--help"], narrow) is None


def test_the_width_is_the_terminals() -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 63, 0, 0))
    with os.fdopen(follower, "w") as terminal:
        assert answers.columns(terminal) == 63
    os.close(leader)
    assert answers.columns(Terminal()) == answers.columns(Terminal(terminal=False)) == answers.COLUMNS


def test_colors_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    styled = answers.answer(["list", "solvers"], Terminal())
    assert styled is not None and answers.BOLD in styled
    plain = answers.answer(["list", "solvers"], Terminal(terminal=False))
    for name, value in (("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
        assert answers.answer(["list", "solvers"], Terminal()) == plain
        assert answers.answer(["--help"], Terminal()) == answers.kept()["help"]["plain"]
        monkeypatch.setenv("TERM", "xterm")
    assert styled.replace(answers.BOLD, "").replace(answers.DIM, "").replace(answers.PLAIN, "") == plain
