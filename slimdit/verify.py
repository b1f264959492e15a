"""Whether a saved model still is what its evidence says: a sample of the evidence is measured again.

What can be computed must come out equal. Images are made again, the first ones at least: all of them have one hash, and
the numbers of fewer are compared where a number does not depend on how many there are, by whether its two intervals
meet. Speed and memory, which another machine would change, are not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .commands import costs
from .formats import load
from .metrics.evaluate import conditions, distributions, metric_name, open_reference
from .metrics.features import extractor
from .metrics.intervals import Interval
from .pipeline import Pipeline
from .protocol import unlike
from .report.record import Record, Value, read_evidence
from .row import model_hash
from .sample_set import fingerprint
from .sampling.seeds import image_labels
from .strict import require

EVIDENCE = "evidence.json"
IMAGES = 64  # made again unless more are asked for

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what, total) to a progress bar."""


@dataclass(frozen=True)
class Finding:
    """What the evidence says, what was found, and whether it holds."""

    recorded: Any
    found: Any
    holds: bool


def verify(folder: Path, *, images: int = IMAGES, device: str = "cpu", bar: Bar) -> dict[str, Any]:
    """Measure a sample of a model's evidence again; JSON-ready, with `holds` for all of it and for each finding.

    Raises:
        ValueError: the folder has no evidence, or it is damaged or of a row that did not end well.
        Refused: the reference or the feature network is another than the evidence's.
    """
    record = own_record(folder)
    pipeline = load(folder).to(device)
    findings = weights_and_costs(folder, pipeline, record)
    count = min(images, record.protocol["images"])
    findings |= quality(pipeline, record, count, device, bar)
    numbers = {**record.metrics, **record.against_baseline}
    return {"model": str(folder), "row": record.name, "images": f"{count} of {record.protocol['images']}",
            "holds": all(finding.holds for finding in findings.values()),
            "findings": {name: asdict(finding) for name, finding in findings.items()},
            "not measured again": [name for name in numbers if name not in findings]}


def own_record(folder: Path) -> Record:
    """The record of the model in a folder.

    Raises:
        ValueError: there is none that can be verified.
    """
    path = folder / EVIDENCE
    if not path.is_file():
        raise ValueError(f"{folder} has no {EVIDENCE}: models that `slimdit bench` made have one")
    record = read_evidence(path)[-1]
    wanted = {"images": int, "batch": int, "features": str, "reference": str}
    if record.status != "done" or not all(isinstance(record.protocol.get(name), kind) for name, kind in wanted.items()):
        raise ValueError(f"{path} is not the evidence of a row that was measured to its end: bench the model again")
    return record


def weights_and_costs(folder: Path, pipeline: Pipeline, record: Record) -> dict[str, Finding]:
    """What is computed: it must be equal."""
    found: dict[str, Any] = {"size": (folder / "model.safetensors").stat().st_size,
                             **{name: value for name, value in costs(pipeline).items() if name in record.metrics}}
    findings = {name: Finding(record.metrics[name].value, value, record.metrics[name].value == value)
                for name, value in found.items() if name in record.metrics}
    measured = record.protocol.get("row_model")
    if measured is not None:
        findings["weights"] = Finding(measured, now := model_hash(folder), measured == now)
    return findings


def quality(pipeline: Pipeline, record: Record, count: int, device: str, bar: Bar) -> dict[str, Finding]:
    """What is sampled: images that are equal, or numbers whose intervals meet."""
    protocol = record.protocol
    seed = record.provenance.get("seeds", {}).get("images", protocol.get("seed", 0))
    weights = protocol.get("feature_weights")
    network = extractor(protocol["features"], weights=Path(weights) if weights else None, device=device)
    reference = open_reference(protocol["reference"], network)
    labels = image_labels(seed, range(count), pipeline.model.config.classes).numpy()
    now = {**conditions(count, seed, labels, reference, network), "images": None, "labels": None}
    changed = unlike(protocol.get("conditions", {}), now)
    require(not changed, f"the evidence of row {record.name!r} was measured under other conditions "
                         f"({', '.join(changed)}): verify it with the reference and network it names")
    with bar("sampling", count) as progress:
        images = pipeline.sample(range(count), seed=seed, batch=protocol["batch"], progress=progress)
    if record.images is not None and fingerprint(images) == record.images.sha256:
        return {"images": Finding(record.images.sha256, record.images.sha256, True)}
    found = distributions(network(images, range(count)), labels, reference, network.name)
    whole = count == protocol["images"]
    return {name: Finding(brief(record.metrics[name]), brief(interval), meet(record.metrics[name], interval))
            for name, interval in found.items()
            if name in record.metrics and (whole or name in free_of_number(network.name))}


def free_of_number(network: str) -> tuple[str, ...]:
    """The metrics that do not depend on how many images there are, but for chance."""
    return metric_name("kid", network), metric_name("precision", network), "class_accuracy"


def meet(recorded: Value, found: Interval) -> bool:
    """Whether two intervals have a number in common."""
    low, high = (recorded.value if end is None else end for end in (recorded.low, recorded.high))
    return low <= found.high and found.low <= high


def brief(number: Value | Interval) -> Mapping[str, Any]:
    """A number, its interval and how many images it rests on."""
    return {"value": number.value, "low": number.low, "high": number.high, "n": number.n}
