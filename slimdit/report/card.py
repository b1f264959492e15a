"""A model card: what was done to a model and what that was measured to cost, rendered from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .record import Record
from .render import Metrics, markdown


def model_card(name: str, history: Sequence[Mapping[str, Any]], records: Sequence[Record], metrics: Metrics) -> str:
    """Markdown for the `README.md` of a saved model.

    Args:
        name: what to call the model.
        history: the methods that made it, each as {name: options}.
        records: the baseline's and the model's own, or none where nothing was measured.
        metrics: units and directions.
    """
    parts = [f"# {name}", "A diffusion transformer saved by slimdit.", "## What was done", _done(history)]
    parts += ["## What was measured", _measured(records, metrics), "## How to use it", _use()]
    return "\n\n".join(parts) + "\n"


def _done(history: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for place, (method, options) in enumerate((pair for entry in history for pair in entry.items()), 1):
        chosen = ", ".join(f"{key} = {value!r}" for key, value in options.items())
        lines.append(f"{place}. `{method}` with {chosen or 'its defaults'}")
    return "\n".join(lines) or "Nothing: these are the weights as they were loaded."


def _measured(records: Sequence[Record], metrics: Metrics) -> str:
    if not records:
        return "Nothing yet: `slimdit bench` measures a recipe against its baseline."
    last = records[-1]
    machine = last.provenance
    return "\n\n".join([
        markdown(records, metrics),
        f"{last.protocol.get('images')} images a row, protocol `{last.protocol.get('name')}`, seed "
        f"{last.protocol.get('seed')}; on {machine.get('gpu') or machine.get('cpu')} with {machine.get('threads')} "
        f"threads, {machine.get('date')}. The records are in `evidence.json`; "
        f"`{machine.get('command')}` makes them again."])


def _use() -> str:
    return ("```python\nimport slimdit\n\npipeline = slimdit.load(\"path/to/this/folder\")\n"
            "images = pipeline.sample(range(16), seed=0)  # uint8, (16, height, width, channels)\n```")
