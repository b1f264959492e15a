"""The training loop: the only code that steps an optimizer.

Everything random in a step is drawn from (seed, step, process), so a run that was killed and resumed is the
uninterrupted run to the bit. One process here; the same command under `accelerate launch` uses many.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..files import read_tensors, write_tensors
from ..models.dit import DiT, DiTConfig
from ..pipeline import Runtime
from ..sampling.process import Denoise, LossWeighting, NoiseProcess, loss_weight, training_loss
from ..sampling.seeds import seeded
from .balance import balancing
from .data import ImageData

Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to learn.

    Attributes:
        steps: optimizer steps in all.
        batch: images of one step, over all processes.
        learning_rate: peak rate of AdamW, reached after `warmup` steps.
        schedule: `"constant"`, or `"cosine"` down to `final_rate` times the peak.
        clip: largest gradient norm.
        ema: decay of the averaged weights, which are the ones kept; it warms up as (1 + step) / (10 + step).
        weighting: see `training_loss`.
        precision: `"bf16"` computes in bfloat16 with float32 weights; `"auto"` where the hardware has it.
        compile: whether to compile the model first.
        checkpoint_every, log_every: in steps.
        repeat: steps after which images, noise and timesteps come again, step by step; 0 draws anew at every step.

    Raises:
        ValueError: a number is out of its range.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 1e-4
    warmup: int = 0
    schedule: Schedule = "constant"
    final_rate: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.9999
    weighting: LossWeighting = "none"
    precision: Precision = "auto"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 50
    repeat: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"training: {name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "final_rate", "repeat"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"training: {name} must be 0 or more, not {getattr(self, name)}")
        for name, kind in (("schedule", Schedule), ("weighting", LossWeighting), ("precision", Precision)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise ValueError(f"training: {name} {value!r} is unknown; use {', '.join(known)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"training: ema must be in 0..1 (1 excluded), not {self.ema}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = self.final_rate * self.learning_rate
        return floor + (self.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Batch:
    """What one step of training sees: clean images, labels (some dropped to the null class), noise and timesteps."""

    clean: Tensor  # (batch, channels, height, width), in -1..1 or latents
    labels: Tensor  # (batch,)
    noise: Tensor  # like clean
    t: Tensor  # (batch,)
    step: int = 0  # of training: a loss may change with it

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(self.clean.to(device), self.labels.to(device), self.noise.to(device), self.t.to(device), self.step)


@dataclass(frozen=True)
class Progress:
    """Where a run is, as its progress bar and its curve say."""

    step: int
    steps: int
    images: int
    loss: float
    rate: float
    images_per_second: float
    seconds: float


Loss = Callable[[Denoise, Batch], Tensor]
"""(model, batch) to the loss per image, (batch,)."""


def denoising_loss(process: NoiseProcess, weighting: LossWeighting = "none") -> Loss:
    """DiT's own training loss."""

    def loss(model: Denoise, batch: Batch) -> Tensor:
        noisy = process.add_noise(batch.clean, batch.noise, batch.t)
        return training_loss(process, model(noisy, batch.t, batch.labels), batch.clean, batch.noise, batch.t, weighting)

    return loss


Distance = Callable[[Tensor, Tensor], Tensor]
"""(answer, expected), both (batch, channels, height, width), to how far they are apart, (batch,)."""


def squared_distance(answer: Tensor, expected: Tensor) -> Tensor:
    """The mean squared difference of each image's outputs, variance channels like the others: (batch,)."""
    return (answer - expected).square().flatten(1).mean(1)


def teacher_loss(process: NoiseProcess, teacher: Denoise, alpha: float, weighting: LossWeighting = "none",
                 distance: Distance = squared_distance) -> Loss:
    """(1 - alpha) DiT's own loss + alpha times the distance of all outputs from the teacher's.

    Both see the same noise, timestep and dropped labels (output distillation, arXiv 1503.02531, for a regression), and
    `weighting` weighs the timesteps of both.
    """
    own = denoising_loss(process, weighting)
    if alpha == 0:
        return own

    def loss(model: Denoise, batch: Batch) -> Tensor:
        noisy = process.add_noise(batch.clean, batch.noise, batch.t)
        with torch.no_grad():
            expected = teacher(noisy, batch.t, batch.labels)
        answer = model(noisy, batch.t, batch.labels)
        apart = distance(answer, expected) * loss_weight(process, batch.t, weighting)
        if alpha == 1:
            return apart
        return alpha * apart + (1 - alpha) * own(lambda x, t, y: answer, batch)

    return loss


Check = Callable[[DiT, int], bool]
"""(model with its averaged weights, steps done) to whether training has been long enough."""


def train(model: DiT, process: NoiseProcess, data: ImageData, config: TrainConfig, folder: Path, *,
          loss: Loss | None = None, resume: bool = False, device: str | None = None,
          report: Callable[[Progress], None] = lambda progress: None,
          project: Callable[[DiT], None] | None = None, check: Check | None = None) -> DiT:
    """Train `model` in place and return it with its averaged (EMA) weights.

    Writes `folder/checkpoint.safetensors` every `checkpoint_every` steps, atomically, and `folder/curve.jsonl`, a line
    per report. With `resume`, goes on from the checkpoint; the result is that of an uninterrupted run, bit for bit, on
    the same machine and number of processes. Ctrl-C ends the step, writes a checkpoint and is then raised.

    Args:
        project: called after every step to put the weights back where they may be, such as pruned ones at zero.
        check: called before every `checkpoint_every`th step's checkpoint and the last one's; True ends training. A
            resumed run may ask again about a step that it was asked about before, and must be answered alike.

    Raises:
        ValueError: the data does not fit the model, the checkpoint belongs to another configuration, or the loss or a
            weight is no longer finite; the last checkpoint is kept.
        FileExistsError: the folder holds a checkpoint and `resume` is False.
        KeyboardInterrupt: training was interrupted; the message says how to go on.
    """
    from accelerate import Accelerator

    require_fit(data, model.config)
    accelerator = Accelerator(mixed_precision="no", cpu=device == "cpu" or not torch.cuda.is_available())
    if config.batch % accelerator.num_processes:
        raise ValueError(f"training: {accelerator.num_processes} processes do not divide a batch of {config.batch}")
    checkpoint, curve = folder / "checkpoint.safetensors", folder / "curve.jsonl"
    if checkpoint.exists() and not resume:
        raise FileExistsError(f"{folder} holds a training run: add --resume to go on with it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)

    model.to(accelerator.device).train()
    model.use_attention(Runtime(compile=config.compile).attention_form(model.config.tokens, accelerator.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    wrapped, stepper = accelerator.prepare(model, optimizer)  # gives every process the weights of the first
    state = TrainState(model, optimizer, config)
    start = state.load(checkpoint) if checkpoint.exists() else 0
    if accelerator.is_main_process:
        trim_curve(curve, start)

    forward = in_precision(torch.compile(wrapped) if config.compile else wrapped,
                           uses_bf16(config.precision, device))
    compute_loss = loss or denoising_loss(process, config.weighting)
    batches = draw_batches(model, process, data, config, start, accelerator.process_index, accelerator.num_processes)

    began, since, losses = time.monotonic(), start, []
    with between_steps(alone=accelerator.num_processes == 1) as interrupted, balancing(model) as balance:
        for step, batch in zip(range(start, config.steps), batches, strict=False):
            for group in stepper.param_groups:
                group["lr"] = config.rate(step)
            value = compute_loss(forward, batch.to(accelerator.device)).mean() + balance.loss()
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), config.clip)
            stepper.step()
            stepper.zero_grad()
            balance.shift(lambda load: accelerator.reduce(load, "sum"))
            if project is not None:
                project(model)
            state.average(step)
            losses.append(value.detach())

            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                mean = accelerator.gather(torch.stack(losses)).mean().item()
                require_finite(math.isfinite(mean), f"the loss is {mean}", done, checkpoint)
                seconds = time.monotonic() - began
                progress = Progress(done, config.steps, done * config.batch, mean, config.rate(step),
                                    (done - since) * config.batch / seconds, seconds)
                if accelerator.is_main_process:
                    append_line(curve, asdict(progress))
                    report(progress)
                began, since, losses = time.monotonic(), done, []
            stopping, enough = interrupted(), False
            due = done % config.checkpoint_every == 0 or done == config.steps
            if due or stopping:
                require_finite(state.is_finite(), "a weight is not a finite number", done, checkpoint)
                if due and check is not None:
                    enough = state.ask(check, done)
                if accelerator.is_main_process:
                    state.save(checkpoint, done)
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {done} of {config.steps}: add --resume to go on from "
                                        f"{checkpoint}")
            if enough:
                break
    accelerator.wait_for_everyone()
    state.take_average()
    return model.eval()


class TrainState:
    """A model, its running average and its optimizer, as one file of tensors."""

    def __init__(self, model: DiT, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.parameters = dict(model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Move the average a little towards the weights."""
        decay = min(self.config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def is_finite(self) -> bool:
        """Whether every weight is a finite number."""
        return all(bool(p.isfinite().all()) for p in self.parameters.values())

    @torch.no_grad()
    def take_average(self) -> None:
        """Give the model its averaged weights."""
        for name, p in self.parameters.items():
            p.copy_(self.ema[name])

    def ask(self, check: Check, step: int) -> bool:
        """What `check` says of the averaged weights; training goes on with its own."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.take_average()
        try:
            return check(self.model.eval(), step)
        finally:
            self.model.train()
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(own[name])

    def save(self, path: Path, step: int) -> None:
        """Write everything a resumed run needs, atomically."""
        tensors = {}
        for name, p in self.parameters.items():
            tensors[f"model.{name}"], tensors[f"ema.{name}"] = p.detach(), self.ema[name]
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        write_tensors(path, tensors, {"step": str(step), "model": json.dumps(self.model.config.to_dict()),
                                      "training": json.dumps(asdict(self.config))})

    @torch.no_grad()
    def load(self, path: Path) -> int:
        """Take the state from a file and return the number of steps done.

        Raises:
            ValueError: the file is damaged, no checkpoint, or of another run.
        """
        tensors, metadata = read_tensors(path)
        try:
            then, step = dict(json.loads(metadata["training"])), int(metadata["step"])
            config = DiTConfig.from_dict(json.loads(metadata["model"]))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a checkpoint of a training run ({error!r}): remove it to begin "
                             "anew") from error
        self.check(path, then, config, tensors)
        for name, p in self.parameters.items():
            p.copy_(tensors[f"model.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
            self.optimizer.state[p] = {
                key: value if key == "step" else value.to(p.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (value := tensors.get(f"optimizer.{key}.{name}")) is not None}
        return step

    def check(self, path: Path, then: dict[str, Any], config: DiTConfig, tensors: dict[str, Tensor]) -> None:
        """Refuse the checkpoint of another run: only the length and how often it reports may change."""
        free, now = {"steps", "checkpoint_every", "log_every", "compile"}, asdict(self.config)
        changed = [name for name in now if name not in free and then.get(name) != now[name]]
        shapes = {f"{kind}.{name}": p.shape for name, p in self.parameters.items() for kind in ("model", "ema")}
        if config != self.model.config or any(name not in tensors or tensors[name].shape != shape
                                              for name, shape in shapes.items()):
            changed.append("the model's structure")
        if changed:
            raise ValueError(f"{path} belongs to another run: {', '.join(changed)} changed; use the settings it began "
                             f"with, or another folder")


def descend(layer: nn.Module, loss: Callable[[int], Tensor], *, steps: int, rate: float, clip: float = 1.0,
            project: Callable[[], None] | None = None) -> None:
    """Minimise a loss of the step's number over a layer's parameters, in place: for what fits in memory and is quick.

    AdamW, its rate falling to 0 as a cosine. Nothing is written: what is killed begins anew.

    Args:
        project: as in `train`.
    """
    optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0.0)
    schedule = TrainConfig(steps=max(1, steps), learning_rate=rate, schedule="cosine")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        with torch.enable_grad():
            loss(step).backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if project is not None:
            project()


def draw_batches(model: DiT, process: NoiseProcess, data: ImageData, config: TrainConfig, start: int, rank: int,
                 ranks: int) -> Iterator[Batch]:
    """Batches from step `start` on, this process's share of each: epoch after epoch, shuffled anew."""
    share = config.batch // ranks
    order, epoch = torch.empty(0, dtype=torch.int64), -1
    step = start
    while True:
        draw = step % config.repeat if config.repeat else step
        first = draw * config.batch + rank * share
        indices = []
        for position in range(first, first + share):
            if position // len(data) != epoch:
                epoch = position // len(data)
                order = torch.randperm(len(data), generator=seeded(config.seed, "epoch", epoch))
            indices.append(order[position % len(data)])
        generator = seeded(config.seed, "step", draw, rank)
        clean, labels = data.batch(torch.stack(indices), generator)
        dropped = torch.rand(share, generator=generator) < model.config.label_dropout
        yield Batch(clean, torch.where(dropped, model.config.classes, labels),
                    torch.randn(clean.shape, generator=generator),
                    torch.randint(0, process.steps, (share,), generator=generator), step)
        step += 1


def require_fit(data: ImageData, model: DiTConfig) -> None:
    """Refuse data that the model cannot learn from."""
    expected = (model.channels, *model.input_size)
    if data.shape != expected:
        raise ValueError(f"training: the data is {'x'.join(map(str, data.shape))} (channels, height, width), the model "
                         f"takes {'x'.join(map(str, expected))}: name another size of data or model")
    if data.classes > model.classes:
        raise ValueError(f"training: the data has {data.classes} classes, the model {model.classes}: use a model of at "
                         f"least as many")


def require_finite(finite: bool, problem: str, step: int, checkpoint: Path) -> None:
    """Stop before numbers that are not finite replace the last good checkpoint."""
    if not finite:
        kept = f"the state before it is kept in {checkpoint}; " if checkpoint.exists() else ""
        raise ValueError(f"training: {problem} at step {step}: {kept}start again in another folder with a lower "
                         f"learning rate or a longer warm-up")


@contextmanager
def between_steps(alone: bool) -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C wait for the end of the step and say whether it came; a second one does not wait.

    One process of many (not `alone`) is interrupted at once: the others would wait for it inside their step.
    """
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if not alone or threading.current_thread() is not threading.main_thread() or before is None:
        yield asked.is_set
        return

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def in_precision(forward: Callable[..., Tensor], bf16: bool) -> Denoise:
    """A model called in bfloat16 or float32; its answer is float32."""

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return forward(x, t, y).float()

    return denoise


def uses_bf16(precision: Precision, device: str | None) -> bool:
    """Whether to compute in bfloat16: asked for, or `"auto"` on hardware that multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def append_line(path: Path, row: dict) -> None:
    """Add a JSON line to a log."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_curve(path: Path) -> list[dict]:
    """The lines of a log that `append_line` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def trim_curve(path: Path, step: int) -> None:
    """Forget the lines a killed run wrote after its last checkpoint; the resumed run will write them again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))
