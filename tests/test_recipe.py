"""Recipes: read strictly, written back whole, run with a copy at the door and resumed where they stopped."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimdit.context import Context, Refused, require
from slimdit.methods import METHODS
from slimdit.methods.compile import Compile
from slimdit.methods.finetune import Finetune
from slimdit.methods.prune_width import PruneWidth
from slimdit.methods.quantize import Quantize
from slimdit.methods.reduce_steps import ReduceSteps
from slimdit.models.dit import DiT, uniform
from slimdit.pipeline import Pipeline
from slimdit.recipe import (
    Recipe,
    applicable,
    check,
    config_mismatch,
    find,
    fingerprint,
    parse,
    read,
    rehearse,
    run,
    shipped,
)
from slimdit.sampling.settings import Sampling

from .test_methods import SMALL, images, small_pipeline

LEAN = '''
name = "lean"
model = "bundled"
description = "A stack."
methods = [
  {reduce_steps = {solver = "unipc", steps = 10}},
  {quantize     = {weights = "int8", activations = "int8"}},
]
'''


def test_reads_methods_in_order():
    assert parse(LEAN) == Recipe("lean", (ReduceSteps(10, solver="unipc"), Quantize(activations="int8")),
                                 description="A stack.")


def test_tables_are_toml_too():
    text = 'name = "a"\n[[methods]]\nquantize = {}\n[[methods]]\n[methods.compile]\ndtype = "bfloat16"\n'
    assert parse(text).methods == (Quantize(), Compile(dtype="bfloat16"))


def test_lists_become_tuples():
    text = 'name = "a"\nmethods = [{reduce_steps = {steps = 2, timesteps = [999, 400]}}]'
    assert parse(text).methods == (ReduceSteps(2, timesteps=(999, 400)),)


MISTAKES = {
    "unknown key": (LEAN.replace("model =", "modle ="), 3, "'modle' is unknown; did you mean 'model'"),
    "unknown method": (LEAN.replace("quantize  ", "quantise  "), 7, "'quantise' is unknown; did you mean 'quantize'"),
    "unknown option": (LEAN.replace("activations", "activation"), 7, "did you mean 'activations'"),
    "unknown value": (LEAN.replace('"int8", act', '"int3", act'), 7, "int3"),
    "unknown solver": (LEAN.replace("unipc", "unicp"), 6, "unipc"),
    "wrong type": (LEAN.replace("10", '"ten"'), 6, "steps: expected int, not 'ten'"),
    "bool for a number": (LEAN.replace("10", "true"), 6, "steps: expected int, not True"),
    "refused value": (LEAN.replace("10", "0"), 6, "steps must be a whole number above 0"),
    "two methods in one entry": (LEAN.replace("}},\n  {quantize", "}, quantize"), 5, "entry 1"),
    "options that are no table": (LEAN.replace('{solver = "unipc", steps = 10}', "10"), 6, "table of options"),
    "model that is no text": (LEAN.replace('"bundled"', "3"), 3, "model must be a text"),
    "name that is no file name": (LEAN.replace('"lean"', '"../lean"'), 2, "name '../lean'"),
    "methods that are no list": ('\nname = "a"\nmethods = "quantize"', 3, "methods must be a list"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_with_its_line_and_the_nearest_right_name(tmp_path, mistake):
    text, line, sentence = MISTAKES[mistake]
    path = tmp_path / "lean.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert sentence in str(caught.value)


def test_the_line_is_that_of_the_mistake_not_of_a_comment_or_an_earlier_method():
    text = """# stepz = 3
name = "a"
[[methods]]
quantize = {protect = ["stepz = 3"]}
[[methods]]
# stepz = 3
[methods.reduce_steps]
steps = 2
stepz = 3
"""
    with pytest.raises(ValueError, match="recipe:9: reduce_steps: 'stepz' is not an option; did you mean 'steps'"):
        parse(text)


def test_not_toml_and_missing_parts_are_said():
    with pytest.raises(ValueError, match=r"not a TOML file.*line 2"):
        parse("name = 'a'\nmethods = [}")
    with pytest.raises(ValueError, match="has no methods"):
        parse('name = "a"')
    with pytest.raises(ValueError, match="has no name"):
        parse("methods = []")
    with pytest.raises(ValueError, match="recipe:2: controls must be a list of recipes' names, not 'b'"):
        parse('name = "a"\ncontrols = "b"\nmethods = []')
    with pytest.raises(ValueError, match="recipe:1: recipe: a cannot be its own control"):
        parse('name = "a"\ncontrols = ["a"]\nmethods = []')


def test_finds_files_and_shipped_recipes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(LEAN)
    assert find(str(path)).name == "lean"
    assert find("few-steps").name == "few-steps"
    with pytest.raises(ValueError, match="'few-stps' is neither a file nor shipped; did you mean 'few-steps'"):
        find("few-stps")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
patterns = texts.map(lambda text: text.replace(":", ""))


@given(texts, texts, st.lists(st.one_of(
    st.builds(Compile, dtype=st.sampled_from(["auto", "bfloat16"])),
    st.builds(Quantize, activations=st.sampled_from([None, "int8"]), protect=st.lists(patterns, max_size=2).map(tuple)),
    st.builds(ReduceSteps, steps=st.integers(2, 50), solver=st.sampled_from([None, "ddpm"]))), max_size=4))
def test_to_toml_reads_back(model, description, methods):
    recipe = Recipe("round-trip", tuple(methods), model, description, ("one", "other"))
    assert parse(recipe.to_toml()) == recipe
    assert json.loads(json.dumps(recipe.to_dict()))["methods"] == [dict(entry) for entry in recipe.to_dict()["methods"]]


def test_to_toml_spells_defaults_out():
    assert 'protect = ["t_embedder.*",' in parse('name = "a"\nmethods = [{quantize = {}}]').to_toml()


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_named_as_their_file_described_and_pass_on_a_twin(name, monkeypatch):
    monkeypatch.setattr("slimdit.methods.quantize.require_float8", lambda context: None)  # as where they are for
    recipe = find(name)
    assert recipe.name == name and recipe.model == "bundled" and recipe.description
    assert set(recipe.controls) <= set(shipped())
    alike = uniform(depth=5, width=24, heads=6, patch=1, input_size=(8, 8), channels=1, classes=3)  # as bundled
    target = Pipeline(DiT(alike), Sampling(steps=50, guidance=1.5))
    assert [entry["method"] for entry in check(recipe, target)] == [next(iter(m)) for m in recipe.to_dict()["methods"]]


def test_recipes_are_read_without_torch():
    code = "import sys, slimdit.recipe as r; r.shipped(); assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_check_refuses_what_a_rule_refuses():
    with pytest.raises(Refused, match="quantize once"):
        check(Recipe("twice", (Quantize(), Quantize())), SMALL)
    assert Refused.exit_code == 3
    require(True, "never said")


def test_applicable_is_yes_or_the_reason():
    packed = rehearse(Recipe("packed", (Quantize(),)), small_pipeline())[0]
    assert applicable("compile", packed) == "yes"
    assert "quantize once" in applicable("quantize", packed)
    assert "fewer steps" in applicable("reduce_steps", packed)  # 8 steps already, and the default is 20


def test_summary_is_a_line_of_what_is_not_default():
    assert parse(LEAN).summary() == "reduce_steps(steps=10, solver='unipc'), then quantize(activations='int8')"


def test_check_takes_a_pipeline_and_leaves_it_alone():
    pipeline = small_pipeline()
    before = fingerprint(pipeline)
    twin, facts = rehearse(parse(LEAN.replace("10", "3")), pipeline)
    assert fingerprint(pipeline) == before
    assert twin.sampling.steps == 3 and twin.model.config.width == 8 and twin.model.config.linears
    assert facts[0] == {"method": "reduce_steps", "evaluations_before": 16, "evaluations_after": 6}


def test_config_mismatch_sees_a_model_its_config_does_not_describe():
    model = small_pipeline().model
    assert config_mismatch(model) == ""
    model.blocks[1].mlp.fc1 = torch.nn.Linear(16, 8)
    assert "blocks.1.mlp.fc1.weight" in config_mismatch(model)


def test_run_saves_every_state_and_the_last_with_its_recipe(tmp_path):
    pipeline, recipe = small_pipeline(), parse(LEAN.replace("10", "3"))
    before, lines = fingerprint(pipeline), []
    context = Context(pipeline, tmp_path, report=lines.append)
    result = run(recipe, pipeline, context)
    assert fingerprint(pipeline) == before and pipeline.history == ()
    assert [list(entry) for entry in result.history] == [["reduce_steps"], ["quantize"]]
    assert result.history[1]["quantize"]["activations"] == "int8"
    assert read(tmp_path / "recipe.toml") == recipe
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["01-reduce_steps", "02-quantize"]
    assert lines == ["1/2 reduce_steps", "2/2 quantize"]
    markers = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/done.json"))]
    assert [marker["witness"] for marker in markers] == context.witnesses
    assert context.witnesses[1]["bytes_after"] < context.witnesses[1]["bytes_before"]

    from slimdit.formats import load
    assert (images(load(str(tmp_path))) == images(result)).all()


def test_a_killed_run_resumes_at_the_first_unfinished_method_and_ends_the_same(tmp_path, monkeypatch):
    recipe = Recipe("three", (ReduceSteps(4), Quantize(), ReduceSteps(2)))
    whole = run(recipe, small_pipeline(), Context(small_pipeline(), tmp_path / "whole"))

    def killed(self, pipeline, context):
        raise KeyboardInterrupt

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(Quantize, "apply", killed)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, small_pipeline(), Context(small_pipeline(), folder))
    with pytest.raises(FileExistsError, match="--resume"):
        run(recipe, small_pipeline(), Context(small_pipeline(), folder))

    applied = []
    for kind in set(METHODS.values()):
        def counted(self, pipeline, context, kind=kind, apply=kind.apply):
            applied.append(kind)
            return apply(self, pipeline, context)
        monkeypatch.setattr(kind, "apply", counted)
    context = Context(small_pipeline(), folder)
    resumed = run(recipe, small_pipeline(), context, resume=True)
    assert applied == [Quantize, ReduceSteps]
    assert [entry["method"] for entry in context.witnesses] == ["reduce_steps", "quantize", "reduce_steps"]
    assert fingerprint(resumed) == fingerprint(whole) and resumed.history == whole.history
    assert (images(resumed) == images(whole)).all()

    with pytest.raises(ValueError, match="another recipe, model or seed"):
        run(recipe, small_pipeline(), Context(small_pipeline(), folder, seed=1), resume=True)
    with pytest.raises(ValueError, match="another recipe"):
        run(Recipe("other", (Compile(),)), small_pipeline(), Context(small_pipeline(), folder), resume=True)


def test_another_seed_reaches_every_method_that_has_one_and_its_controls() -> None:
    first = Recipe("student", (PruneWidth(mlp=0.5), Quantize(weights="int8"), Finetune(steps=1, seed=3)),
                   controls=("plain",))
    second = first.reseeded(2)
    assert second is not None and second.name == "student-seed2" and second.controls == ("student", "plain-seed2")
    width, packed, tuned = second.methods
    assert (width.seed, packed, tuned.seed) == (2, Quantize(weights="int8"), 5)  # type: ignore[attr-defined]
    assert Recipe("packed", (Quantize(weights="int8"),)).reseeded(1) is None
