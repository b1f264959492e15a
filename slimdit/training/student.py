"""Train a student beside its teacher, as methods do: a budget, images, held-out checks, a folder to go on from.

The methods that train share their options and their way here; each brings its own loss. PyTorch is imported inside
functions only: methods are listed without it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from ..files import read_kept, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.dit import DiT
    from ..pipeline import Pipeline
    from ..sampling.process import Denoise
    from .calibration import Call
    from .data import ImageData
    from .loop import Loss, Progress, TrainConfig

Schedule = Literal["constant", "cosine"]
Weighting = Literal["none", "min_snr"]
STEPS = 1000  # where no budget is given
HELD_OUT = 32  # images of the teacher's whose calls are never trained on
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class TrainingOptions:
    """What every method that trains may be told.

    Attributes:
        steps, images: how long, one of them: optimizer steps, or images seen. 1000 steps if neither is given.
        batch: images of a step.
        learning_rate, schedule: the peak of AdamW's rate, and whether it stays or falls to 0 as a cosine.
        weighting: of the timesteps, in the loss on images and in the distance from the teacher alike: take what the
            model was trained with.
        ema: decay of the averaged weights, which are the ones kept.
        data: the images, as `slimdit train --data` names them. Left out, the run's own (`slimdit run --data`); where it
            has none, images that the teacher makes.
        samples: how many images the teacher makes then.
        patience: ends training after so many checks that found the model no nearer to the teacher than an earlier one
            did, and keeps the nearest weights, be it those before training. 0 trains to the end and keeps the last.
        check_every: steps between these checks, each on calls of the teacher's that are not trained on.
        seed: of data order, noise and timesteps; left out, the run's.
        compile: whether to compile the training step.
        repeat: steps after which images, noise and timesteps come again, with the teacher's answers kept in files from
            the first time: for a teacher that costs more than reading. 0 draws anew at every step, and keeps nothing.
    """

    steps: int | None = None
    images: int | None = None
    batch: int = 64
    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    weighting: Weighting = "none"
    ema: float = 0.999
    data: str | None = None
    samples: int = 512
    patience: int = 0
    check_every: int = 250
    seed: int | None = None
    compile: bool = False
    repeat: int = 0

    def check(self, method: str) -> None:
        """Refuse what is out of its range.

        Raises:
            ValueError: the sentence begins with the method's name.
        """
        if self.steps is not None and self.images is not None:
            raise ValueError(f"{method}: give steps or images, not both")
        for name, least in (("steps", 0), ("images", 0), ("batch", 1), ("samples", 1), ("patience", 0),
                            ("check_every", 1), ("repeat", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{method}: {name} must be at least {least}, not {value}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"{method}: learning_rate must be above 0, not {self.learning_rate}")
        self.check_choice(method, "schedule", Schedule)
        self.check_choice(method, "weighting", Weighting)
        if not 0 <= self.ema < 1:
            raise ValueError(f"{method}: ema must be in 0..1 (1 excluded), not {self.ema}")

    def check_choice(self, method: str, name: str, kind: Any) -> None:
        """Refuse an option that is none of a Literal's."""
        if getattr(self, name) not in get_args(kind):
            raise ValueError(f"{method}: {name} {getattr(self, name)!r} is unknown; use one of "
                             f"{', '.join(get_args(kind))}")

    @property
    def budget(self) -> int:
        """Optimizer steps."""
        if self.images is not None:
            return -(-self.images // self.batch)
        return STEPS if self.steps is None else self.steps

    def rehearsed(self) -> Self:
        """The same in a step or two, on images that the tiny twin makes."""
        return replace(self, steps=min(2, self.budget), images=None, batch=min(4, self.batch), samples=4, data=None,
                       compile=False)


def untrainable(method: str, pipeline: Pipeline, teacher: Pipeline) -> str:
    """Why a pipeline's model cannot be trained beside a teacher, in a sentence with its remedy; empty where it can."""
    student, other = pipeline.model.config, teacher.model.config
    if packed := len(student.linears):
        return (f"{method} needs float weights, and {packed} layers are packed already: put {method} before "
                "quantize")
    if any("distill_guidance" in entry for entry in pipeline.history):
        return (f"{method} would unlearn the guidance that distill_guidance taught the model: put {method} before "
                "distill_guidance")
    for what in ("classes", "input_size", "channels", "learn_sigma", "label_rows"):
        here, there = getattr(student, what), getattr(other, what)
        if here != there:
            return (f"{method} needs a teacher that answers the same questions, and its {what} is {there} where the "
                    f"model's is {here}: use the model that this one was made from")
    return ""


@dataclass(frozen=True)
class StudentTraining:
    """One training within a recipe. Killed and begun again with the same folder, it goes on where it was.

    Attributes:
        options: the method, for its options.
        folder: where the checkpoint, the curve, the checks and the teacher's samples are kept.
        data: the run's images, where it has any.
        seed: the run's; the method's own goes first.
        rehearsal, report: as `Context` has them.
    """

    options: TrainingOptions
    teacher: Pipeline
    folder: Path
    data: ImageData | None
    device: str
    seed: int
    rehearsal: bool
    report: Callable[[str], None]

    def begin(self, pipeline: Pipeline) -> None:
        """Enter what training begins with in its folder, or see that it is what it began with.

        Raises:
            ValueError: it is not.
        """
        folder = self.folder
        data = None if self.data is None or self.options.data else [*self.data.shape, len(self.data)]
        start = {"model": pipeline.fingerprint(), "teacher": self.teacher.fingerprint(), "seed": self.seed,
                 "options": asdict(self.options), "data": data}
        marker = folder / "start.json"
        before = read_kept(marker, dict) if marker.exists() else {}
        changed = [name for name in start if before.get(name) != start[name]]
        if changed and (folder / "checkpoint.safetensors").exists():
            raise ValueError(f"{folder} holds training with another {' and '.join(changed)}: use what it began with, "
                             "or another folder")
        if changed:  # nothing was learned there yet
            shutil.rmtree(folder, ignore_errors=True)
            write_json(marker, start)

    @property
    def own_seed(self) -> int:
        """The seed of everything random here."""
        return self.seed if self.options.seed is None else self.options.seed

    @property
    def expert(self) -> Denoise:
        """The teacher as a loss asks it: its weights as they are stored, computed in the student's precision."""
        from .loop import in_precision, uses_bf16

        model = self.teacher.model
        dtype = next(model.parameters()).dtype
        return in_precision(lambda x, t, y: model(x.to(dtype), t, y), uses_bf16("auto", self.device))

    def kept(self, answers: Denoise) -> Denoise:
        """A teacher's answers, each from a file once it was given, where draws come again."""
        from .distillation import remembered

        return remembered(answers, self.folder / "answers") if self.options.repeat else answers

    @property
    def plain(self) -> Denoise:
        """The teacher in float32, to be compared with."""
        from ..pipeline import Runtime

        return self.teacher.replace(runtime=Runtime()).denoise

    def train(self, student: Pipeline, loss: Loss, *,
              held_out: tuple[list[Call], list[Tensor]] | None = None) -> tuple[DiT, dict[str, Any]]:
        """Train the student's model in place; weights that were pruned to zero stay zero.

        Args:
            held_out: calls that are not trained on, and what the student should answer; None takes the teacher's.

        Returns:
            The model, and what a witness says of its training.
        """
        from ..models.surgery import pruned_weights, zero_weights
        from .calibration import outputs
        from .loop import read_curve, train
        from .routing import report

        model, patience = student.model, self.options.patience
        pruned = pruned_weights(model)
        data, source = self.images_of(student)
        if held_out is None:
            calls = self.calls()
            held_out = calls, outputs(self.plain, calls)
        check = HeldOut(self.folder, *held_out, patience)
        check.start(model)
        if not check.is_enough():
            model = train(model, student.process, data, self.config(), self.folder, resume=True, device=self.device,
                          loss=loss, project=(lambda trained: zero_weights(trained, pruned)) if pruned else None,
                          check=check, report=lambda progress: self.report(line(progress)))
        if patience:
            check.restore(model)
        checks, routing = check.entries(), report(model.eval(), held_out[0])
        return model, {
            "steps": checks[-1]["step"], "images": checks[-1]["step"] * self.options.batch, "data": source,
            "held_out_error_first": checks[0]["error"], "held_out_error_last": checks[-1]["error"],
            **({"kept_step": best(checks)["step"], "held_out_error_kept": best(checks)["error"]} if patience else {}),
            "seconds": round(sum(row["seconds"] for row in read_curve(self.folder / "curve.jsonl")), 1),
            "zeros_kept": sum(int((model.get_submodule(name).get_parameter("weight")[mask] == 0).sum())
                              for name, mask in pruned.items()),
            **({"routing": routing} if routing else {})}

    def config(self) -> TrainConfig:
        """The options as the training loop takes them."""
        from .loop import TrainConfig

        options = self.options
        return TrainConfig(steps=options.budget, batch=options.batch, learning_rate=options.learning_rate,
                           schedule=options.schedule, ema=options.ema, compile=options.compile, seed=self.own_seed,
                           checkpoint_every=options.check_every, log_every=math.gcd(LOG_EVERY, options.check_every),
                           repeat=options.repeat)

    def images_of(self, pipeline: Pipeline) -> tuple[ImageData, str]:
        """The images to train on, and what they are called."""
        from ..models.autoencoder import PixelSpace
        from .calibration import FIRST_ID
        from .data import open_data
        from .samples import Samples, own_samples

        named, samples = self.options.data, self.options.samples
        if named is not None:
            height, width = pipeline.model.config.input_size
            fits = height == width and isinstance(pipeline.autoencoder, PixelSpace)
            return open_data(named, size=height if fits else None), named
        if self.data is not None:
            return self.data, "the run's data"
        kept = self.folder / "samples.safetensors"
        if not kept.exists():
            made = own_samples(self.teacher, samples, first=FIRST_ID + HELD_OUT, seed=self.own_seed,
                               progress=lambda done: self.report(f"{done}/{samples} samples of the teacher"))
            made.save(kept)
        return Samples.load(kept), f"{samples} samples of the teacher"

    def calls(self) -> list[Call]:
        """Deployed calls of the teacher's that are not trained on."""
        from .calibration import deployed_calls

        return deployed_calls(self.teacher, images=2 if self.rehearsal else HELD_OUT, seed=self.own_seed)


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
        from .calibration import output_error

        before = [entry for entry in self.entries() if entry["step"] < step]
        entries = [*before, {"step": step, "error": output_error(model, self.calls, self.expected)}]
        if self.patience and best(entries) is entries[-1]:
            write_tensors(self.nearest, dict(model.named_parameters()))
        write_json(self.log, entries)  # after the weights: what the log calls the best is in the file
        return self.is_enough()

    def entries(self) -> list[dict[str, Any]]:
        """Steps and relative errors, the first before training."""
        return read_kept(self.log, list, ["step", "error"]) if self.log.exists() else []

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
