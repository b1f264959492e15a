"""torch-fidelity without torchvision: its metrics, its Inception-v3 and its resize, as the package has them.

Its root imports data sets, VGG and CLIP, which need torchvision; nothing used here does. So torchvision is stood in for
while the package is imported, by empty classes that nothing calls. `make install` puts the package into a folder of its
own, `REFERENCES`: where torchmetrics finds it, torchmetrics imports it too, and fails without torchvision.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

REFERENCES = Path(sys.prefix) / "references"
ABSENT = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


class Absent(ModuleType):
    """A module of empty classes, whatever their names."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> ModuleType | type:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (), {})


def torch_fidelity(module: str) -> ModuleType:
    """A module of torch-fidelity by its name below the root; the test is skipped where the package is not installed."""
    try:
        return load(module)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def load(module: str) -> ModuleType:
    """A module of torch-fidelity by its name below the root.

    Raises:
        ModuleNotFoundError: the package is not installed where it is looked for.
    """
    if not (REFERENCES / "torch_fidelity").is_dir():
        raise ModuleNotFoundError(f"torch-fidelity is not in {REFERENCES}, where `make install` puts it")
    import torchmetrics  # noqa: F401  # before torch-fidelity can be found, which it would take for whole

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REFERENCES))
        for name in ABSENT:
            patch.setitem(sys.modules, name, Absent(name))
        return importlib.import_module(f"torch_fidelity.{module}")
