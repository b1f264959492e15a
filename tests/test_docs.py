"""What the pages say is so: commands exist, links resolve, the tree is there, the pins fit the ranges."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.record import table as benchmark_table
from slimdit.bench import read_records, update_page
from slimdit.report.render import update_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"),
                *ROOT.glob("results/**/*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

# Spelled in two halves, so that this file does not hold them itself.
FORBIDDEN = ["/wo" "rk/", "../sha" "red", "this ses" "sion", "py" "pi.org", "python" "hosted.org",
             "download.py" "torch.org", "npm" "js.org", "anaconda" ".org"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


def test_every_make_command_of_the_pages_is_in_the_makefile():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))
        assert named <= targets(), page
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE))


def test_every_target_is_explained_and_no_file_can_shadow_it():
    phony, = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == targets()
    assert set(re.findall(r"^([a-z]+):.*## .", MAKEFILE, re.MULTILINE)) == targets()


def test_continuous_integration_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]
    assert "make test" in "\n".join(blocks("sh"))


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines()
                                  if line.startswith("slimdit ")])
def test_the_readmes_command_lines_are_accepted(line: str):
    from typer.main import get_command

    from slimdit.cli import app

    words = shlex.split(line, comments=True)[1:]
    context = get_command(app).make_context("slimdit", list(words))  # type: ignore[attr-defined]
    name, command, rest = context.command.resolve_command(context, words)  # type: ignore[attr-defined]
    assert command is not None, name
    command.make_context(name, rest, parent=context)  # parses, and runs nothing


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    import slimdit
    from slimdit.models.dit import DiT, uniform

    model = DiT(uniform(depth=2, width=16, heads=2, patch=4, input_size=(8, 8), channels=1, classes=3)).eval()
    slimdit.save(slimdit.Pipeline(model), tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    code, = blocks("python")
    names: dict = {}
    exec(code.replace('"bundled"', repr(str(tmp_path / "bundled"))), names)
    assert names["images"].shape == (16, 8, 8, 1)


def test_every_relative_link_resolves():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|#", target):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"


def test_everything_in_the_readmes_tree_exists():
    tree, = re.findall(r"^## The repository\n+```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    parent, found = ROOT, 0
    for line in tree.splitlines():
        entry = line.split()[0]
        if line.startswith(" "):
            path = parent / entry
        else:
            path = parent = ROOT / entry
        assert path.exists(), entry
        assert path.is_dir() == entry.endswith("/"), entry
        found += 1
    assert found > 15


def test_every_room_of_the_package_is_in_the_readmes_tree():
    rooms = {path.parent.name for path in (ROOT / "slimdit").glob("*/*.py")}
    assert {room for room in rooms if f"\n  {room}/ " not in README} == set()


def test_the_readme_has_its_table_between_markers_below_the_command():
    before, _, rest = README.partition("<!-- table:demo -->")
    assert rest.partition("<!-- /table -->")[0].strip()
    assert before.rstrip().endswith("```sh\nmake tables\n```")


@pytest.mark.parametrize(("page", "name"), [("README.md", "demo"), ("docs/methods.md", "methods"),
                                            ("docs/methods.md", "engines"),
                                            ("docs/study.md", "study"), ("README.md", "study"),
                                            ("docs/study.md", "study-xs4"), ("docs/steps.md", "steps")])
def test_tables_are_what_their_records_give(page, name, tmp_path):
    copy, folder = tmp_path / "page.md", ROOT / "results" / name
    copy.write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    update_page(copy, name, folder, read_records(folder))
    assert copy.read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8"), "make tables"


def test_the_benchmarks_page_is_what_its_records_give(tmp_path):
    page = ROOT / "benchmarks" / "README.md"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    for path in (ROOT / "results" / "benchmarks").glob("*.json"):
        update_markdown(copy, path.stem, benchmark_table(json.loads(path.read_text(encoding="utf-8"))))
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), "python -m benchmarks.record"


def test_no_tracked_file_names_a_private_place_or_a_package_host():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True,
                           text=True).stdout
    found = []
    for name in names.split("\0"):
        path = ROOT / name
        if not path.is_file() or path.suffix in {".safetensors", ".npz", ".png", ".gz"}:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{name}: {word}" for word in FORBIDDEN if word in text]
    assert found == []


def test_the_changelog_knows_the_version():
    version = PROJECT["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    import slimdit

    assert slimdit.__version__ == version


def test_the_linter_and_the_type_checker_are_configured_and_run():
    assert PROJECT["tool"]["ruff"]["lint"]["select"]
    assert PROJECT["tool"]["mypy"]["packages"] == ["slimdit"]
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    assert "/ruff check ." in lint
    assert "/mypy" in lint
    assert re.search(r"^test: lint\b", MAKEFILE, re.MULTILINE)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def direct() -> list[Requirement]:
    project = PROJECT["project"]
    return [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]]


def test_pytorch_is_pinned_first_and_the_makefile_installs_that_one():
    name, version = next(iter(pins().items()))
    assert name == "torch"
    assert f"TORCH ?= torch=={version}\n" in MAKEFILE


def test_every_direct_dependency_is_pinned_inside_its_range():
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    assert len(pinned) == len(pins())
    for requirement in direct():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_pins_bring_no_gpu_build():
    assert [name for name in pins() if re.search(r"nvidia|cuda|triton|torchvision", name)] == []


def test_every_dependency_is_explained():
    page = (ROOT / "docs" / "design" / "dependencies.md").read_text(encoding="utf-8")
    explained = {name for row in re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE) for name in row.split(", ")}
    assert {requirement.name for requirement in direct()} <= explained
    for requirement in (Requirement(text) for text in PROJECT["project"]["dependencies"]):
        row, = re.findall(rf"^\| {requirement.name} \| ([^|]+) \|", page, re.MULTILINE)
        assert Requirement(f"{requirement.name}{row}").specifier == requirement.specifier


def test_the_help_of_the_makefile_lists_its_targets():
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", "help"], capture_output=True, text=True,
                          check=True, env={**os.environ, "MAKEFLAGS": ""})
    assert {line.split()[1] for line in done.stdout.splitlines()} == targets()


def test_an_old_python_is_refused_with_a_sentence(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(["make", "-C", str(tmp_path), "install", f"PYTHON={old}"], capture_output=True, text=True,
                          env={**os.environ, "MAKEFLAGS": ""})
    assert done.returncode != 0
    assert "slimdit needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
