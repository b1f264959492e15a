"""Shards: whatever stopped whom, the arrays are whole, and nothing damaged or foreign is read back."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from slimdit.shards import Shards, gaps


def rows(ids: range) -> dict[str, np.ndarray]:
    return {"id": np.array(ids), "square": np.array([[i * i] for i in ids])}


def check(shards: Shards, count: int) -> None:
    """The folder holds what `rows` gives for all ids."""
    held = shards.read(range(count))
    assert all(np.array_equal(held[name], array) for name, array in rows(range(count)).items())


def test_gaps_are_what_nothing_covers() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        start = rng.randrange(20)
        ids = range(start, start + rng.randrange(1, 20))
        lows = [rng.randrange(40) for _ in range(rng.randrange(5))]
        covered = [range(low, low + rng.randrange(1, 10)) for low in lows]
        covered = [other for other in covered if other.start < ids.stop and ids.start < other.stop]
        found = [i for gap in gaps(ids, covered) for i in gap]
        assert found == [i for i in ids if not any(i in other for other in covered)]


def test_filled_by_runs_that_stop_anywhere_with_any_batch_and_number_of_workers(tmp_path: Path) -> None:
    rng = random.Random(1)
    for trial in range(10):
        shards, made = Shards(tmp_path / str(trial), {"trial": trial}), []
        for last in (rng.randrange(3), rng.randrange(3), 100):
            batch, workers = rng.choice((1, 3, 4, 7)), rng.randrange(1, 4)
            for worker in rng.sample(range(workers), workers):
                with suppress(KeyboardInterrupt):
                    shards.fill(17, batch, stopping(last, made), worker=worker, workers=workers)
        check(shards, 17)
        assert sorted(made) == list(range(17))  # and none was computed twice


def stopping(after: int, made: list[int]) -> Callable[[range], dict[str, np.ndarray]]:
    """`rows`, interrupted after so many parts; what it gave is noted in `made`."""
    parts = iter(range(after))

    def compute(ids: range) -> dict[str, np.ndarray]:
        if next(parts, None) is None:
            raise KeyboardInterrupt
        made.extend(ids)
        return rows(ids)

    return compute


def test_the_parts_of_a_worker_do_not_depend_on_their_number(tmp_path: Path) -> None:
    alone, shared = Shards(tmp_path / "alone", {}), Shards(tmp_path / "shared", {})
    alone.fill(10, 4, rows)
    for worker in (2, 0, 1):
        shared.fill(10, 4, rows, worker=worker, workers=3)
    assert alone.digest() == shared.digest()
    assert [path.name[:17] for path in sorted((tmp_path / "shared").iterdir())] == [
        "00000000-00000004", "00000004-00000008", "00000008-00000010"]


def test_cuts_and_flipped_bits_are_noticed(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    shards.fill(2, 2, rows)
    path, = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="missing or damaged: run again with --resume"):
                shards.read(range(2))
    shards.fill(2, 2, rows)
    assert path.read_bytes() == whole


def test_what_is_of_elsewhere_does_not_count(tmp_path: Path) -> None:
    ours, theirs = Shards(tmp_path / "ours", {"model": 1}), Shards(tmp_path / "theirs", {"model": 2})
    theirs.fill(4, 4, rows)
    foreign, = (tmp_path / "theirs").iterdir()
    (tmp_path / "ours").mkdir()
    foreign.rename(tmp_path / "ours" / foreign.name)
    with pytest.raises(ValueError, match="image 0 is missing or damaged"):
        ours.read(range(4))
    ours.fill(4, 4, rows)
    assert not (tmp_path / "ours" / foreign.name).exists()
    mine, = (tmp_path / "ours").iterdir()
    mine.rename(mine.with_name(mine.name.replace("00000000-00000004", "00000004-00000008")))
    with pytest.raises(ValueError, match="image 4 is missing or damaged"):
        ours.read(range(4, 8))


def test_a_part_is_read_across_shards(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    shards.fill(8, 4, rows, worker=1, workers=2)
    shards.fill(12, 5, rows)
    assert shards.read(range(3, 11))["id"].tolist() == list(range(3, 11))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    Shards(tmp_path, {"seed": 1}).begin()
    Shards(tmp_path, {"seed": 1}).begin()
    with pytest.raises(ValueError, match="another model, seed or setting"):
        Shards(tmp_path, {"seed": 2}).begin()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="another model, seed or setting"):
        Shards(tmp_path, {"seed": 1}).begin()
