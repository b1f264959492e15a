"""The house: imports go down the picture of docs/design/0001-architecture.md only, and start-up is quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "slimdit"
FLOORS = [
    {"files", "strict", "workers", "answers"},
    {"models", "sampling", "report", "protocol", "shards"},
    {"pipeline"},
    {"metrics", "training", "formats", "sample_set", "compiling"},
    {"context"},
    {"allocation"},
    {"methods"},
    {"recipe"},
    {"commands", "roofline", "row", "sensitivity"},
    {"bench", "catalogue", "verify"},
    {"cli"},
    {"assets"},
]
"""From the ground up; rooms of one floor do not import each other."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
APART = [("methods", "metrics"), ("metrics", "methods")]
FILES = sorted(HOUSE.rglob("*.py"))


def room(module: tuple[str, ...]) -> str:
    return module[0] if module else ""


def imports(path: Path) -> list[tuple[str, ...]]:
    """Modules of slimdit that a file imports anywhere in it, without the root's name: ("models", "dit")."""
    here = path.relative_to(HOUSE).with_suffix("").parts
    package = here[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.split(".")[0] == "slimdit"]
        elif isinstance(node, ast.ImportFrom):
            named = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[:len(package) - node.level + 1] + named
            elif named[:1] == ("slimdit",):
                base = named[1:]
            else:
                continue
            for alias in node.names:
                deeper = (*base, alias.name)
                is_module = HOUSE.joinpath(*deeper).is_dir() or HOUSE.joinpath(*deeper).with_suffix(".py").exists()
                found.append(deeper if is_module else base)
    return found


def broken_rules(path: Path) -> list[str]:
    here = path.relative_to(HOUSE).with_suffix("").parts
    mine = room(here)
    broken = []
    for module in imports(path):
        theirs = room(module)
        if not theirs:
            broken.append(f"{'/'.join(here)} imports the package root")
        elif theirs == mine:
            continue
        elif (mine, theirs) in APART or FLOOR[theirs] >= FLOOR[mine]:
            broken.append(f"{'/'.join(here)} imports {'.'.join(module)}, which is not below it")
        elif mine == "report" and theirs not in ("files", "strict"):
            broken.append(f"{'/'.join(here)} imports {'.'.join(module)}; report/ stands on its own")
    if mine == "methods" and here[-1] != "__init__":
        broken += [f"{here[-1]} imports {'.'.join(module)}: a method imports no other" for module in imports(path)
                   if room(module) == "methods"]
    return broken


@pytest.mark.parametrize("path", [path for path in FILES if path not in (HOUSE / "__init__.py", HOUSE / "__main__.py")],
                         ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_go_down_only(path):
    assert room(path.relative_to(HOUSE).with_suffix("").parts) in FLOOR, "a new room: give it a floor in this file"
    assert broken_rules(path) == []


def test_the_rules_can_be_broken(tmp_path, monkeypatch):
    """The check sees what it is for."""
    monkeypatch.setattr(f"{__name__}.HOUSE", tmp_path)
    for name in ("pipeline.py", "models/dit.py", "methods/a.py", "methods/b.py", "metrics/q.py", "report/r.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    wrong = {"models/dit.py": "from ..pipeline import Pipeline", "methods/a.py": "from .b import B",
             "metrics/q.py": "def f():\n    from slimdit.methods import a", "methods/b.py": "import slimdit.metrics.q",
             "report/r.py": "from ..models import dit", "pipeline.py": "from . import x"}
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
        assert len(broken_rules(tmp_path / name)) == 1, name
    (tmp_path / "pipeline.py").write_text("from .models.dit import DiT\nfrom .sampling import process\nimport torch")
    assert broken_rules(tmp_path / "pipeline.py") == []


def test_only_the_training_loop_steps_an_optimizer():
    users = [str(path.relative_to(HOUSE)) for path in FILES if "torch.optim" in path.read_text()]
    assert users == ["training/loop.py"]


def test_only_models_changes_a_models_layers():
    calls = ("replace_linear(", "pack_linear(", "set_submodule(")
    changing = [str(path.relative_to(HOUSE)) for path in FILES if any(call in path.read_text() for call in calls)]
    assert changing == ["models/dit.py", "models/linear.py", "models/surgery.py"]


QUICK = ["recipe", "methods", "context", "allocation", "files", "strict", "report.record", "report.pareto", "catalogue",
         "cli"]


@pytest.mark.parametrize("name", QUICK)
def test_start_up_does_without_torch(name):
    if not HOUSE.joinpath(*name.split(".")).with_suffix(".py").exists() and not (HOUSE / name).is_dir():
        pytest.skip(f"no {name} yet")
    code = f"import sys, slimdit.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_room_is_called_by_what_it_is_not():
    forbidden = {"utils", "common", "base", "core", "manager", "helper", "helpers"}
    assert not {path.stem for path in FILES} & forbidden and not {path.parent.name for path in FILES} & forbidden
