"""How long a command takes that needs no model, against an interpreter that does nothing.

    python -m benchmarks.startup

`ratio` is how many times longer a command of slimdit (a) takes than `python -c pass` (b), each a process of its own.
The last row is what the command line avoids: importing PyTorch, and nothing else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from .result import compare, show

SLIMDIT = "from slimdit.__main__ import main; main()"  # what the installed command holds
PROGRAMS = {
    "help": ("slimdit --help", SLIMDIT, ["--help"]),
    "list": ("slimdit list methods", SLIMDIT, ["list", "methods"]),
    "torch": ("import torch", "import torch", []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time commands that need no model.")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    show("startup", [measure(*PROGRAMS[name], options.rounds) for name in options.programs])


def measure(name: str, program: str, words: list[str], rounds: int) -> dict[str, Any]:
    """Time one program and an empty one."""
    return {"program": name, **compare(process(program, *words), process("pass"), rounds)}


def process(program: str, *words: str) -> Callable[[], object]:
    """A call that starts an interpreter, runs a program to its end and hides what it prints."""
    command = [sys.executable, "-c", program, *words]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
