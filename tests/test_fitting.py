"""A solver's fitted numbers: nearer to the long run than those it began with, kept with the model, and never a loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from slimdit.context import Context
from slimdit.formats import load, save
from slimdit.methods import CacheBlocks, ReduceSteps
from slimdit.pipeline import Runtime
from slimdit.recipe import apply
from slimdit.sampling.solvers import coefficients
from slimdit.training.fitting import fit_coefficients
from slimdit.training.placement import goals

from .test_placement import pipeline


def fitted(steps=4, **options):
    teacher = pipeline()
    sampling = replace(teacher.sampling, solver="multistep", steps=steps)
    return teacher, sampling, *fit_coefficients(teacher, sampling, images=8, long=40, seed=0, **options)


def test_a_fit_ends_nearer_to_the_long_run_on_images_it_never_saw():
    teacher, sampling, found, facts = fitted()
    assert facts["error_found_fitted"] < 0.5 * facts["error_before_fitted"]
    assert facts["error_found"] < 0.5 * facts["error_before"]
    assert facts["numbers_fitted"] == 4 * 4 - 3 and facts["runs"] > 13
    assert found.coefficients is not None and replace(found, coefficients=None) == sampling
    _, others = goals(teacher, sampling, 8, 40, 0)
    assert others.error(found) == pytest.approx(facts["error_found"], rel=1e-3)


def test_it_begins_as_dpmpp_2m():
    teacher, sampling, _, facts = fitted(rounds=1)  # of one round only the numbers that it begins with are tried
    _, others = goals(teacher, sampling, 8, 40, 0)
    assert facts["error_before"] == pytest.approx(others.error(replace(sampling, solver="dpmpp_2m")), rel=1e-3)


def test_what_is_no_better_on_other_images_is_not_taken(monkeypatch):
    from slimdit.training import fitting

    monkeypatch.setattr(fitting, "least_squares", lambda residual, begun, *_, **__: type("", (), {"x": begun + 1})())
    _, sampling, found, facts = fitted()
    assert found == sampling and facts["error_found"] > facts["error_before"]


def test_numbers_that_meet_nothing_stay():
    """The first step has no clean image before its own, the second none before that."""
    teacher, sampling, found, _ = fitted()
    begun, ended = (np.array(coefficients(teacher.process, one)) for one in (sampling, found))
    assert (begun[0, 4:] == ended[0, 4:]).all() and begun[1, 5] == ended[1, 5]
    assert (begun[:, 2:4] != ended[:, 2:4]).all() and (begun[2:, 5] != ended[2:, 5]).all()


def test_a_recipe_fits_and_the_folder_keeps_it(tmp_path):
    teacher = pipeline()
    context = Context(teacher, tmp_path / "work")
    changed = apply(ReduceSteps(3, solver="multistep", search=2, long=20), teacher.copy(), context)
    assert changed.sampling.timesteps is not None and changed.sampling.coefficients is not None
    save(changed, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.sampling == changed.sampling and again.fingerprint() == changed.fingerprint()
    np.testing.assert_array_equal(again.sample([0, 1]), changed.sample([0, 1]))
    unfitted = changed.replace(sampling=replace(changed.sampling, coefficients=None))
    assert unfitted.fingerprint() != changed.fingerprint()


def test_no_other_solver_is_fitted_and_a_rehearsal_is_short(tmp_path):
    teacher = pipeline()
    context = Context(teacher, tmp_path, rehearsal=True)
    assert apply(ReduceSteps(3, solver="unipc", search=2), teacher.copy(), context).sampling.coefficients is None
    changed = apply(ReduceSteps(3, solver="multistep", search=9), teacher.copy(), context)
    assert changed.sampling.solver == "multistep" and changed.sampling.timesteps is not None


def test_a_search_begins_anew(tmp_path):
    """What was fitted to other steps is no start for a search of these."""
    teacher, sampling, found, _ = fitted()
    method = ReduceSteps(4, search=2, long=20, timesteps=None)
    again = apply(method, teacher.replace(sampling=found).copy(), Context(teacher, tmp_path))
    fresh = apply(method, teacher.replace(sampling=sampling).copy(), Context(teacher, tmp_path))
    assert again.sampling == fresh.sampling


def test_fitted_steps_run_compiled_and_cached(tmp_path):
    teacher, _, found, _ = fitted(20, rounds=2)
    plain = teacher.replace(sampling=found)
    compiled = plain.replace(runtime=Runtime(compile=True))
    difference = np.abs(compiled.sample(range(2), batch=2).astype(int) - plain.sample(range(2), batch=2))
    assert difference.max() <= 1
    cached = apply(CacheBlocks(every=2), plain.copy(), Context(plain, tmp_path))
    assert cached.sampling.coefficients == found.coefficients and torch.isfinite(
        torch.from_numpy(cached.sample([0]).astype(float))).all()
