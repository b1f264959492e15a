"""A protocol: everything about a measurement that two rows must share to be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .strict import build, nearest, read_toml

SHIPPED = Path(__file__).parent / "assets" / "protocols"
CONDITIONS = ("images", "seed", "labels", "reference", "features", "dither", "resize")
"""What two rows must share to be compared; steps, solver and guidance may differ, and are what rows differ by."""


CLOCK = ("latency_batches", "rounds", "processes")
"""What says how rows are timed and decides nothing else: with `bench --retime`, all that may change."""


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The conditions that both rows know (are not None) and do not share: "images (16 and 32)"."""
    return [f"{name} ({one[name]} and {other[name]})" for name in CONDITIONS
            if one.get(name) is not None and other.get(name) is not None and one[name] != other[name]]


@dataclass(frozen=True)
class BaselineSampling:
    """The baseline's sampling, as in `Sampling`; what is None is the model's own."""

    solver: str | None = None
    steps: int | None = None
    spacing: str | None = None
    guidance: float | None = None
    guidance_channels: int | None = None
    guidance_interval: tuple[int, int] | None = None


@dataclass(frozen=True)
class BaselineRuntime:
    """How the baseline is executed; `auto` is the best float dtype of the machine."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = True
    attention: Literal["auto", "fused", "explicit", "native"] = "auto"


@dataclass(frozen=True)
class Protocol:
    """How rows are measured.

    Attributes:
        images: images per row, ids 0 to images - 1.
        seed: of the images; the A/A row uses `seed + 1`.
        batch: images at a time in quality sampling.
        latency_batches: batch sizes at which whole sampling runs are timed; throughput is that of the largest.
        rounds: interleaved timings of baseline and row, in each process.
        processes: in which a row is timed, one after another. With one, intervals say how much its rounds differ, and
            another process often gives a ratio beyond them. From three on they say how much processes differ.
        features: feature network of the distribution metrics.
        feature_weights: file of its weights, for networks that are not bundled.
        reference: `"bundled"`, or an `.npz` of images or statistics.
        resamples: of the bootstrap.
        margin: per metric, the rise of its distance that still counts as no loss; set before the run.
        timeout_s: seconds a row may take.
        threads: of the tensor library; None is all cores.

    Raises:
        ValueError: a number is out of its range.
    """

    name: str
    images: int = 512
    seed: int = 0
    batch: int = 64
    latency_batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    processes: int = 1
    features: str = "lite0"
    feature_weights: str | None = None
    reference: str = "bundled"
    resamples: int = 200
    margin: Mapping[str, float] = field(default_factory=dict)
    timeout_s: float = 900.0
    threads: int | None = None
    sampling: BaselineSampling = field(default_factory=BaselineSampling)
    runtime: BaselineRuntime = field(default_factory=BaselineRuntime)

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("batch", 1), ("rounds", 2), ("resamples", 20), ("timeout_s", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"protocol: {name} must be at least {least}, not {getattr(self, name)}")
        if self.processes < 1 or self.processes == 2:
            raise ValueError(f"protocol: processes must be 1, or at least 3 for an interval, not {self.processes}")
        if not self.latency_batches or min(self.latency_batches) < 1:
            raise ValueError(f"protocol: latency_batches must be sizes of at least 1, not {self.latency_batches}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, every default spelled out."""
        return {**asdict(self), "latency_batches": list(self.latency_batches), "margin": dict(self.margin)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "protocol") -> Protocol:
        """The protocol a mapping describes.

        Raises:
            ValueError: an unknown name, a wrong type or a refused value.
        """
        values = dict(values)
        for name, part in (("sampling", BaselineSampling), ("runtime", BaselineRuntime)):
            if name in values:
                values[name] = build(part, values[name], f"{where}: {name}")
        return build(cls, values, where)


def find_protocol(name: str) -> Protocol:
    """A shipped protocol by name, or one in a TOML file.

    Raises:
        ValueError: there is none such, or the file is refused.
    """
    path = SHIPPED / f"{name}.toml"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        raise ValueError(f"protocol {name!r} is neither a file nor shipped; {nearest(name, shipped_protocols())}")
    values = read_toml(path)
    return Protocol.from_dict(values, str(path))


def shipped_protocols() -> dict[str, Path]:
    """The protocols that come with slimdit."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
