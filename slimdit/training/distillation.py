"""What a student is compared with: its teacher's outputs, tokens inside it, and its guided answers.

Output distillation is arXiv 1503.02531, the masked loss on features TinyFusion's (arXiv 2412.01199), a guided teacher
as one call arXiv 2210.03142 (its first stage, at one scale of guidance).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import read_tensors, write_tensors
from ..models.dit import DiT, DiTConfig
from ..sampling.process import Denoise
from ..sampling.settings import Sampling
from .calibration import Call
from .loop import Batch, Distance, Loss, squared_distance


def weighed_distance(channels: int, variance: float) -> Distance:
    """The squared distance of the predicted noise, plus `variance` times that of the variance where it is learned.

    The two are apart because only ancestral sampling looks at the variance: it should not lead.

    Args:
        channels: of the predicted noise; the channels after it are the variance.
    """
    def distance(answer: Tensor, expected: Tensor) -> Tensor:
        apart = squared_distance(answer[:, :channels], expected[:, :channels])
        if answer.shape[1] > channels:
            apart = apart + variance * squared_distance(answer[:, channels:], expected[:, channels:])
        return apart

    return distance


def remembered(teacher: Denoise, folder: Path) -> Denoise:
    """The teacher, asked the same thing once: its answers are in files of the folder, by a hash of the question."""
    folder.mkdir(parents=True, exist_ok=True)

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        question = sha256()
        for tensor in (x, t, y):
            question.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        path = folder / f"{question.hexdigest()}.safetensors"
        if not path.exists():
            write_tensors(path, {"answer": teacher(x, t, y)})
        return read_tensors(path)[0]["answer"].to(x.device)

    return denoise


def matched_blocks(student: int, teacher: int) -> list[int]:
    """For each of the student's blocks the teacher's at the same share of the way; the last two are a pair."""
    return [(2 * (place + 1) * teacher + student) // (2 * student) - 1 for place in range(student)]


def unmatched(student: DiTConfig, teacher: DiTConfig) -> str:
    """Why the tokens of two models cannot be compared, in half a sentence; empty where they can."""
    if student.width != teacher.width:
        return f"tokens of {student.width} features cannot be compared with the teacher's of {teacher.width}"
    if len(student.blocks) > len(teacher.blocks):
        return f"{len(student.blocks)} blocks have no {len(teacher.blocks)} of the teacher's to be matched with"
    if student.patch % teacher.patch:
        return f"patches of {student.patch} are no whole patches of the teacher's {teacher.patch}"
    return ""


class Features:
    """The tokens after evenly matched blocks of two models, as their last calls left them."""

    def __init__(self, student: DiT, teacher: DiT) -> None:
        self.student, self.teacher = student, teacher
        self.pairs = list(enumerate(matched_blocks(len(student.blocks), len(teacher.blocks))))
        self.seen: dict[nn.Module, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While inside, both models' calls are listened to."""
        def listen(block: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> None:
            self.seen[block] = tokens

        with ExitStack() as hooks:
            for here, there in self.pairs:
                for block in (self.student.blocks[here], self.teacher.blocks[there]):
                    hooks.callback(block.register_forward_hook(listen).remove)
            yield

    def distance(self, sigmas: float) -> Tensor:
        """The mean `masked_distance` over the matched blocks: (batch,)."""
        times = self.student.config.patch // self.teacher.config.patch
        return torch.stack([
            masked_distance(self.seen[self.student.blocks[here]].float(),
                            pooled(self.seen[self.teacher.blocks[there]].float(), self.teacher.config.grid, times),
                            sigmas)
            for here, there in self.pairs]).mean(0)


def pooled(tokens: Tensor, grid: tuple[int, int], times: int) -> Tensor:
    """The mean of every square of `times` x `times` tokens: (batch, tokens, width) to (batch, tokens / times^2, width).
    """
    rows, columns = grid[0] // times, grid[1] // times
    return tokens.view(len(tokens), rows, times, columns, times, -1).mean((2, 4)).flatten(1, 2)


def masked_distance(student: Tensor, teacher: Tensor, sigmas: float) -> Tensor:
    """The squared distance of tokens where both are ordinary, in units of the variance of the teacher's: (batch,).

    Ordinary is what lies within `sigmas` standard deviations of the mean, over the whole batch. A few features of a
    trained transformer are huge; matching those alone would take all of the loss, and diverges (TinyFusion, 3.4).

    Args:
        student, teacher: (batch, tokens, width).
    """
    usual = ordinary(teacher, sigmas)
    kept = usual & ordinary(student.detach(), sigmas)
    squares = ((student - teacher).square() * kept).sum((1, 2))
    return squares / kept.sum((1, 2)).clamp(min=1) / teacher[usual].var().clamp(min=1e-12)


def ordinary(tokens: Tensor, sigmas: float) -> Tensor:
    """Where tokens lie within so many standard deviations of their mean."""
    return (tokens - tokens.mean()).abs() <= sigmas * tokens.std()


def with_features(loss: Loss, features: Features, weight: float, last: float, sigmas: float) -> Loss:
    """A loss plus the distance of features, whose weight falls from `weight` to 0 at step `last` in a line.

    Early the features show the student the way; late it may find one that suits its size.
    """
    def both(model: Denoise, batch: Batch) -> Tensor:
        own = loss(model, batch)
        share = weight * (1 - batch.step / last) if batch.step < last else 0.0
        return own + share * features.distance(sigmas) if share else own

    return both


def guided(denoise: Denoise, sampling: Sampling, config: DiTConfig) -> Denoise:
    """A model's answers with guidance, as sampling would use them at each image's own timestep, from one call.

    eps_null + guidance (eps_label - eps_null), for the channels and within the interval that sampling guides; all else,
    the variance too, is the answer with the label. Without a label it is the null class's own answer.
    """
    channels = min(config.channels, sampling.guidance_channels or config.channels)
    low, high = sampling.guidance_interval

    def answer(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        null = torch.full_like(y, config.classes)
        labelled, unlabelled = denoise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        scale = torch.where((low <= t) & (t <= high), float(sampling.guidance), 1.0).view(-1, 1, 1, 1)
        eps = torch.lerp(unlabelled[:, :channels], labelled[:, :channels], scale)
        return torch.cat([eps, labelled[:, channels:]], dim=1)

    return answer


def labelled(call: Call, null_class: int) -> Call:
    """The half of a call that has labels: what is left of it where guidance needs no second pass."""
    chosen = call.y != null_class
    return Call(call.x[chosen], call.t[chosen], call.y[chosen])
