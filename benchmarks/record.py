"""Run benchmarks, keep what they print in `results/benchmarks`, and render the tables of README.md beside this file.

    python -m benchmarks.record int8 "attention --modes compiled" load_memory startup

Without names it runs nothing, and renders what is kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from slimdit.files import write_json
from slimdit.report.render import update_markdown

from . import growth

PAGE = Path(__file__).with_name("README.md")
RESULTS = PAGE.parents[1] / "results" / "benchmarks"
DRAWN = {"growth": growth.draw}  # those with pictures


def main() -> None:
    parser = argparse.ArgumentParser(description="Run benchmarks and render the tables of all that were kept.")
    parser.add_argument("names", nargs="*", help="modules of this folder, with their options in quotes")
    for asked in parser.parse_args().names:
        name, *options = shlex.split(asked)
        print(f"benchmarks.{asked}", file=sys.stderr)
        command = [sys.executable, "-m", f"benchmarks.{name}", *options]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        write_json(RESULTS / f"{name}.json", json.loads(told.stdout.splitlines()[-1]))
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        update_markdown(PAGE, path.stem, table(document))
        if path.stem in DRAWN:
            DRAWN[path.stem](document, RESULTS)


def table(document: dict[str, Any]) -> str:
    """A benchmark's rows in Markdown, an interval beside its ratio, and under them where they come from."""
    rows = [merged(row) for row in document["rows"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    where = document["provenance"]
    source = (f"`{where['command']}`, {where['date'][:10]}, torch {where['versions']['torch']}, "
              f"{where['gpu'] or where['cpu']}, {where['threads']} threads, "
              f"commit {where['commit'][:7]}{' and changes' if where['dirty'] else ''}")
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", source])


def merged(row: dict[str, Any]) -> dict[str, str]:
    """A row's cells as text: `ratio` with its interval, names without underscores."""
    cells = {key.replace("_", " "): str(value) for key, value in row.items() if key not in ("low", "high")}
    if "low" in row:
        cells["ratio"] = f"{row['ratio']} [{row['low']}, {row['high']}]"
    return cells


if __name__ == "__main__":
    main()
