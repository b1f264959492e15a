"""What a method may use besides the pipeline it is given, and how it refuses one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .strict import Refused as Refused
from .strict import require as require

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .training.data import ImageData


def matching(patterns: tuple[str, ...], names: list[str], where: str) -> set[str]:
    """The names of layers that any pattern matches, such as `"blocks.*.mlp.*"`.

    Args:
        where: whose option it is, for the sentence: "quantize: skip".

    Raises:
        Refused: a pattern matches none.
    """
    found = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        require(matched, f"{where} pattern {pattern!r} matches no float linear layer of this model"
                         + "".join(f"; the nearest is {near!r}" for near in get_close_matches(pattern, names, 1, 0)))
        found |= matched
    return found


@dataclass(frozen=True)
class Context:
    """What a method may use.

    Attributes:
        teacher: the pipeline before the first method; never changed.
        folder: where this method may write, in a folder of its own inside: the model comes to lie beside it.
        data: images to learn or calibrate from, where there are any.
        device: `"cpu"`, `"cuda"`, as the pipeline's own.
        rehearsal: whether the pipeline is the tiny twin of the real one, whose sizes mean nothing: training takes a
            step or two and opens no data.
        report: told a line of progress now and then.
        witnesses: what was changed so far, one entry per method.
    """

    teacher: Pipeline
    folder: Path
    data: ImageData | None = None
    device: str = "cpu"
    seed: int = 0
    rehearsal: bool = False
    report: Callable[[str], None] = lambda line: None
    witnesses: list[dict[str, Any]] = field(default_factory=list)

    def witness(self, **facts: Any) -> None:
        """Put on record what a method changed, once per method: numbers and short texts that JSON can hold."""
        self.witnesses.append(facts)
