"""A training plan: which model on which data for how long, as a TOML file that stands beside what it made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..models.dit import DiTConfig, preset, uniform
from ..sampling.solvers import Sampling
from ..strict import build, read_toml
from .loop import TrainConfig

StoredDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ModelPlan:
    """A preset by name, or depth, width, heads and patch.

    Raises:
        ValueError: neither, or both.
    """

    preset: str | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    patch: int | None = None
    learn_sigma: bool = True
    label_dropout: float = 0.1
    frequency_shift: int = 0

    def __post_init__(self) -> None:
        shape = (self.depth, self.width, self.heads, self.patch)
        if (self.preset is None) == (None in shape) or (self.preset and any(side is not None for side in shape)):
            raise ValueError("give either a preset, or all of depth, width, heads and patch")

    def config(self, shape: tuple[int, int, int], classes: int) -> DiTConfig:
        """The structure for data of this shape (channels, height, width) and number of classes."""
        options: dict[str, Any] = {
            "input_size": shape[1:], "channels": shape[0], "classes": classes, "learn_sigma": self.learn_sigma,
            "label_dropout": self.label_dropout, "frequency_shift": self.frequency_shift}
        if self.preset is not None:
            return preset(self.preset, **options)
        return uniform(depth=self.depth or 0, width=self.width or 0, heads=self.heads or 0, patch=self.patch, **options)


@dataclass(frozen=True)
class DataPlan:
    """What to learn from, as `open_data` takes it."""

    source: str
    size: int | None = None
    split: str = "train"
    flip: bool = False


@dataclass(frozen=True)
class TrainingPlan:
    """Everything `slimdit train` needs."""

    name: str
    model: ModelPlan
    data: DataPlan
    training: TrainConfig
    sampling: Sampling = field(default_factory=Sampling)
    stored: StoredDtype = "float32"  # of the weights in the saved model
    start_from: str | None = None  # a model to go on from instead of random weights: a path, "bundled" or a Hub id


def read_plan(path: Path) -> TrainingPlan:
    """The plan in a TOML file.

    Raises:
        ValueError: it is not TOML, or a name or value in it is refused.
    """
    values = read_toml(path)
    parts = {"model": ModelPlan, "data": DataPlan, "training": TrainConfig, "sampling": Sampling}
    for name, cls in parts.items():
        if name in values:
            values[name] = build(cls, values[name], f"{path}: {name}")
    return build(TrainingPlan, values, str(path))
