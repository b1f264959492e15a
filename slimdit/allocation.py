"""From the error that each layer causes to who is protected and who is cut: what `slimdit sensitivity` measured, used.

A method that treats layers unequally reads the file and asks here; nothing is measured and no model is seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .context import Refused
from .files import write_json
from .strict import build

FILE = "sensitivity.json"
NO_ERROR = 1e-9  # of the largest; what causes less counts as causing this much


@dataclass(frozen=True)
class Sensitivity:
    """What each layer's perturbation does to the model's output, measured so far.

    Attributes:
        model: what was measured, as it was named.
        fingerprint: hash of its weights, structure and sampling.
        settings: how it was measured.
        bins: first and last timestep of each bin, in the order in which sampling visits them.
        layers: every layer there is to measure, first to last.
        errors: per measured layer its relative squared error in each bin.
        totals: per measured layer its relative squared error over all bins.
        provenance: where the numbers come from.

    Raises:
        ValueError: the parts contradict each other, or an error is not a finite number of at least 0.
    """

    model: str
    fingerprint: str
    settings: Mapping[str, Any]
    bins: tuple[tuple[int, int], ...]
    layers: tuple[str, ...]
    errors: Mapping[str, tuple[float, ...]]
    totals: Mapping[str, float]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if unknown := sorted((self.errors.keys() ^ self.totals.keys()) | (self.errors.keys() - set(self.layers))):
            raise ValueError(f"{unknown[0]!r} is not in all of layers, errors and totals")
        for name, errors in self.errors.items():
            if len(errors) != len(self.bins):
                raise ValueError(f"{name!r} has {len(errors)} errors for {len(self.bins)} bins")
            if not all(math.isfinite(error) and error >= 0 for error in (*errors, self.totals[name])):
                raise ValueError(f"{name!r} has an error that is not a finite number of at least 0")

    @property
    def missing(self) -> list[str]:
        """Layers that are not measured yet."""
        return [name for name in self.layers if name not in self.totals]

    def ranking(self) -> list[str]:
        """Measured layers, the most sensitive first."""
        return ranked({name: self.totals[name] for name in self.layers if name in self.totals})

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, asdict(self))


def open_sensitivity(path: Path) -> Sensitivity:
    """What a file of `slimdit sensitivity` holds; a folder stands for the file in it.

    Raises:
        ValueError: it is damaged, or not such a file.
        FileNotFoundError: there is none.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: make it with `slimdit sensitivity MODEL --out DIR`")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 alike, nested too deep
        raise ValueError(f"{file} is not a whole JSON file ({error}): measure the sensitivity again") from error
    return build(Sensitivity, values, str(file))


def read_sensitivity(path: str | Path, expected: Iterable[str] = ()) -> dict[str, float]:
    """The total error of every layer, by name, of a file or folder that `slimdit sensitivity` has finished.

    Args:
        expected: layers that must be in it: those of the model it is to be used for.

    Raises:
        ValueError: the file is damaged, unfinished, or of another model or perturbation.
        FileNotFoundError: there is none.
    """
    found = open_sensitivity(Path(path))
    if found.missing:
        raise ValueError(f"{path} has {len(found.totals)} of {len(found.layers)} layers: finish it with "
                         f"`slimdit sensitivity` and --resume")
    if foreign := [name for name in expected if name not in found.totals]:
        raise ValueError(f"{path} says nothing of {foreign[0]!r}: it is of another model, or of the perturbation "
                         f"{found.settings.get('perturb')!r}, which is of other layers; measure this model's")
    return {name: found.totals[name] for name in found.layers}


def measured_errors(method: str, path: str | None) -> dict[str, float]:
    """`read_sensitivity` for the option `sensitivity` of a method: no file has no errors, and a bad one is refused.

    Raises:
        Refused: the file is missing, damaged or unfinished.
    """
    try:
        return read_sensitivity(path) if path else {}
    except (OSError, ValueError) as error:
        raise Refused(f"{method}: sensitivity: {error}") from error


def protected(sensitivity: Mapping[str, float], share: float) -> list[str]:
    """The fewest layers that cause at least `share` of the summed error, the most sensitive first.

    Raises:
        ValueError: the share is outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the error to protect from must be in 0..1, not {share}")
    goal = share * math.fsum(sensitivity.values())
    chosen: list[str] = []
    for name in ranked(sensitivity):
        # fsum rounds once, so all layers together reach the whole sum exactly.
        if math.fsum(sensitivity[one] for one in chosen) >= goal:
            break
        chosen.append(name)
    return chosen


def ranked(sensitivity: Mapping[str, float]) -> list[str]:
    """Names by falling error; equal ones in the order they came."""
    return sorted(sensitivity, key=lambda name: -sensitivity[name])


def keep_ratios(sensitivity: Mapping[str, float], keep: float, among: str = "*") -> dict[str, float]:
    """How much each block keeps, so that all keep `keep` on average and the sensitive ones more.

    Cutting the share r of a block is taken to cost its summed error times r^2. The cheapest shares of a given mean
    are then r = c / error; but no block keeps less than half of `keep`, for far from what was measured the square is a
    guess.

    Args:
        sensitivity: error per layer (`blocks.0.mlp.fc1`) or per block (`blocks.0`).
        keep: mean of the ratios.
        among: pattern of the layers that count, such as `"*.mlp.*"` where MLPs are to be cut.

    Returns:
        A ratio above 0 and at most 1 for each block, by its name.

    Raises:
        ValueError: keep is not above 0 and at most 1, or the pattern matches no layer of a block.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, not {keep}")
    errors = block_errors(sensitivity, among)
    largest = max(errors.values()) or 1.0
    ease = {block: 1 / max(error / largest, NO_ERROR) for block, error in errors.items()}
    most, cut = 1 - keep / 2, (1 - keep) * len(errors)  # of one block; of all
    full: set[str] = set()
    while True:
        free = [block for block in ease if block not in full]
        level = (cut - most * len(full)) / math.fsum(ease[block] for block in free)
        over = {block for block in free if level * ease[block] > most}
        if not over:
            return {block: 1 - (most if block in full else level * ease[block]) for block in ease}
        full |= over


def block_errors(sensitivity: Mapping[str, float], among: str) -> dict[str, float]:
    """The summed error of each block's layers that match a pattern."""
    errors: dict[str, float] = {}
    for name, error in sensitivity.items():
        room, _, rest = name.partition(".")
        if room == "blocks" and fnmatchcase(name, among):
            block = f"blocks.{rest.partition('.')[0]}"
            errors[block] = errors.get(block, 0.0) + error
    if not errors:
        raise ValueError(f"{among!r} matches no layer of a block in the sensitivity")
    return errors
