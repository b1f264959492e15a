"""The bundled model: small, trained as its record says, and its samples are the clothes they were asked to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slimdit.formats import BUNDLED, load
from slimdit.metrics.features import bundled_reference, extractor
from slimdit.metrics.quality import class_accuracy
from slimdit.models.dit import preset_name
from slimdit.pipeline import Pipeline
from slimdit.sampling.seeds import image_labels
from slimdit.training.loop import read_curve
from slimdit.training.plan import read_plan

BASE = Path(__file__).parents[1] / "results" / "bases" / "bundled"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("bundled")


def test_it_is_small_and_of_the_planned_structure(pipeline: Pipeline) -> None:
    assert (BUNDLED / "model.safetensors").stat().st_size <= 8_000_000
    assert pipeline.model.config == read_plan(BASE / "training.toml").model.config((1, 32, 32), 10)
    assert pipeline.image_size == (32, 32) and pipeline.image_channels == 1


def test_its_record_and_curve_say_what_it_took() -> None:
    plan = read_plan(BASE / "training.toml").training
    record = json.loads((BASE / "record.json").read_text())
    curve = read_curve(BASE / "curve.jsonl")
    assert record["images seen"] == curve[-1]["images"] == plan.steps * plan.batch >= 3_000_000
    assert record["final loss"] == curve[-1]["loss"] < 0.5 * curve[0]["loss"]


def test_its_samples_are_the_clothes_they_were_asked_to_be(pipeline: Pipeline) -> None:
    few = pipeline.replace(sampling=replace(pipeline.sampling, solver="dpmpp_2m", steps=10))
    images, labels = few.sample(range(100), seed=1), image_labels(1, range(100), 10).numpy()
    reference = bundled_reference()
    seen = extractor("lite0")(images, range(100)).pool
    hits = class_accuracy(seen, labels, reference.pool, reference.labels)
    assert hits.mean() > 0.7  # real images: 0.85; the same samples with their labels shifted by one: under 0.2
    assert class_accuracy(seen, (labels + 1) % 10, reference.pool, reference.labels).mean() < 0.3


def test_no_patches_show(pipeline: Pipeline) -> None:
    """Steps between neighbouring pixels are no larger on the patch grid than inside patches."""
    images = pipeline.replace(sampling=replace(pipeline.sampling, steps=20)).sample(range(50), seed=2)
    steps = np.abs(np.diff(images[..., 0].astype(float), axis=2))  # between columns: (images, 32, 31)
    on_grid = np.arange(1, 32) % pipeline.model.config.patch == 0
    assert steps[:, :, on_grid].mean() < 1.2 * steps[:, :, ~on_grid].mean()  # real images: 1.05


class TestXS4:
    """The paper's XS/4, trained on the same data and kept with its record."""

    FOLDER = BASE.with_name("xs4")

    def test_it_is_what_its_plan_and_record_say(self) -> None:
        plan = read_plan(self.FOLDER / "training.toml")
        record, curve = json.loads((self.FOLDER / "record.json").read_text()), read_curve(self.FOLDER / "curve.jsonl")
        assert preset_name(load(self.FOLDER).model.config) == "XS/4" == plan.model.preset
        assert record["images seen"] == curve[-1]["images"] == plan.training.steps * plan.training.batch
        assert (self.FOLDER / "model.safetensors").stat().st_size <= 16_000_000

    def test_its_samples_are_the_clothes_they_were_asked_to_be(self) -> None:
        model = load(self.FOLDER)
        few = model.replace(sampling=replace(model.sampling, solver="dpmpp_2m", steps=10))
        images, labels = few.sample(range(50), seed=1), image_labels(1, range(50), 10).numpy()
        reference = bundled_reference()
        seen = extractor("lite0")(images, range(50)).pool
        assert class_accuracy(seen, labels, reference.pool, reference.labels).mean() > 0.6
