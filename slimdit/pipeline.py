"""A model with everything it takes to make images of it: the waist between the parts and the two wings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .models import kernels, openvino
from .models.attention import AttentionForm
from .models.autoencoder import Autoencoder, PixelSpace
from .models.dit import DiT
from .models.execution import Graphed, compiled, prepack, prepare_for_gpu
from .models.modulation import Modulations
from .models.openvino import InOpenVino
from .sampling.caching import Evaluator
from .sampling.process import NoiseProcess
from .sampling.seeds import ImageNoise, image_labels
from .sampling.solvers import Kept, Sampling, one_step, solve, timesteps, walk

Dtype = Literal["float32", "bfloat16", "float16"]
Engine = Literal["torch", "openvino"]
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPLICIT_TOKENS = 512  # up to here `auto` takes the explicit form where compiled on a CPU: docs/log.md
Compiler = Callable[[DiT, Callable[..., Any]], Callable[..., Any]]
"""Of a function of a model."""


@dataclass(frozen=True)
class Runtime:
    """How a model is executed; none of it changes the structure or the saved weights.

    Attributes:
        dtype: of weights and activations during sampling.
        compile: whether the model is compiled for the batch it runs at.
        attention: form of softmax attention; `"auto"` is native where that runs (bfloat16 on a CPU with AVX-512's
            products of it, and a C++ compiler), else explicit where compiled on a CPU for short sequences.
        engine: what compiles the model, and then runs it: PyTorch, or on a CPU OpenVINO, where that is installed.

    Raises:
        ValueError: a value is unknown, or the engine does not have the dtype or the form of attention.
    """

    dtype: Dtype = "float32"
    compile: bool = False
    attention: Literal["auto", "fused", "explicit", "native"] = "auto"
    engine: Engine = field(default="torch", repr=False)  # out of fingerprints that are older than it: see there

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"runtime: dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if self.attention not in ("auto", "fused", "explicit", "native"):
            raise ValueError(f"runtime: attention {self.attention!r} is unknown; use auto, fused, explicit or native")
        if self.engine not in ("torch", "openvino"):
            raise ValueError(f"runtime: engine {self.engine!r} is unknown; use torch or openvino")
        if self.in_openvino and (self.dtype not in openvino.PRECISIONS or self.attention == "native"):
            raise ValueError(f"runtime: OpenVINO runs {' or '.join(openvino.PRECISIONS)}, and attention of its own, "
                             f"not {self.dtype} with {self.attention} attention")

    @property
    def in_openvino(self) -> bool:
        """Whether it is OpenVINO that runs the model: what is not compiled, PyTorch runs."""
        return self.compile and self.engine == "openvino"

    def attention_form(self, tokens: int, device: torch.device) -> AttentionForm:
        """The form that `attention` means for a model of so many tokens on a device.

        Raises:
            ValueError: native attention is asked for and cannot be had; the sentence says why.
        """
        on_cpu = device.type == "cpu"
        wanted = self.attention == "auto" and on_cpu and self.dtype == "bfloat16" and not self.in_openvino
        if self.attention == "native" or wanted:
            reason = "it is for bfloat16 on a CPU" if self.dtype != "bfloat16" or not on_cpu else kernels.missing()
            if not reason:
                return "native"
            if self.attention == "native":
                raise ValueError(f"runtime: native attention cannot be had: {reason}; use auto")
        if self.attention != "auto":
            return self.attention
        return "explicit" if self.compile and on_cpu and tokens <= EXPLICIT_TOKENS else "fused"


@dataclass(frozen=True)
class Pipeline:
    """A model, how noise becomes an image with it, and how it is executed.

    Attributes:
        model: the DiT, in its stored precision.
        history: the methods that made it, each as {name: options}, first to last.
    """

    model: DiT
    sampling: Sampling = field(default_factory=Sampling)
    process: NoiseProcess = field(default_factory=NoiseProcess)
    autoencoder: Autoencoder = field(default_factory=PixelSpace)
    runtime: Runtime = field(default_factory=Runtime)
    name: str = ""
    history: tuple[Mapping[str, Any], ...] = ()

    def sample(self, ids: Sequence[int], *, seed: int = 0, batch: int = 32,
               labels: Sequence[int] | None = None, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """The images of these ids.

        Noise and label come from (seed, id), so an image does not depend on the batch it is made in.

        Args:
            labels: classes to use instead of those the ids stand for, one per id.
            progress: called with the number of images done after every batch.

        Returns:
            uint8, (len(ids), height, width, channels).

        Raises:
            ValueError: a label is not one of the model's classes, guidance has no null class to use, or an image is
                not finite.
        """
        chosen = (image_labels(seed, ids, self.model.config.classes) if labels is None
                  else torch.as_tensor(list(labels), dtype=torch.int64))
        if len(chosen) != len(ids):
            raise ValueError(f"{len(ids)} images were asked for with {len(chosen)} labels: give one label per image")
        if wrong := [label for label in chosen.tolist() if not 0 <= label < self.model.config.classes]:
            raise ValueError(f"labels must be in 0..{self.model.config.classes - 1}, not {wrong[0]}")
        if self.sampling.guidance != 1 and not self.model.config.label_dropout:
            raise ValueError("guidance needs a null class, and this model was trained without dropped labels: "
                             "sample it with guidance 1")
        parts = []
        for start in range(0, len(ids), batch):
            parts.append(self._sample_batch(ids[start:start + batch], chosen[start:start + batch], seed, batch))
            if progress:
                progress(min(start + batch, len(ids)))
        return np.concatenate(parts) if parts else np.empty((0, *self.image_size, self.image_channels), np.uint8)

    @torch.inference_mode()
    def _sample_batch(self, ids: Sequence[int], labels: Tensor, seed: int, batch: int) -> np.ndarray:
        # A compiled model is compiled for one batch size: the last batch is filled up and cut again.
        missing = batch - len(ids) if self.runtime.compile else 0
        filled = [*ids, *[ids[-1]] * missing]
        config = self.model.config
        labels = torch.cat([labels, labels[-1:].expand(missing)])
        latents = self.latents(ImageNoise(seed, filled, (config.channels, *config.input_size)), labels)
        images = self.autoencoder.decode(latents[:len(ids)].float())
        finite = images.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise ValueError(f"image {ids[finite.index(False)]} has pixels that are not finite numbers (NaN): look at "
                             "the model's weights, or run it in another dtype")
        return to_uint8(images)

    @torch.inference_mode()
    def latents(self, noise: ImageNoise, labels: Tensor) -> Tensor:
        """What the solver makes of noise, before it is decoded: (batch, channels, height, width) for labels (batch,).

        What adaLN says is computed ahead, for all steps at once.
        """
        denoise = self.denoise  # made with all threads
        with openvino.alone() if self.runtime.in_openvino else nullcontext():
            return self._latents(denoise, noise, labels)

    def _latents(self, denoise: Denoiser, noise: ImageNoise, labels: Tensor) -> Tensor:
        config, guided = self.model.config, self.sampling.guidance != 1
        occurring = torch.cat([labels, labels.new_tensor([config.classes])]) if guided else labels
        ahead = Modulations(denoise.model, timesteps(self.process, self.sampling), occurring,
                            compute=denoise.modulations)
        evaluator = self.evaluator()

        def seek(step: int) -> None:
            ahead.seek(step)
            evaluator.seek(step)

        if self.takes_whole_steps:
            return walk(lambda x, t, y, *others: self.step(x, t, y, ahead(y), *others), self.process, self.sampling,
                        noise, labels, null_class=config.classes, device=self.device, progress=seek)
        return solve(lambda x, t, y: evaluator(x, t, y, ahead(y)), self.process, self.sampling, noise, labels,
                     null_class=config.classes, learn_sigma=config.learn_sigma, device=self.device, progress=seek)

    @property
    def takes_whole_steps(self) -> bool:
        """Whether PyTorch compiles guidance and the solver's arithmetic with the model, as one function a step.

        `benchmarks/step.py` says what that gains. Cached steps differ from one another; OpenVINO sees the model alone.
        """
        return self.runtime.compile and not self.runtime.in_openvino and self.sampling.cache is None

    @cached_property
    def step(self) -> Callable[..., tuple[Tensor, Kept]]:
        """A whole step of `walk`, compiled, with what adaLN says after the labels."""
        return self.denoise.whole_step(self.sampling)

    def evaluator(self) -> Evaluator:
        """The model as a new sampling run calls it."""
        return Evaluator(self.denoise, self.process, self.sampling)

    @cached_property
    def denoise(self) -> Denoiser:
        """The model as sampling calls it, executed as `runtime` says."""
        dtype, on_gpu = DTYPES[self.runtime.dtype], self.device.type == "cuda"
        form = self.runtime.attention_form(self.model.config.tokens, self.device)
        if self.runtime.in_openvino:
            if on_gpu:
                raise ValueError("runtime: OpenVINO runs on a CPU here, and the model is on a GPU: use engine torch")
            openvino.library()
            return Denoiser(openvino.prepared(self.model), torch.float32, form,
                            partial(InOpenVino, dtype=self.runtime.dtype, threads=torch.get_num_threads()), True)
        changes = on_gpu or form == "native" or dtype != self._stored_dtype()
        # A cast leaves integers as they are: the copy shares them.
        shared = {id(buffer): buffer for buffer in self.model.buffers() if not buffer.is_floating_point()}
        model = copy.deepcopy(self.model, shared) if changes else self.model
        model = model.to(dtype).eval()
        if on_gpu:
            prepare_for_gpu(model, self.device)
        elif form == "native":
            prepack(model)
        return Denoiser(model, dtype, form, compiler(self.device) if self.runtime.compile else None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.buffers()).device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        height, width = self.model.config.input_size
        return height * self.autoencoder.factor, width * self.autoencoder.factor

    @property
    def image_channels(self) -> int:
        """Channels of an image."""
        return self.autoencoder.image_channels or self.model.config.channels

    def replace(self, **changes: Any) -> Pipeline:
        """A pipeline with these parts changed; the rest is shared."""
        return replace(self, **changes)

    def copy(self) -> Pipeline:
        """A pipeline that shares nothing that can change."""
        return replace(self, model=copy.deepcopy(self.model))

    def fingerprint(self) -> str:
        """A hash of everything that decides the images but the autoencoder: weights, structure, settings."""
        config = self.model.config.to_dict()
        digest = sha256(repr((config, self.sampling, self.process, self.runtime)).encode())
        for beside in (self.sampling.coefficients, self.sampling.cache):  # what its text leaves out
            digest.update(repr(beside).encode() if beside else b"")
        digest.update(self.runtime.engine.encode() if self.runtime.in_openvino else b"")
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> Pipeline:
        """The pipeline with its model and autoencoder on a device."""
        return replace(self, model=self.model.to(device), autoencoder=self.autoencoder.to(device))

    def _stored_dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters()), torch.float32)


@dataclass(frozen=True)
class Denoiser:
    """A model as sampling calls it: float32 in and out, whatever it computes in.

    Attributes:
        model: in the type it computes in.
        form: of softmax attention.
        compiler: of its functions, for the batch that they are called with, or None to run them as they are.
        compiles_adaln: whether also of what is computed once a run, which PyTorch runs as it is.
    """

    model: DiT
    dtype: torch.dtype
    form: AttentionForm
    compiler: Compiler | None = None
    compiles_adaln: bool = False

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None = None) -> Tensor:
        """As `DiT.forward`."""
        return self._float(self._executed("forward", x, t, y, modulations))

    def with_change(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `DiT.with_change`; the change stays in the type that the model computes in."""
        output, change = self._executed("with_change", x, t, y, modulations)
        return self._float(output), change.clone()

    def without_blocks(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None, change: Tensor) -> Tensor:
        """As `DiT.without_blocks`."""
        return self._float(self._executed("without_blocks", x, t, y, modulations, change))

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """As `DiT.modulations`."""
        if self.compiles_adaln and self.compiler:
            return self._functions["modulations"](None, t, y).clone()
        return self.model.modulations(t, y)

    def whole_step(self, sampling: Sampling) -> Callable[..., tuple[Tensor, Kept]]:
        """The model, guidance and the solver's arithmetic as one compiled function.

        (x, t, y, modulations, coefficients, kept, drawn) to what `one_step` returns, in tensors that stay.
        """
        learn_sigma = self.model.config.learn_sigma

        def step(x: Tensor, t: Tensor, y: Tensor, modulations: Tensor, *others: Any) -> tuple[Tensor, Kept]:
            def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                return self.model(x.to(self.dtype), t, y, modulations)

            return one_step(denoise, sampling, learn_sigma, x, t, y, *others)

        assert self.compiler is not None
        run, on_gpu = self.compiler(self.model, step), self.model.pos_embed.device.type == "cuda"

        def stepped(*given: Any) -> tuple[Tensor, Kept]:
            self.model.use_attention(self.form)
            x, kept = run(*given)
            return (x.clone(), tuple(part.clone() for part in kept)) if on_gpu else (x, kept)

        return stepped

    def _executed(self, function: str, x: Tensor, *others: Any) -> Any:
        self.model.use_attention(self.form)  # another pipeline may share the model and execute it otherwise
        return self._functions[function](x.to(self.dtype), *others)

    @cached_property
    def _functions(self) -> Mapping[str, Callable[..., Any]]:
        names = ("forward", "with_change", "without_blocks", "modulations")
        plain = {name: getattr(self.model, name) for name in names}
        return {name: self.compiler(self.model, run) for name, run in plain.items()} if self.compiler else plain

    def _float(self, output: Tensor) -> Tensor:
        # Always a copy, as of the change: CUDA graphs and OpenVINO write the next answer where they wrote this one.
        return output.to(torch.float32, copy=True)


def compiler(device: torch.device) -> Compiler:
    """PyTorch's, as it is best on a device."""
    return Graphed if device.type == "cuda" else lambda model, function: compiled(function)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images in -1..1, (batch, channels, h, w), to uint8 (batch, h, w, channels): clamped, rounded half to even."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()
