"""The `slimdit` command: what is kept is printed at once, everything else is run by `cli.py`."""

from __future__ import annotations

import sys

from .answers import answer


def main() -> None:
    """The `slimdit` command."""
    told = answer(sys.argv[1:], sys.stdout)
    if told is not None:
        sys.stdout.write(told)
        return
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
