"""Sample sets: the same images whatever interrupted them, and nothing damaged is read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slimdit.formats import load
from slimdit.pipeline import Pipeline
from slimdit.sample_set import SampleSet, fingerprint


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Pipeline:
    return load(tiny_model)


def test_interrupted_and_resumed_is_the_same_to_the_bit(pipeline: Pipeline, tmp_path: Path) -> None:
    whole = SampleSet(tmp_path / "whole", 10, 3, 4, {"model": "tiny"})
    seen: list[int] = []
    whole.make(pipeline, seen.append)
    assert seen == [4, 8, 10]
    broken = SampleSet(tmp_path / "broken", 10, 3, 4, {"model": "tiny"})

    def stop(done: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.make(pipeline, stop)
    kept = (tmp_path / "broken" / "00000000-00000004.npz").stat().st_mtime_ns
    broken.make(pipeline)
    assert (tmp_path / "broken" / "00000000-00000004.npz").stat().st_mtime_ns == kept
    assert fingerprint(broken.read()[0]) == fingerprint(whole.read()[0])


def test_a_damaged_shard_is_refused_and_then_made_anew(pipeline: Pipeline, tmp_path: Path) -> None:
    images = SampleSet(tmp_path, 8, 0, 4, {})
    images.make(pipeline)
    before = images.read()[0]
    shard = tmp_path / "00000004-00000008.npz"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"00000004-00000008\.npz is missing or damaged"):
        images.read()
    images.make(pipeline)
    assert np.array_equal(images.read()[0], before)


@pytest.mark.parametrize("change", [{"seed": 1}, {"origin": {"model": "other"}}, {"label": 3}, {"batch": 2}])
def test_the_images_of_something_else_are_not_gone_on_with(pipeline: Pipeline, tmp_path: Path, change: dict) -> None:
    images = SampleSet(tmp_path, 4, 0, 4, {"model": "tiny"})
    images.make(pipeline)
    with pytest.raises(ValueError, match="another model, seed or setting"):
        replace(images, **change).make(pipeline)


def test_more_images_go_on_where_fewer_ended(pipeline: Pipeline, tmp_path: Path) -> None:
    few = SampleSet(tmp_path, 4, 0, 4, {})
    few.make(pipeline)
    more = replace(few, count=8)
    more.make(pipeline)
    assert np.array_equal(more.read()[0][:4], few.read()[0])
    assert len(json.loads((tmp_path / "manifest.json").read_text())["shards"]) == 2


def test_one_label_for_all(pipeline: Pipeline, tmp_path: Path) -> None:
    images = SampleSet(tmp_path, 4, 0, 4, {}, label=7)
    images.make(pipeline)
    assert images.read()[1].tolist() == [7] * 4
