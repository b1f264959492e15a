"""Training plans: read strictly, and the committed ones are what the bundled models were trained by."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimdit.models.dit import preset_name
from slimdit.training.plan import ModelPlan, read_plan

BASES = Path(__file__).parents[1] / "results" / "bases"


@pytest.mark.parametrize("path", sorted(BASES.glob("*/training.toml")), ids=lambda path: path.parent.name)
def test_committed_plans_read(path: Path) -> None:
    plan = read_plan(path)
    assert plan.name == path.parent.name
    assert plan.model.config((1, 32, 32), 10).tokens == 64


def test_the_bundled_model_saw_three_million_images() -> None:
    training = read_plan(BASES / "bundled" / "training.toml").training
    assert training.steps * training.batch >= 3_000_000


def test_a_preset_or_a_shape_but_not_both() -> None:
    assert preset_name(ModelPlan(preset="XS/4").config((1, 32, 32), 10)) == "XS/4"
    assert ModelPlan(depth=2, width=64, heads=2, patch=8).config((3, 32, 16), 5).grid == (4, 2)
    for values in ({}, {"depth": 2}, {"preset": "XS/4", "depth": 2, "width": 8, "heads": 1, "patch": 1}):
        with pytest.raises(ValueError, match="either a preset, or all of"):
            ModelPlan(**values)


@pytest.mark.parametrize(("text", "said"), [
    ("name = 'x'", "'model' is missing"),
    ("name = 'x'\nmodel = {preset = 'XS/4'}\ndata = {source = 'd'}\ntraining = {step = 1}", "did you mean 'steps'"),
    ("name = 'x'\nmodel = {preset = 'XS/4'}\ndata = {source = 'd'}\ntraining = {steps = 0}", "steps"),
    ("name = 'x'\nmodl = {}", "did you mean 'model'"),
    ("name = [", "not a TOML file"),
])
def test_a_bad_plan_is_refused_with_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_plan(path)
