"""Training as a method: it recovers, keeps pruned weights at zero, stops in time, and resumes to the bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from slimdit.context import Context, Refused
from slimdit.files import read_tensors
from slimdit.methods.finetune import Finetune
from slimdit.methods.prune_weights import PruneWeights
from slimdit.methods.quantize import Quantize
from slimdit.methods.reduce_steps import ReduceSteps
from slimdit.models.surgery import pruned_weights
from slimdit.recipe import Recipe, apply, fingerprint, rehearse, run
from slimdit.sampling.process import NoiseProcess
from slimdit.training import distillation, student
from slimdit.training.loop import Batch, TrainConfig, denoising_loss, teacher_loss, train
from slimdit.training.student import HeldOut

from .test_loop import tiny_data
from .test_methods import SMALL, apply_once, small_pipeline

QUICK = Finetune(steps=6, batch=8, samples=8, learning_rate=1e-3, alpha=1.0, check_every=2)


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(student, "HELD_OUT", 4)


def tame_pipeline():
    """A random model predicts no noise, and the whole process would blow its samples up a hundred times."""
    return small_pipeline().replace(process=NoiseProcess(beta_end=0.002))


def pruned_pipeline(teacher=small_pipeline):
    pipeline = teacher()
    return apply(PruneWeights(sparsity=0.6), pipeline.copy(), Context(pipeline, None))


def finetuned(method, tmp_path, teacher=small_pipeline, **changes):
    """The pruned model after training towards the unpruned one, and the witness."""
    context = Context(teacher(), tmp_path, **changes)
    return apply(method, pruned_pipeline(teacher), context), context.witnesses[0]


def zeros(pipeline):
    return {name: module.weight.detach() == 0 for name, module in pipeline.model.named_modules()
            if isinstance(module, torch.nn.Linear)}


def test_training_towards_the_teacher_recovers_and_pruned_weights_stay_zero(tmp_path):
    method = replace(QUICK, steps=60, samples=16, learning_rate=1e-3, ema=0.9, check_every=30)
    changed, witness = finetuned(method, tmp_path, tame_pipeline)
    assert witness["held_out_error_last"] < 0.5 * witness["held_out_error_first"]
    before, after = zeros(pruned_pipeline()), zeros(changed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert witness["zeros_kept"] == sum(int(mask.sum()) for mask in before.values()) > 0
    assert (witness["steps"], witness["images"], witness["data"]) == (60, 480, "16 samples of the teacher")
    assert witness["seconds"] > 0 and not changed.model.training


def test_a_model_with_few_zeros_may_move_all_its_weights(tmp_path):
    pipeline = small_pipeline()
    with torch.no_grad():
        pipeline.model.blocks[0].mlp.fc1.weight[:4] = 0  # 6 % of it
        pipeline.model.blocks[1].adaLN_modulation[1].weight.zero_()  # silent, not pruned
    assert pruned_weights(pipeline.model) == {}
    changed, witness = apply_once(replace(QUICK, alpha=0.0), pipeline, tmp_path)
    assert witness["zeros_kept"] == 0 and not (changed.model.blocks[0].mlp.fc1.weight == 0).any()


def test_the_budget_is_steps_or_images(tmp_path):
    assert Finetune().budget == 1000 and Finetune(steps=7).budget == 7
    assert Finetune(images=100, batch=64).budget == 2
    _, witness = finetuned(replace(QUICK, steps=None, images=20), tmp_path)
    assert (witness["steps"], witness["images"]) == (3, 24)


def test_data_is_what_the_recipe_names_then_the_runs_then_the_teachers_samples(tmp_path):
    np.savez(tmp_path / "named.npz", images=np.zeros((6, 8, 8, 1), np.uint8), labels=np.arange(6) % 3)
    method = replace(QUICK, steps=1)
    named = str(tmp_path / "named.npz")
    results = {data: finetuned(replace(method, data=data), tmp_path / str(number), data=own)
               for number, (data, own) in enumerate([(named, tiny_data()), (None, tiny_data())])}
    assert [witness["data"] for _, witness in results.values()] == [named, "the run's data"]
    prints = {fingerprint(changed) for changed, _ in results.values()}
    prints.add(fingerprint(finetuned(method, tmp_path / "samples")[0]))
    assert len(prints) == 3
    assert not (tmp_path / "1" / "training" / "samples.safetensors").exists()


def test_samples_are_other_images_than_the_held_out_ones(tmp_path, monkeypatch):
    from slimdit.training import calibration, samples

    ids = []

    class Seen(samples.ImageNoise):
        def __init__(self, seed, chosen, shape):
            ids.append(set(chosen))
            super().__init__(seed, chosen, shape)

    for room in (samples, calibration):
        monkeypatch.setattr(room, "ImageNoise", Seen)
    finetuned(replace(QUICK, steps=1), tmp_path)
    assert set.union(*ids) == set(range(calibration.FIRST_ID, calibration.FIRST_ID + 4 + 8))
    assert sum(map(len, ids)) == 12


def test_no_steps_change_nothing_and_write_nothing(tmp_path):
    pipeline = small_pipeline()
    changed, witness = apply_once(Finetune(steps=0), pipeline, tmp_path)
    assert fingerprint(changed) == fingerprint(pipeline) and not any(tmp_path.iterdir())
    assert witness == {"method": "finetune", "steps": 0, "images": 0}


# --- the loss ----------------------------------------------------------------------------------------------------


def test_alpha_mixes_the_data_and_the_teacher():
    process = NoiseProcess()
    torch.manual_seed(0)
    batch = Batch(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), torch.randn(4, 1, 8, 8),
                  torch.tensor([0, 100, 500, 999]))
    model, teacher = small_pipeline().model, pruned_pipeline().model
    own = denoising_loss(process)(model, batch)
    noisy = process.add_noise(batch.clean, batch.noise, batch.t)
    distance = (model(noisy, batch.t, batch.labels) - teacher(noisy, batch.t, batch.labels)).square().mean((1, 2, 3))
    for alpha in (0.0, 0.3, 1.0):
        mixed = teacher_loss(process, teacher, alpha)(model, batch)
        assert torch.allclose(mixed, alpha * distance + (1 - alpha) * own, rtol=1e-5)
    teacher.zero_grad()
    teacher_loss(process, teacher, 0.5)(model, batch).mean().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert model.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_repeated_draws_ask_the_teacher_no_more_and_give_what_asking_gives(tmp_path, monkeypatch):
    method = replace(QUICK, steps=6, repeat=2, alpha=0.9)
    changed, _ = finetuned(method, tmp_path / "kept")
    assert len(list((tmp_path / "kept" / "training" / "answers").iterdir())) == 2
    monkeypatch.setattr(distillation, "remembered", lambda teacher, folder: teacher)
    asked, _ = finetuned(method, tmp_path / "asked")
    anew, _ = finetuned(replace(method, repeat=0), tmp_path / "anew")
    assert fingerprint(changed) == fingerprint(asked) != fingerprint(anew)
    assert not (tmp_path / "anew" / "training" / "answers").exists()


# --- stopping ----------------------------------------------------------------------------------------------------


def test_patience_keeps_the_nearest_weights_even_those_before_training(tmp_path):
    """A learning rate that ruins the model: the first check is the best, and its weights come back."""
    method = replace(QUICK, steps=50, learning_rate=0.1, alpha=0.0, patience=2)
    changed, witness = finetuned(method, tmp_path)
    assert (witness["steps"], witness["kept_step"]) == (4, 0)
    assert witness["held_out_error_kept"] == witness["held_out_error_first"] < witness["held_out_error_last"]
    assert fingerprint(changed) == fingerprint(pruned_pipeline())
    again, told = finetuned(method, tmp_path)  # applied again, it does not go on
    assert fingerprint(again) == fingerprint(changed) and told == witness


def test_without_patience_the_last_weights_are_kept(tmp_path):
    changed, witness = finetuned(replace(QUICK, learning_rate=0.1, alpha=0.0), tmp_path)
    assert witness["steps"] == 6 and "kept_step" not in witness
    assert fingerprint(changed) != fingerprint(pruned_pipeline())
    steps = [entry["step"] for entry in json.loads((tmp_path / "training" / "checks.json").read_text())]
    assert steps == [0, 2, 4, 6]


def test_a_step_that_is_asked_about_again_is_answered_alike(tmp_path, monkeypatch):
    errors = {0: 3.0, 2: 1.0, 4: 2.0, 6: 2.5}
    model = small_pipeline().model
    held_out = HeldOut(tmp_path, [], [], patience=2)
    monkeypatch.setattr("slimdit.training.calibration.output_error", lambda *_: errors[held_out.asked])

    def ask(step):
        held_out.asked = step
        return held_out(model, step)

    assert [ask(step) for step in (0, 2, 4)] == [False, False, False]
    assert ask(2) is False and [entry["step"] for entry in held_out.entries()] == [0, 2]
    assert [ask(step) for step in (4, 6)] == [False, True] and held_out.is_enough()


def test_the_loop_asks_about_the_averaged_weights_and_goes_on_with_its_own(tmp_path):
    from .test_loop import tiny_model

    config = TrainConfig(steps=6, batch=4, learning_rate=1e-2, ema=0.9, precision="fp32", checkpoint_every=2)
    asked = {}

    def check(model, step):
        asked[step] = model.final_layer.linear.weight.detach().clone()
        assert not model.training
        return step == 4

    plain = train(tiny_model(), NoiseProcess(), tiny_data(), config, tmp_path / "plain", device="cpu")
    stopped = train(tiny_model(), NoiseProcess(), tiny_data(), config, tmp_path / "stopped", device="cpu", check=check)
    assert list(asked) == [2, 4]
    tensors, metadata = read_tensors(tmp_path / "stopped" / "checkpoint.safetensors")
    assert metadata["step"] == "4"
    assert torch.equal(asked[4], tensors["ema.final_layer.linear.weight"])
    assert not torch.equal(asked[4], tensors["model.final_layer.linear.weight"])
    assert torch.equal(stopped.final_layer.linear.weight, asked[4])
    resumed = train(tiny_model(), NoiseProcess(), tiny_data(), config, tmp_path / "stopped", device="cpu", resume=True)
    assert torch.equal(resumed.final_layer.linear.weight, plain.final_layer.linear.weight)


# --- killed and resumed ------------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818
    pass


def kill_at(monkeypatch, step):
    """Let training die when it has done so many steps, between the check's log and the checkpoint."""
    check = HeldOut.__call__

    def dying(self, model, done):
        answer = check(self, model, done)
        if done == step:
            raise Killed
        return answer

    monkeypatch.setattr(HeldOut, "__call__", dying)


@pytest.mark.parametrize("method", [QUICK, replace(QUICK, steps=12, learning_rate=0.1, alpha=0.0, patience=2),
                                    replace(QUICK, patience=2)])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_recipe_killed_in_the_middle_of_training_resumes_to_the_bit(method, step, tmp_path, monkeypatch):
    from slimdit.formats import load

    recipe = Recipe("recovered", (PruneWeights(sparsity=0.6), method, ReduceSteps(3)))
    whole_context = Context(small_pipeline(), tmp_path / "whole")
    whole = run(recipe, small_pipeline(), whole_context)
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            run(recipe, small_pipeline(), Context(small_pipeline(), folder))
    context = Context(small_pipeline(), folder)
    resumed = run(recipe, small_pipeline(), context, resume=True)
    assert fingerprint(resumed) == fingerprint(whole) == fingerprint(load(folder))
    told, expected = ({**context.witnesses[1], "seconds": 0} for context in (context, whole_context))
    assert told == expected
    assert sorted(path.name for path in (folder / "02-finetune").iterdir() if not path.is_file()) == ["training"]


def test_killed_in_the_first_method_the_same_command_goes_on_and_another_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            run(Recipe("one", (QUICK,)), pruned_pipeline(), Context(small_pipeline(), tmp_path))
    with pytest.raises(ValueError, match="holds training with another options: use what it began with"):
        run(Recipe("one", (replace(QUICK, learning_rate=1e-2),)), pruned_pipeline(),
            Context(small_pipeline(), tmp_path))
    with pytest.raises(ValueError, match="another model and teacher: use"):
        run(Recipe("one", (QUICK,)), small_pipeline(), Context(small_pipeline(), tmp_path))
    assert run(Recipe("one", (QUICK,)), pruned_pipeline(), Context(small_pipeline(), tmp_path)).history


def test_what_failed_before_it_learned_anything_may_be_changed(tmp_path):
    with pytest.raises(FileNotFoundError):
        finetuned(replace(QUICK, data=str(tmp_path / "none.npz")), tmp_path)
    finetuned(QUICK, tmp_path)


# --- rules -------------------------------------------------------------------------------------------------------


def test_a_packed_model_is_refused_with_the_order_that_works(tmp_path):
    packed, _ = apply_once(Quantize(), small_pipeline(), tmp_path)
    with pytest.raises(Refused, match="10 layers are packed already: put finetune before quantize"):
        apply_once(QUICK, packed, tmp_path)


def test_a_rehearsal_takes_a_step_or_two_of_the_twins_own_samples():
    method = Finetune(steps=100_000, batch=512, samples=50_000, data="/no/such/folder", compile=True, patience=1)
    twin, (witness,) = rehearse(Recipe("long", (method,)), SMALL)
    assert witness["steps"] <= 2 and witness["images"] <= 8 and witness["data"] == "4 samples of the teacher"
    assert twin.history == ({"finetune": {"batch": 512, "learning_rate": 1e-4, "schedule": "cosine", "ema": 0.999,
                                          "weighting": "none", "alpha": 0.0, "data": "/no/such/folder",
                                          "samples": 50_000, "patience": 1, "check_every": 250, "compile": True,
                                          "repeat": 0, "steps": 100_000}},)


@pytest.mark.parametrize("options, sentence", [
    ({"steps": 1, "images": 1}, "steps or images, not both"), ({"steps": -1}, "steps must be at least 0, not -1"),
    ({"batch": 0}, "batch"), ({"samples": 0}, "samples"), ({"check_every": 0}, "check_every"),
    ({"patience": -1}, "patience"), ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ({"learning_rate": float("nan")}, "learning_rate"), ({"schedule": "steps"}, "schedule 'steps' is unknown"),
    ({"weighting": "snr"}, "weighting 'snr' is unknown"), ({"ema": 1.0}, "ema must be"),
    ({"alpha": 1.1}, "alpha must be in 0..1")])
def test_bad_options_are_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Finetune(**options)
