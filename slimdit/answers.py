"""What `slimdit --help` and `slimdit list` say, kept in a file that is quicker to read than to say anew.

The command line's libraries take several times as long to import as Python takes to start, and the methods as long
again. So these answers are written beside the models (`python -m slimdit.assets.build catalogue`), and a test holds the
file to what the code says. Nothing is imported here that is not needed to print it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

FILE = Path(__file__).parent / "assets" / "catalogue.json"
COLUMNS = 80  # of the kept help page
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def answer(words: Sequence[str], stream: TextIO) -> str | None:
    """What is kept of the answer to a command for this stream; None where the command has to be run."""
    match list(words):
        case ["--help"] if stream.encoding.lower() == "utf-8" and columns(stream) >= COLUMNS:
            return kept()["help"]["color" if colorful(stream) else "plain"]
        case ["list", what] if what in kept()["lists"]:
            return lines(kept()["lists"][what], colorful(stream))
        case ["list", what, "--json"] if what in kept()["lists"]:
            return document(kept()["lists"][what])
    return None


def kept() -> dict[str, Any]:
    """The file: `help`, the page with and without colors, and `lists`, the rows of each by its name."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def lines(rows: Iterable[Mapping[str, str]], color: bool) -> str:
    """The rows of a list for people: name, what it is about, and below them its options."""
    bold, dim, plain = (BOLD, DIM, PLAIN) if color else ("", "", "")
    return "".join(f"{bold}{row['name']}{plain}  {row['about']}\n"
                   + (f"{dim}    {row['options']}{plain}\n" if row.get("options") else "") for row in rows)


def document(value: Any) -> str:
    """A value as the JSON that every `--json` prints."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def colorful(stream: TextIO) -> bool:
    """Whether to style text: on a terminal that can, unless the user says otherwise (no-color.org)."""
    return "NO_COLOR" not in os.environ and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def columns(stream: TextIO) -> int:
    """The width of a terminal; of anything else, that of the page."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else COLUMNS
    except (OSError, ValueError):
        return COLUMNS
