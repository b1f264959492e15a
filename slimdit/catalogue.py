"""What there is, a line each, for `slimdit list`, which prints what was kept of it: `assets/build.py`, `answers.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from inspect import getdoc
from typing import Any

Rows = list[dict[str, str]]


def methods() -> Rows:
    """The methods with their options and defaults."""
    from .methods import METHODS

    return [{"name": name, "about": first_line(cls), "options": options(cls)} for name, cls in METHODS.items()]


def metrics() -> Rows:
    """The metrics with their units and which way is better."""
    from .metrics import METRICS

    return [{"name": name, "about": metric.about,
             "options": f"{metric.unit + ', ' if metric.unit else ''}{metric.better} is better"}
            for name, metric in METRICS.items()]


def solvers() -> Rows:
    """The solvers, and the spacings they take."""
    from .sampling.settings import SOLVERS, SPACINGS

    spacings = f"spacing: {', '.join(SPACINGS)}"
    return [{"name": name, "about": about, "options": spacings} for name, about in SOLVERS.items()]


def presets() -> Rows:
    """The presets with their structure."""
    from .models.presets import PATCHES, PRESETS

    return [{"name": f"{name}/{patch}",
             "about": f"{shape.depth} blocks, {shape.width} wide, {shape.heads} heads, patch {patch}"}
            for name, shape in PRESETS.items() for patch in PATCHES]


def formats() -> Rows:
    """The file formats."""
    return [{"name": name, "about": about} for name, about in FORMATS.items()]


def recipes() -> Rows:
    """The shipped recipes."""
    from .recipe import read, shipped

    return [{"name": name, "about": (recipe := read(path)).description, "options": recipe.summary()}
            for name, path in shipped().items()]


def protocols() -> Rows:
    """The shipped protocols."""
    from .protocol import find_protocol, shipped_protocols

    return [{"name": name,
             "about": f"{(rules := find_protocol(name)).images} images a row, {rules.rounds} timed rounds"
                      + (f" in each of {rules.processes} processes" if rules.processes > 1 else ""),
             "options": f"margin: {dict(rules.margin)}"} for name in shipped_protocols()]


FORMATS = {
    "native": "a folder of config.json and model.safetensors, read and written",
    "diffusers": "a diffusers folder (model_index.json or a bare transformer), read and written",
    "openvino": "a folder of model.xml and model.bin that OpenVINO runs without slimdit, written",
    "original": "a .pt or .safetensors of DiT or fast-DiT, read",
}
"""What there is in `formats.FORMATS`, which imports PyTorch."""

CATALOGUE: Mapping[str, Callable[[], Rows]] = {
    "methods": methods, "metrics": metrics, "solvers": solvers, "presets": presets, "formats": formats,
    "recipes": recipes, "protocols": protocols,
}


def first_line(thing: Any) -> str:
    """The first sentence of a docstring."""
    return (getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def options(cls: Any) -> str:
    """A dataclass's options with their defaults."""
    parts = []
    for option in fields(cls):
        default = option.default if option.default is not MISSING else \
            option.default_factory() if option.default_factory is not MISSING else None
        required = option.default is MISSING and option.default_factory is MISSING
        parts.append(f"{option.name} (required)" if required else f"{option.name} = {default!r}")
    return ", ".join(parts)
