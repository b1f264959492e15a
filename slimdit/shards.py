"""Arrays of many images in one folder, a file per range of image ids, filled by any number of processes.

A shard is ADM's `.npz`, named after its range and a hash of its bytes, its range and its origin: what is truncated, was
changed or comes from elsewhere is never read back, and nothing but the shard itself has to be written to add one.
"""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from .files import write_json, writing

NAME = re.compile(r"(\d{8,})-(\d{8,})\.([0-9a-f]{16})\.npz")
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shards:
    """A folder of arrays, one row per image id.

    Attributes:
        origin: JSON-ready; what the arrays are of. Shards of another origin do not count.
    """

    folder: Path
    origin: Mapping[str, Any]

    def begin(self) -> None:
        """Say in the folder what its arrays are of.

        Raises:
            ValueError: the folder holds those of something else.
        """
        origin = json.loads(self._origin_text)
        if not self.manifest.exists():
            write_json(self.manifest, origin)
            return
        try:
            known = json.loads(self.manifest.read_text(encoding="utf-8")) == origin
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"{self.folder} holds the images of another model, seed or setting: name another folder")

    def fill(self, count: int, batch: int, compute: Callable[[range], Arrays], *, worker: int = 0, workers: int = 1,
             progress: Callable[[int], None] | None = None) -> None:
        """Compute and write what is missing of this worker's part of images 0 to count - 1.

        Worker w of n has parts w, w + n, ... of `batch` ids each, so that workers meet nowhere, and what is computed
        together does not depend on their number. Shards of other ranges, which another batch size left, are kept, and
        the gaps between them are filled; what is damaged or of another origin there is deleted.

        Args:
            compute: ids to their arrays, each with a row per id.
            progress: called with the id up to which this worker's part is done.

        """
        kept = defaultdict(list)
        for shard in self._shards():
            for part in range(shard.start // batch, -(-shard.stop // batch)):
                kept[part].append(shard)
        whole = cache(self._whole)
        for part in range(worker, -(-count // batch), workers):
            ids = range(part * batch, min(part * batch + batch, count))
            for gap in gaps(ids, [shard.ids for shard in kept[part] if whole(shard)]):
                self._write(gap, compute(gap))
            if progress:
                progress(ids.stop)

    def read(self, ids: range) -> dict[str, np.ndarray]:
        """The arrays of these ids, joined.

        Raises:
            ValueError: some are missing or damaged.
        """
        parts, done = [], ids.start
        for shard in self._shards():
            if shard.start <= done < min(shard.stop, ids.stop) and (content := self._content(shard)) is not None:
                rows = slice(done - shard.start, min(shard.stop, ids.stop) - shard.start)
                with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                    parts.append({name: arrays[name][rows] for name in arrays.files})
                done = shard.start + rows.stop
        if done < ids.stop or not parts:
            raise ValueError(f"{self.folder}: what it should hold of image {done} is missing or damaged: run again "
                             "with --resume to make it anew")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def digest(self) -> str:
        """A hash of which shards there are, and so of all they hold."""
        return sha256(" ".join(shard.path.name for shard in self._shards()).encode()).hexdigest()

    @property
    def manifest(self) -> Path:
        """The file that says what the folder's arrays are of."""
        return self.folder / "manifest.json"

    @property
    def _origin_text(self) -> str:
        return json.dumps(self.origin, sort_keys=True)

    def _shards(self) -> list[Shard]:
        found = [Shard(path, int(match[1]), int(match[2]), match[3]) for path in self.folder.glob("*.npz")
                 if (match := NAME.fullmatch(path.name))]
        return sorted(found, key=lambda shard: (shard.start, shard.stop, shard.hash))

    def _whole(self, shard: Shard) -> bool:
        """Whether a shard is what was written; one that is not is deleted."""
        if self._content(shard) is not None:
            return True
        shard.path.unlink(missing_ok=True)
        return False

    def _content(self, shard: Shard) -> bytes | None:
        """A shard's bytes, where they are still those that were written for its range and this origin."""
        try:
            content = shard.path.read_bytes()
        except FileNotFoundError:
            return None
        return content if self._hash(shard.ids, content) == shard.hash else None

    def _write(self, ids: range, arrays: Arrays) -> None:
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]  # its keywords are arrays, too
        content = file.getvalue()
        with writing(self.folder / f"{ids.start:08d}-{ids.stop:08d}.{self._hash(ids, content)}.npz") as beside:
            beside.write_bytes(content)

    def _hash(self, ids: range, content: bytes) -> str:
        hashed = sha256(f"{self._origin_text} {ids.start} {ids.stop} ".encode())
        hashed.update(content)
        return hashed.hexdigest()[:16]


@dataclass(frozen=True)
class Shard:
    """A shard as its name tells it."""

    path: Path
    start: int
    stop: int
    hash: str

    @property
    def ids(self) -> range:
        """The image ids it is of."""
        return range(self.start, self.stop)


def gaps(ids: range, covered: list[range]) -> Iterator[range]:
    """What of `ids` none of the others has, lowest first."""
    done = ids.start
    for other in [*sorted(covered, key=lambda other: other.start), range(ids.stop, ids.stop)]:
        if done < other.start:
            yield range(done, other.start)
        done = max(done, other.stop)
