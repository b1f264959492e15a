"""Sample sets: the same images whatever interrupted them, and nothing damaged is read back."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimdit.formats import load
from slimdit.metrics.evaluate import distributions
from slimdit.metrics.features import BATCH, FeatureSet, bundled_reference, extractor
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
    first, = (tmp_path / "broken").glob("00000000-00000004.*.npz")
    kept = first.stat().st_mtime_ns
    broken.make(pipeline)
    assert first.stat().st_mtime_ns == kept
    assert fingerprint(broken.read()[0]) == fingerprint(whole.read()[0])


def test_a_damaged_shard_is_refused_and_then_made_anew(pipeline: Pipeline, tmp_path: Path) -> None:
    images = SampleSet(tmp_path, 8, 0, 4, {})
    images.make(pipeline)
    before = images.read()[0]
    shard, = tmp_path.glob("00000004-00000008.*.npz")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="image 4 is missing or damaged"):
        images.read()
    images.make(pipeline)
    assert np.array_equal(images.read()[0], before)


@pytest.mark.parametrize("change", [{"seed": 1}, {"origin": {"model": "other"}}, {"label": 3}])
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
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_one_label_for_all(pipeline: Pipeline, tmp_path: Path) -> None:
    images = SampleSet(tmp_path, 4, 0, 4, {}, label=7)
    images.make(pipeline)
    assert images.read()[1].tolist() == [7] * 4


COUNT = 96
KILLS = 20
PROCESSES = multiprocessing.get_context("forkserver")  # a process that has PyTorch in milliseconds
PROCESSES.set_forkserver_preload(["slimdit.formats", "slimdit.sample_set"])


def work(model: Path, sampled: SampleSet, worker: int, workers: int, start: threading.Barrier) -> None:
    """What one process of a run does."""
    torch.set_num_threads(1)
    pipeline = load(model)
    start.wait()
    sampled.make(pipeline, worker=worker, workers=workers)


def killed(model: Path, sampled: SampleSet, workers: int, after: float) -> bool:
    """Start processes on a sample set and kill them a moment later; whether any was still at it."""
    start = PROCESSES.Barrier(workers + 1)
    processes = [PROCESSES.Process(target=work, args=(model, sampled, worker, workers, start))
                 for worker in range(workers)]
    for process in processes:
        process.start()
    start.wait(500)
    time.sleep(after)
    for process in processes:
        process.kill()
        process.join()
    return any(process.exitcode == -signal.SIGKILL for process in processes)


@pytest.fixture(scope="module")
def whole(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SampleSet]:
    """A set that nothing interrupted, made by one thread as are those that are killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sampled = SampleSet(tmp_path_factory.mktemp("whole"), COUNT, 3, 4, {"model": "tiny"})
    sampled.make(pipeline)
    yield sampled
    torch.set_num_threads(threads)


@pytest.mark.parametrize("batches", [(4,), (1, 2, 3, 5, 7)], ids=["one batch size", "others"])
def test_killed_twenty_times_and_resumed_by_others_it_is_the_same(tiny_model: Path, pipeline: Pipeline,
                                                                  whole: SampleSet, tmp_path: Path,
                                                                  batches: tuple[int, ...]) -> None:
    rng, kills, sets = random.Random(len(batches)), 0, 0
    while kills < KILLS // 2:
        sets += 1  # more than one only where the machine was so quick that a set was whole before enough kills
        sampled = replace(whole, folder=tmp_path / str(sets))
        while kills < KILLS // 2 and killed(tiny_model, replace(sampled, batch=rng.choice(batches)),
                                            rng.randrange(1, 4), rng.uniform(0, 0.06)):
            kills += 1
        replace(sampled, batch=batches[-1]).make(pipeline)
        if len(batches) == 1:
            assert fingerprint(sampled.read()[0]) == fingerprint(whole.read()[0])
        else:
            same_metrics(sampled, whole)


def same_metrics(one: SampleSet, two: SampleSet) -> None:
    """Two sets that differ by the rounding of other batch sizes at most have the same metrics to 1e-6."""
    network, reference = extractor("lite0"), bundled_reference()
    found = [distributions(network(images, range(COUNT)), labels, reference, "lite0", resamples=20)
             for images, labels in (one.read(), two.read())]
    assert set(found[0]) == set(found[1])
    for name, interval in found[0].items():
        assert found[1][name].value == pytest.approx(interval.value, rel=1e-6), name


def test_features_are_kept_with_the_images_they_are_of(pipeline: Pipeline, tmp_path: Path) -> None:
    count = BATCH + 6
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    network = extractor("lite0")
    kept = FeatureSet(tmp_path, count, network, "these")
    for worker in (1, 0):
        kept.make(lambda ids: images[ids.start:ids.stop], worker=worker, workers=2)
    assert np.array_equal(kept.read().pool, network(images, range(count)).pool)
    assert kept.read().spatial is None

    def never(ids: range) -> np.ndarray:
        raise AssertionError(f"{ids} is computed again")

    kept.make(never)
    others = replace(kept, images="others")
    with pytest.raises(ValueError, match="missing or damaged"):
        others.read()
    others.make(lambda ids: images[::-1][ids.start:ids.stop])
    assert np.array_equal(others.read().pool, network(images[::-1], range(count)).pool)
    assert len(list(tmp_path.iterdir())) == 2
