"""slimdit: make a trained diffusion transformer cheaper to run, with proof that quality holds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .formats import load, save
    from .pipeline import Pipeline, Runtime
    from .recipe import Recipe
    from .sampling.solvers import Sampling

__version__ = "0.1.0"

_PUBLIC = {"load": "formats", "save": "formats", "Pipeline": "pipeline", "Runtime": "pipeline",
           "Sampling": "sampling.solvers", "Recipe": "recipe"}

__all__ = ["Pipeline", "Recipe", "Runtime", "Sampling", "load", "save"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `slimdit --help` does not wait for PyTorch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'slimdit' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
