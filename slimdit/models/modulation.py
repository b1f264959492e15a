"""adaLN outside the token path: what it says of a whole schedule, computed in one product a layer.

A third of a DiT's weights are adaLN's, and they see only the timestep and the label. A step that computes them again
reads them all for a handful of rows; here they are read once for all steps, with one row for every pair of a timestep
and a label that occurs. The null class of guidance is one such label, shared by all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .dit import DiT

LIMIT = 64 * 2**20  # bytes held; a longer schedule is computed as many steps at a time as fit


class Modulations:
    """The rows of a schedule, some steps ahead of the solver.

    Args:
        model: in the type and on the device it is sampled in.
        timesteps: those that the solver visits, in its order.
        labels: all that occur, of any shape, the null class among them where guidance asks for it; best on the CPU,
            where a look at them keeps no device waiting.
        limit: bytes of the rows held at a time; one step's are held whatever their size.
        compute: what computes them, as `DiT.modulations`; None is that of the model.
    """

    def __init__(self, model: DiT, timesteps: Sequence[int], labels: Tensor, limit: int = LIMIT,
                 compute: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.compute = compute or model.modulations
        self.timesteps = list(timesteps)
        self.labels = labels.cpu().unique()
        places = torch.zeros(int(self.labels.max()) + 1, dtype=torch.int64)
        places[self.labels] = torch.arange(len(self.labels))
        self.places = places.to(model.pos_embed.device)  # looked up on the device: nothing waits for it
        row = sum(model.modulation_sizes) * next(model.parameters()).element_size()
        self.ahead = max(1, limit // (row * len(self.labels)))
        self.asked: Tensor | None = None
        self.seek(0)

    def seek(self, step: int) -> None:
        """Be ready for a step of the schedule; past its end there is nothing to be ready for."""
        self.step = step
        if step == 0 or (step % self.ahead == 0 and step < len(self.timesteps)):
            self.first, self.rows = step, self._rows(self.timesteps[step:step + self.ahead])

    def __call__(self, y: Tensor) -> Tensor:
        """The rows of this step for labels (batch,): (batch, sum of the model's `modulation_sizes`)."""
        if y is not self.asked:  # a run asks for the same labels step after step
            self.asked, self.place = y, self.places[y]
        return self.rows[self.place + (self.step - self.first) * len(self.labels)]

    def _rows(self, timesteps: Sequence[int]) -> Tensor:
        t, y = torch.tensor(timesteps).repeat_interleave(len(self.labels)), self.labels.repeat(len(timesteps))
        return self.compute(t.to(self.places.device), y.to(self.places.device))
