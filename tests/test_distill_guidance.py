"""Guidance learned: the student answers in one pass what its teacher answered in two."""

import pytest
import torch

from slimdit.context import Context, Refused
from slimdit.methods.distill_guidance import DistillGuidance, guided_calls
from slimdit.methods.finetune import Finetune
from slimdit.methods.quantize import Quantize
from slimdit.recipe import Recipe, apply, fingerprint, rehearse, run
from slimdit.sampling.settings import Sampling
from slimdit.training import student
from slimdit.training.student import StudentTraining

from .test_distill import tame_pipeline
from .test_methods import SMALL, apply_once, small_pipeline

QUICK = DistillGuidance(steps=2, batch=4, samples=4)


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(student, "HELD_OUT", 4)


def strong_pipeline(config=SMALL, **changes):
    settings = {"steps": 8, "guidance": 4.0, "guidance_interval": (0, 700), "guidance_channels": 1, **changes}
    return tame_pipeline(config).replace(sampling=Sampling(**settings))


def test_the_student_comes_nearer_to_the_guided_answers_and_samples_in_one_pass(tmp_path):
    method = DistillGuidance(steps=80, batch=8, samples=16, learning_rate=1e-3, ema=0.9, check_every=80)
    changed, witness = apply_once(method, strong_pipeline(), tmp_path)
    assert witness["held_out_error_last"] < 0.7 * witness["held_out_error_first"]
    assert changed.sampling == Sampling(steps=8, guidance=1.0)
    assert (witness["guidance"], witness["evaluations_before"], witness["evaluations_after"]) == (4.0, 13, 8)
    assert changed.model.config == SMALL


def test_held_out_are_the_labelled_calls_with_their_guided_answers(tmp_path):
    pipeline = strong_pipeline()
    calls, expected = guided_calls(StudentTraining(QUICK, pipeline, tmp_path, None, "cpu", 0, False, print))
    assert {int(call.t[0]) > 700 for call in calls} == {True, False}
    for call, answer in zip(calls, expected):
        with torch.no_grad():
            own, null = (pipeline.model(call.x, call.t, labels) for labels in (call.y, torch.full_like(call.y, 3)))
        assert len(call.y) == 4 and (call.y < 3).all()
        scale = 4.0 if call.t[0] <= 700 else 1.0
        torch.testing.assert_close(answer[:, :1], null[:, :1] + scale * (own[:, :1] - null[:, :1]), rtol=1e-4,
                                   atol=1e-5)
        torch.testing.assert_close(answer[:, 1:], own[:, 1:])


def test_its_teacher_is_the_original_with_the_guidance_of_the_moment(tmp_path):
    """Another scale of guidance teaches something else; the original's own does not matter."""
    def taught(folder, now, original):
        context = Context(strong_pipeline(guidance=original), tmp_path / folder)
        return fingerprint(apply(QUICK, strong_pipeline(guidance=now), context))

    assert taught("a", 2.0, 4.0) != taught("b", 3.0, 4.0)


def test_run_twice_it_is_the_same_and_the_folder_is_resumed(tmp_path):
    first = run(Recipe("one", (QUICK,)), small_pipeline(), Context(small_pipeline(), tmp_path / "a"))
    second = run(Recipe("one", (QUICK,)), small_pipeline(), Context(small_pipeline(), tmp_path / "b"))
    assert fingerprint(first) == fingerprint(second) and (tmp_path / "a" / "01-distill_guidance" / "training").is_dir()


def test_a_pipeline_without_guidance_has_nothing_to_save(tmp_path):
    with pytest.raises(Refused, match=r"samples without \(guidance 1\): leave distill_guidance out"):
        apply_once(QUICK, strong_pipeline(guidance=1.0), tmp_path)


def test_training_after_it_would_unlearn_it(tmp_path):
    changed, _ = apply_once(QUICK, small_pipeline(), tmp_path)
    with pytest.raises(Refused, match=r"unlearn the guidance .*: put finetune before distill_guidance"):
        apply(Finetune(steps=1), changed, Context(small_pipeline(), tmp_path))


def test_packed_layers_are_refused(tmp_path):
    packed, _ = apply_once(Quantize(), small_pipeline(), tmp_path)
    with pytest.raises(Refused, match="packed already: put distill_guidance before quantize"):
        apply_once(QUICK, packed, tmp_path)


def test_a_rehearsal_takes_a_step_or_two():
    method = DistillGuidance(steps=9999, batch=512, samples=9999, data="/no/such/folder")
    twin, (witness,) = rehearse(Recipe("long", (method,)), small_pipeline())
    assert witness["steps"] == 2 and twin.sampling.guidance == 1


@pytest.mark.parametrize("options, sentence", [
    ({"variance": -0.1}, "distill_guidance: variance must be 0 or more, not -0.1"), ({"batch": 0}, "batch"),
    ({"steps": 1, "images": 1}, "distill_guidance: give steps or images")])
def test_bad_options_are_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DistillGuidance(**options)
