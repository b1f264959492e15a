"""The processes that share a run: this one alone, or those that `accelerate launch` starts on devices and machines."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Workers:
    """Which of how many processes this is.

    Attributes:
        wait: returns when all of them have called it; a `ConnectionError` where one of them has ended instead.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this is the one that decides, reads everything and speaks."""
        return self.index == 0


def workers() -> Workers:
    """This process among those it was started with."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers()
    from accelerate import PartialState

    # They only wait for each other, which takes no device, and may have to wait long for the slowest.
    state = PartialState(cpu=True, timeout=timedelta(days=7))

    def wait() -> None:
        try:
            state.wait_for_everyone()
        except RuntimeError as error:
            raise ConnectionError("another of the processes of this run has ended: what it said last is why") from error

    return Workers(state.process_index, state.num_processes, wait)
