"""A student made of its teacher: what it inherits, what teaches it, and that it learns."""

import json
import re
from dataclasses import replace

import pytest
import torch

from slimdit.context import Context, Refused
from slimdit.formats import load
from slimdit.methods.distill import Distill
from slimdit.methods.quantize import Quantize
from slimdit.models.dit import DiT, preset, uniform
from slimdit.models.surgery import block_macs, enlarge_patch, keep_blocks
from slimdit.recipe import Recipe, apply, config_mismatch, fingerprint, rehearse, run
from slimdit.sampling.process import NoiseProcess
from slimdit.training import student
from slimdit.training.student import HeldOut

from .test_methods import SMALL, apply_once, small_pipeline

DEEP = uniform(depth=4, width=16, heads=2, patch=2, input_size=(8, 4), channels=1, classes=3)
QUICK = Distill(steps=6, batch=4, samples=8, check_every=2, blocks=2)
BUILT = Distill(steps=0)


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(student, "HELD_OUT", 4)


def tame_pipeline(config=DEEP):
    """A random model predicts no noise, and the whole process would blow its samples up a hundred times."""
    return small_pipeline(config).replace(process=NoiseProcess(beta_end=0.002))


def assert_same(model, expected):
    assert model.config == expected.config
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


# --- building ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, DEEP])
def test_a_student_of_blocks_and_patch_is_the_cut_model(config, tmp_path):
    built, witness = apply_once(replace(BUILT, blocks=2, patch=4), small_pipeline(config), tmp_path)
    expected = small_pipeline(config).model
    keep_blocks(expected, [0, len(config.blocks) - 1])
    enlarge_patch(expected, 4)
    assert_same(built.model, expected)
    assert witness["student"]["blocks"] == 2 and witness["model_before"]["patch"] == 2
    assert witness["student"]["patch"] == 4 and witness["steps"] == 0 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("criterion", ["taylor", "activation", "magnitude"])
def test_a_narrow_student_loses_what_adds_nothing(criterion, tmp_path):
    pipeline = small_pipeline()
    with torch.no_grad():
        for block in pipeline.model.blocks:
            for part in (block.mlp.fc1.weight[:32], block.mlp.fc1.bias[:32], block.mlp.fc2.weight[:, :32],
                         block.attn.qkv.weight.view(3, 2, 8, 16)[:, 1], block.attn.qkv.bias.view(3, 2, 8)[:, 1],
                         block.attn.proj.weight[:, 8:]):
                part.zero_()
    built, witness = apply_once(replace(BUILT, mlp=0.5, heads=0.5, criterion=criterion), pipeline, tmp_path)
    assert (witness["student"]["mlp_widths"], witness["student"]["heads"]) == ([32, 32], [1, 1])
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 3])
    torch.testing.assert_close(built.model(x, t, y), pipeline.model(x, t, y), rtol=1e-4, atol=1e-4)


def test_a_random_student_has_the_structure_and_no_weight(tmp_path):
    method = replace(BUILT, blocks=2, mlp=0.5, init="random")
    pipeline, state = small_pipeline(DEEP), torch.random.get_rng_state()
    built, _ = apply_once(method, pipeline, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's randomness is touched
    inherited, _ = apply_once(replace(method, init="inherit"), small_pipeline(DEEP), tmp_path)
    assert built.model.config == inherited.model.config and config_mismatch(built.model) == ""
    assert not any(torch.equal(parameter, inherited.model.get_parameter(name))
                   for name, parameter in built.model.named_parameters())
    assert built.model.blocks[0].adaLN_modulation[1].weight.abs().sum() == 0  # adaLN-Zero
    again, _ = apply_once(method, small_pipeline(DEEP), tmp_path)
    other, _ = apply_once(replace(method, seed=1), small_pipeline(DEEP), tmp_path)
    assert_same(again.model, built.model)
    assert fingerprint(other) != fingerprint(built)


def test_what_is_pruned_in_the_recipe_is_what_the_student_is_made_of(tmp_path):
    """The model of that point, not the original: one whose weights were halved."""
    pipeline, original = small_pipeline(DEEP), small_pipeline(DEEP)
    with torch.no_grad():
        pipeline.model.blocks[3].mlp.fc1.weight.mul_(0.5)
    built = apply(replace(BUILT, blocks=2), pipeline, Context(original, tmp_path))
    assert torch.equal(built.model.blocks[1].mlp.fc1.weight, 0.5 * original.model.blocks[3].mlp.fc1.weight)


# --- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, most", [({"blocks": 2}, 0.8), ({"patch": 4}, 0.95), ({"mlp": 0.5}, 0.8)])
def test_a_student_comes_nearer_to_its_teacher(options, most, tmp_path):
    method = Distill(steps=60, batch=8, samples=16, learning_rate=1e-3, ema=0.9, check_every=60, **options)
    changed, witness = apply_once(method, tame_pipeline(), tmp_path)
    assert witness["held_out_error_last"] < most * witness["held_out_error_first"]
    assert config_mismatch(changed.model) == "" and not changed.model.training
    assert not any(module._forward_hooks for module in changed.model.modules())


def test_options_of_the_loss_are_in_it(tmp_path):
    short = replace(QUICK, steps=2, samples=4)
    methods = [short, *(replace(short, **change) for change in (
        {"alpha": 0.5}, {"features": 0.0}, {"sigmas": 0.5}, {"variance": 1.0}, {"alpha": 0.0, "features": 0.0},
        {"init": "random"}, {"features_until": 0.2}))]
    prints = [fingerprint(apply_once(method, small_pipeline(DEEP), tmp_path / str(number))[0])
              for number, method in enumerate(methods)]
    assert len(set(prints)) == len(methods)


def test_without_a_teacher_in_the_loss_nobody_asks_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("slimdit.training.loop.teacher_loss", lambda process, expert, alpha, *rest: calls.append(
        alpha) or (lambda model, batch: model(batch.clean, batch.t, batch.labels).square().mean((1, 2, 3))))
    apply_once(replace(QUICK, alpha=0.0, features=0.0), small_pipeline(DEEP), tmp_path)
    assert calls == [0.0]


def test_the_teacher_is_the_original_or_the_model_before(tmp_path):
    """An assistant whose last block is silent teaches something else than the original does."""
    def assistant():
        pipeline = small_pipeline(DEEP)
        with torch.no_grad():
            pipeline.model.final_layer.linear.weight.zero_()
        return pipeline

    errors = {}
    for teacher in ("original", "before"):
        context = Context(small_pipeline(DEEP), tmp_path / teacher)
        changed = apply(replace(QUICK, teacher=teacher), assistant(), context)
        errors[teacher] = context.witnesses[0]["held_out_error_first"]
        assert context.witnesses[0]["teacher"] == teacher and len(changed.model.blocks) == 2
    assert errors["before"] < 1e-6 < errors["original"]  # without a final layer every depth answers alike


def test_images_without_data_are_the_teachers_and_progress_is_told(tmp_path):
    lines = []
    context = Context(small_pipeline(DEEP), tmp_path, report=lines.append)
    apply(QUICK, small_pipeline(DEEP), context)
    assert context.witnesses[0]["data"] == "8 samples of the teacher"
    assert "8/8 samples of the teacher" in lines and any(line.startswith("step 6/6: loss ") for line in lines)


class Killed(Exception):  # noqa: N818
    pass


def test_killed_and_resumed_it_is_the_uninterrupted_run_to_the_bit(tmp_path, monkeypatch):
    recipe = Recipe("two", (QUICK, replace(QUICK, blocks=1, patch=4, teacher="before")))
    whole = run(recipe, small_pipeline(DEEP), Context(small_pipeline(DEEP), tmp_path / "whole"))
    check, asked = HeldOut.__call__, []

    def dying(self, model, step):
        answer = check(self, model, step)
        asked.append(step)
        if asked == [0, 2, 4, 6, 0, 2, 4]:
            raise Killed
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "__call__", dying)
        with pytest.raises(Killed):
            run(recipe, small_pipeline(DEEP), Context(small_pipeline(DEEP), tmp_path / "killed"))
    resumed = run(recipe, small_pipeline(DEEP), Context(small_pipeline(DEEP), tmp_path / "killed"), resume=True)
    assert fingerprint(resumed) == fingerprint(whole) == fingerprint(load(tmp_path / "killed"))
    assert resumed.model.config == DiT(resumed.model.config).config and resumed.model.config.patch == 4
    checks = json.loads((tmp_path / "killed" / "02-distill" / "training" / "checks.json").read_text())
    assert [entry["step"] for entry in checks] == [0, 2, 4, 6]


# --- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, sentence", [
    ({"blocks": 5}, "5 are more than its 4: ask for fewer"), ({"patch": 3}, "a patch of 3 is no multiple"),
    ({"patch": 8}, "does not divide its input of 8 x 4"), ({"patch": 1}, "a patch of 1 is no multiple")])
def test_what_the_model_cannot_be_made_into_is_refused(options, sentence, tmp_path):
    with pytest.raises(Refused, match=sentence):
        apply_once(replace(BUILT, **options), small_pipeline(DEEP), tmp_path)


@pytest.mark.parametrize("changes, sentence", [
    ({"classes": 5}, "its classes is 5 where the model's is 3: use"),
    ({"input_size": (8, 8)}, r"its input_size is \(8, 8\) where"), ({"channels": 2}, "its channels is 2"),
    ({"learn_sigma": False}, "its learn_sigma is False"), ({"label_dropout": 0.0}, "its label_rows is 3"),
    ({"width": 20}, "tokens of 16 features cannot be compared with the teacher's of 20: set features = 0"),
    ({"blocks": DEEP.blocks[:1]}, "2 blocks have no 1 of the teacher's")])
def test_a_teacher_that_answers_other_questions_is_refused(changes, sentence, tmp_path):
    teacher = small_pipeline(replace(DEEP, **changes))
    with pytest.raises(Refused, match=sentence):
        apply(QUICK, small_pipeline(DEEP), Context(teacher, tmp_path))


def test_packed_layers_are_refused_with_the_order_that_works(tmp_path):
    packed, _ = apply_once(Quantize(), small_pipeline(), tmp_path)
    with pytest.raises(Refused, match="10 layers are packed already: put distill before quantize"):
        apply_once(QUICK, packed, tmp_path)


def test_a_rehearsal_takes_a_step_or_two():
    method = Distill(steps=100_000, batch=512, samples=50_000, data="/no/such/folder", blocks=1, mlp=0.5, patch=4)
    twin, (witness,) = rehearse(Recipe("long", (method,)), SMALL)
    assert witness["steps"] <= 2 and witness["data"] == "4 samples of the teacher"
    assert twin.model.config.patch == 4 and len(twin.model.config.blocks) == 1


@pytest.mark.parametrize("options, sentence", [
    ({"alpha": 1.1}, "alpha must be in 0..1, not 1.1"), ({"alpha": -0.1}, "alpha must be in 0..1"),
    ({"alpha": 0.0}, "alpha = 0 asks the teacher nothing"), ({"blocks": 0}, "blocks must be at least 1, not 0"),
    ({"patch": 0}, "patch must be at least 1"), ({"mlp": 0.0}, "mlp is a share, above 0 up to 1, not 0.0"),
    ({"heads": 1.5}, "heads is a share"), ({"features_until": 0.0}, "features_until is a share"),
    ({"variance": -1.0}, "variance must be 0 or more"), ({"features": float("nan")}, "features must be 0 or more"),
    ({"sigmas": 0.0}, "sigmas must be above 0"), ({"init": "zero"}, "init 'zero' is unknown; use one of inherit"),
    ({"teacher": "me"}, "teacher 'me' is unknown"), ({"criterion": "luck"}, "criterion 'luck' is unknown"),
    ({"weighting": "snr"}, "weighting 'snr' is unknown"),
    ({"repeat": 5}, "repeat keeps the teacher's answers, and not its tokens"),
    ({"repeat": -1}, "repeat must be at least 0"),
    ({"steps": 1, "images": 1}, "give steps or images, not both")])
def test_bad_options_are_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=re.escape(f"distill: {sentence}")):
        Distill(**options)


@pytest.mark.parametrize(("config", "share"), [(preset("XS/4", input_size=(32, 32), channels=1, classes=10), 0.5),
                                               (preset("XS/4", input_size=(32, 32), channels=1, classes=10), 0.25),
                                               (preset("S/2"), 0.4), (DEEP, 0.7)])
def test_a_share_of_the_computation_is_met_with_the_fewest_blocks(config, share):
    sized = Distill(macs=share).sized(config)
    depth = len(config.blocks)
    assert sized.macs is None and sized.blocks == -(-depth * share // 1)
    kept = config.blocks[:sized.blocks]
    units = [sized.mlp * block.mlp_width for block in kept]
    whole = block_macs(config, [block.mlp_width for block in config.blocks], [block.heads for block in config.blocks])
    smaller = block_macs(replace(config, blocks=kept), units, [block.heads for block in kept])
    assert smaller / whole == pytest.approx(share, abs=1e-6)


def test_a_student_by_computation_is_built_and_reloads(tmp_path):
    built, _ = apply_once(Distill(macs=0.5, steps=0, features=0.0), small_pipeline(DEEP), tmp_path)
    assert not config_mismatch(built.model)
    assert len(built.model.config.blocks) == -(-len(DEEP.blocks) // 2)


@pytest.mark.parametrize(("options", "said"), [
    ({"macs": 0.5, "blocks": 2}, "either it or them"), ({"macs": 0.0}, "macs is a share"),
    ({"macs": 1.5}, "macs is a share"), ({"macs": True}, "macs is a share")])
def test_a_share_that_is_none_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Distill(**options)


def test_a_share_below_what_attention_takes_is_refused():
    with pytest.raises(Refused, match="without their MLPs"):
        Distill(macs=0.01).sized(preset("S/2"))
