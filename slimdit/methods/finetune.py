"""Train a changed model a little further, so that it recovers what a method took: from images, its teacher, or both.

The teacher's output is a target for every noisy input (output distillation, arXiv 1503.02531); weights that were pruned
to zero stay zero. Alone on the unchanged model it is the control of every method that trains.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..context import Context, require
from ..files import read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.dit import DiT
    from ..pipeline import Pipeline
    from ..training.calibration import Call
    from ..training.data import ImageData
    from ..training.loop import Progress, TrainConfig

Schedule = Literal["constant", "cosine"]
Weighting = Literal["none", "min_snr"]
STEPS = 1000  # where no budget is given
HELD_OUT = 32  # images of the teacher's whose calls are never trained on
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Finetune:
    """Train on.

    Attributes:
        steps, images: how long, one of them: optimizer steps (0 changes nothing), or images seen. 1000 steps if neither
            is given.
        batch: images of a step.
        learning_rate, schedule: the peak of AdamW's rate, and whether it stays or falls to 0 as a cosine.
        ema: decay of the averaged weights, which are the ones kept.
        weighting: of the timesteps in DiT's own loss: take what the model was trained with.
        alpha: share of the teacher's output in the loss; 0 is DiT's own loss on the images.
        data: the images, as `slimdit train --data` names them. Left out, the run's own (`slimdit run --data`); where it
            has none, images that the teacher makes.
        samples: how many images the teacher makes then.
        patience: ends training after so many checks that found the model no nearer to the teacher than an earlier one
            did, and keeps the nearest weights, be it those before training. 0 trains to the end and keeps the last.
        check_every: steps between these checks, each on calls of the teacher's that are not trained on.
        seed: of data order, noise and timesteps; left out, the run's.
        compile: whether to compile the training step.

    Raises:
        ValueError: a number is out of its range, or both steps and images are given.
    """

    steps: int | None = None
    images: int | None = None
    batch: int = 64
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    ema: float = 0.999
    weighting: Weighting = "none"
    alpha: float = 0.0
    data: str | None = None
    samples: int = 512
    patience: int = 0
    check_every: int = 250
    seed: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.images is not None:
            raise ValueError("finetune: give steps or images, not both")
        for name, least in (("steps", 0), ("images", 0), ("batch", 1), ("samples", 1), ("patience", 0),
                            ("check_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"finetune: {name} must be at least {least}, not {value}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"finetune: learning_rate must be above 0, not {self.learning_rate}")
        for name, kind in (("schedule", Schedule), ("weighting", Weighting)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"finetune: {name} {getattr(self, name)!r} is unknown; use one of "
                                 f"{', '.join(get_args(kind))}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"finetune: ema must be in 0..1 (1 excluded), not {self.ema}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"finetune: alpha must be in 0..1, not {self.alpha}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Train within the budget; killed and applied again with the same folder, it goes on where it was."""
        packed = len(pipeline.model.config.linears)
        require(not packed, f"finetune needs float weights, and {packed} layers are packed already: put finetune "
                            "before quantize")
        if self.budget == 0:
            context.witness(steps=0, images=0)
            return pipeline
        chosen = self.rehearsed() if context.rehearsal else self
        return pipeline.replace(model=chosen.trained(pipeline, context))

    @property
    def budget(self) -> int:
        """Optimizer steps."""
        if self.images is not None:
            return -(-self.images // self.batch)
        return STEPS if self.steps is None else self.steps

    def rehearsed(self) -> Finetune:
        """The same in a step or two, on images that the tiny twin makes."""
        return replace(self, steps=min(2, self.budget), images=None, batch=min(4, self.batch), samples=4, data=None,
                       compile=False)

    def trained(self, pipeline: Pipeline, context: Context) -> DiT:
        """The pipeline's model after training, in place."""
        from ..models.surgery import pruned_weights, zero_weights
        from ..training.loop import in_precision, read_curve, teacher_loss, train, uses_bf16

        model, teacher, folder = pipeline.model, context.teacher, context.folder / "training"
        self.begin(pipeline, context, folder)
        pruned = pruned_weights(model)
        config = self.config(context)
        data, source = self.images_of(pipeline, context, folder)
        held_out = HeldOut(folder, *teacher_calls(context, self.seed_of(context)), self.patience)
        held_out.start(model)
        if not held_out.is_enough():
            expert = in_precision(teacher.model, uses_bf16(config.precision, context.device))
            model = train(model, pipeline.process, data, config, folder, resume=True, device=context.device,
                          loss=teacher_loss(pipeline.process, expert, self.alpha, self.weighting),
                          project=(lambda trained: zero_weights(trained, pruned)) if pruned else None,
                          check=held_out, report=lambda progress: context.report(line(progress)))
        if self.patience:
            held_out.restore(model)
        checks = held_out.entries()
        context.witness(
            steps=checks[-1]["step"], images=checks[-1]["step"] * self.batch, data=source,
            held_out_error_first=checks[0]["error"], held_out_error_last=checks[-1]["error"],
            **({"kept_step": best(checks)["step"], "held_out_error_kept": best(checks)["error"]}
               if self.patience else {}),
            seconds=round(sum(row["seconds"] for row in read_curve(folder / "curve.jsonl")), 1),
            zeros_kept=sum(int((model.get_submodule(name).get_parameter("weight")[mask] == 0).sum())
                           for name, mask in pruned.items()))
        return model.eval()

    def begin(self, pipeline: Pipeline, context: Context, folder: Path) -> None:
        """Enter what training begins with in its folder, or see that it is what it began with.

        Raises:
            ValueError: it is not.
        """
        data = None if context.data is None or self.data else [*context.data.shape, len(context.data)]
        start = {"model": pipeline.fingerprint(), "teacher": context.teacher.fingerprint(), "seed": context.seed,
                 "options": asdict(self), "data": data}
        marker = folder / "start.json"
        before = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
        changed = [name for name in start if before.get(name) != start[name]]
        if changed and (folder / "checkpoint.safetensors").exists():
            raise ValueError(f"{folder} holds training with another {' and '.join(changed)}: use what it began with, "
                             "or another folder")
        if changed:  # nothing was learned there yet
            shutil.rmtree(folder, ignore_errors=True)
            write_json(marker, start)

    def seed_of(self, context: Context) -> int:
        """The seed of everything random here."""
        return context.seed if self.seed is None else self.seed

    def config(self, context: Context) -> TrainConfig:
        """The options as the training loop takes them."""
        from ..training.loop import TrainConfig

        return TrainConfig(steps=self.budget, batch=self.batch, learning_rate=self.learning_rate,
                           schedule=self.schedule, ema=self.ema, weighting=self.weighting, compile=self.compile,
                           seed=self.seed_of(context), checkpoint_every=self.check_every,
                           log_every=math.gcd(LOG_EVERY, self.check_every))

    def images_of(self, pipeline: Pipeline, context: Context, folder: Path) -> tuple[ImageData, str]:
        """The images to train on, and what they are called."""
        from ..models.autoencoder import PixelSpace
        from ..training.calibration import FIRST_ID
        from ..training.data import open_data
        from ..training.samples import Samples, own_samples

        if self.data is not None:
            height, width = pipeline.model.config.input_size
            fits = height == width and isinstance(pipeline.autoencoder, PixelSpace)
            return open_data(self.data, size=height if fits else None), self.data
        if context.data is not None:
            return context.data, "the run's data"
        kept = folder / "samples.safetensors"
        if not kept.exists():
            made = own_samples(context.teacher, self.samples, first=FIRST_ID + HELD_OUT, seed=self.seed_of(context),
                               progress=lambda done: context.report(f"{done}/{self.samples} samples of the teacher"))
            made.save(kept)
        return Samples.load(kept), f"{self.samples} samples of the teacher"


def teacher_calls(context: Context, seed: int) -> tuple[list[Call], list[Tensor]]:
    """Deployed calls of the teacher's that are not trained on, and its answers."""
    from ..training.calibration import deployed_calls, outputs

    calls = deployed_calls(context.teacher, images=2 if context.rehearsal else HELD_OUT, seed=seed)
    return calls, outputs(context.teacher.model, calls)


class HeldOut:
    """How far the model is from the teacher's answers, check after check, and its nearest weights so far.

    Kept in files that a resumed run goes on with. It may ask about a step again: what was found from there on is then
    forgotten, and found again.
    """

    def __init__(self, folder: Path, calls: Sequence[Call], expected: Sequence[Tensor], patience: int) -> None:
        self.log, self.nearest = folder / "checks.json", folder / "nearest.safetensors"
        self.calls, self.expected, self.patience = calls, expected, patience

    def start(self, model: DiT) -> None:
        """The check before the first step, unless it was made."""
        if not self.entries():
            self(model, 0)

    def __call__(self, model: DiT, step: int) -> bool:
        """Check the model and say whether training was long enough."""
        from ..training.calibration import output_error

        before = [entry for entry in self.entries() if entry["step"] < step]
        entries = [*before, {"step": step, "error": output_error(model, self.calls, self.expected)}]
        if self.patience and best(entries) is entries[-1]:
            write_tensors(self.nearest, dict(model.named_parameters()))
        write_json(self.log, entries)  # after the weights: what the log calls the best is in the file
        return self.is_enough()

    def entries(self) -> list[dict[str, Any]]:
        """Steps and relative errors, the first before training."""
        return json.loads(self.log.read_text(encoding="utf-8")) if self.log.exists() else []

    def is_enough(self) -> bool:
        """Whether the last checks, as many as the patience, were no better than one before them."""
        entries = self.entries()
        return bool(self.patience) and len(entries) - 1 - entries.index(best(entries)) >= self.patience

    def restore(self, model: DiT) -> None:
        """Give the model its nearest weights."""
        import torch

        tensors = read_tensors(self.nearest)[0]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])


def best(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first check with the smallest error."""
    return min(entries, key=lambda entry: entry["error"])


def line(progress: Progress) -> str:
    """Progress in a line."""
    return (f"step {progress.step}/{progress.steps}: loss {progress.loss:.4f}, "
            f"{progress.images_per_second:.0f} images/s")
