"""Searched timesteps: never worse than the spacing on the images searched with, legal, and as many as asked for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimdit.context import Context, Refused
from slimdit.methods import ReduceSteps
from slimdit.models.dit import DiT, uniform
from slimdit.pipeline import Pipeline
from slimdit.recipe import apply
from slimdit.sampling.settings import SPACINGS, Sampling
from slimdit.sampling.solvers import evaluations, timesteps
from slimdit.training import placement
from slimdit.training.placement import Goal, moved, place_steps


def pipeline(**settings) -> Pipeline:
    torch.manual_seed(0)
    model = DiT(uniform(depth=1, width=16, heads=2, patch=4, input_size=(8, 8), channels=1, classes=3)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Pipeline(model, Sampling("ddim", 20, guidance=2.0, **settings))


def test_a_search_ends_nearer_to_the_long_run_on_images_it_never_saw():
    teacher = pipeline()
    sampling = replace(teacher.sampling, solver="dpmpp_2m", steps=4)
    found, facts = place_steps(teacher, sampling, images=8, long=40, seed=0)
    assert facts["error_found_searched"] < facts["error_before_searched"]
    assert facts["error_found"] < facts["error_before"]
    assert found.timesteps == tuple(facts["timesteps"]) and replace(found, timesteps=None) == sampling
    goal = Goal.of(teacher, replace(sampling, steps=40), range(8), 0)
    assert goal.error(replace(sampling, steps=40)) == 0 < goal.error(sampling)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_no_named_spacing_is_better_on_the_images_searched_with(spacing):
    teacher = pipeline()
    sampling = replace(teacher.sampling, steps=3, spacing="leading")
    _, facts = place_steps(teacher, sampling, images=2, long=20, seed=0, strides=(64,))
    _, other = place_steps(teacher, replace(sampling, spacing=spacing), images=2, long=20, seed=0, strides=())
    assert facts["error_found_searched"] <= other["error_before_searched"] * (1 + 1e-6)


@settings(deadline=None)
@given(st.sets(st.integers(0, 999), min_size=1, max_size=6), st.integers(1, 200), st.integers(0, 2 ** 16))
def test_what_is_moved_still_descends_and_is_no_worse(visited, stride, seed):
    begun = tuple(sorted(visited, reverse=True))

    def error(places):
        return hash((places, seed)) % 1000

    places = moved(begun, stride, error, lambda places: places[0] < 1000)
    assert len(places) == len(begun) and places[-1] >= 0 and places[0] < 1000
    assert all(a > b for a, b in pairwise(places)) and error(places) <= error(begun)


def test_what_is_no_better_on_other_images_is_not_taken(monkeypatch):
    """A search by one image finds what serves that image."""
    teacher, served = pipeline(), (990, 985, 980, 975)
    sampling = replace(teacher.sampling, solver="dpmpp_2m", steps=4)
    monkeypatch.setattr(placement, "moved", lambda *_: served)
    found, facts = place_steps(teacher, sampling, images=1, long=40, seed=0, strides=(64,))
    assert facts["error_found"] > facts["error_before"]
    assert facts["timesteps"] == list(found.timesteps or ()) == timesteps(teacher.process, sampling)


def test_no_evaluation_is_added_by_moving_into_the_guided_interval(tmp_path):
    teacher = pipeline(guidance_interval=(300, 700))
    method = ReduceSteps(4, search=2, long=20)
    changed = apply(method, teacher.copy(), Context(teacher, tmp_path))
    plain = replace(teacher.sampling, steps=4)
    assert evaluations(teacher.process, changed.sampling) <= evaluations(teacher.process, plain)
    assert changed.sampling.timesteps is not None and len(changed.sampling.timesteps) == 4


def test_as_many_steps_may_be_placed_better_but_not_more(tmp_path):
    teacher = pipeline()
    changed = apply(ReduceSteps(20, search=1, long=25), teacher.copy(), Context(teacher, tmp_path, rehearsal=True))
    assert len(timesteps(teacher.process, changed.sampling)) == 20
    with pytest.raises(Refused, match="reduce nothing"):
        apply(ReduceSteps(21, search=1), teacher.copy(), Context(teacher, tmp_path))


def test_what_cannot_be_searched_is_refused(tmp_path):
    teacher = pipeline()
    with pytest.raises(Refused, match="ddpm draws more"):
        apply(ReduceSteps(4, solver="ddpm", search=2), teacher.copy(), Context(teacher, tmp_path))
    with pytest.raises(ValueError, match="timesteps or a search"):
        ReduceSteps(2, timesteps=(900, 10), search=2)
    with pytest.raises(ValueError, match="more than the 20 steps to imitate"):
        ReduceSteps(20, search=2, long=20)
    with pytest.raises(ValueError, match="search must be 0 or a number of images, not -1"):
        ReduceSteps(5, search=-1)
    assert ReduceSteps(250).long == 100  # which says nothing where nothing is searched
