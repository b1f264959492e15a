"""Whole sampling runs beside other ways to run the same model: the same weights, noise, labels, solver and steps.

    python -m benchmarks.peers --presets S/2 --images 1 8

`ratio` is how many times faster slimdit (b) is than the peer (a), from noise to the last latent: peers in floats are
set beside the compiled model in its best float type, peers in 8 bits beside our int8. `a_error` and `b_error` are how
far the latents are from those of the float32 model run plainly; weights are random, so that says nothing of images.
Before every run that is timed there is one of the same engine that is not: idle threads of one stay awake and slow the
other.

* diffusers: its `DiTPipeline` and `DDIMScheduler`, as they are, with an autoencoder that does nothing, in float32 and
  bfloat16, and with its transformer compiled. It takes 1000 for the class of no label, so presets have 1,000 classes.
* torchao (`pip install torchao`): its int8 configurations applied to our model in bfloat16, compiled.
* ONNX Runtime (`pip install onnxruntime onnx onnxscript`): the exported model, and the same after its own
  `quantize_dynamic`.
* OpenVINO (`pip install openvino nncf`): in bfloat16, and in int8 by NNCF. Set beside it is also what slimdit makes of
  it as an engine, `compile = {engine = "openvino"}`: adaLN ahead, and for int8 the static layers of
  `quantize = {activations = "int8_static"}`.

What is not installed is not compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from slimdit.context import Context
from slimdit.formats import load, save
from slimdit.methods.compile import Compile
from slimdit.methods.quantize import Quantize
from slimdit.models.dit import DiT, preset
from slimdit.models.execution import compiled
from slimdit.pipeline import Pipeline
from slimdit.sampling.seeds import ImageNoise, image_labels
from slimdit.sampling.settings import Sampling

from .int8 import Inputs, fill, openvino, relative
from .result import compare, settle, show
from .sampling_run import whole

GUIDANCE = 4.0
Run = Callable[[], Tensor]  # latents of a whole sampling run


def main() -> None:
    parser = argparse.ArgumentParser(description="Time whole sampling runs of slimdit and of its peers.")
    parser.add_argument("--presets", nargs="+", default=["S/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    show("peers", [row for name, images in product(options.presets, options.images)
                   for row in measure(preset(name, frequency_shift=1), name, images, options.steps, options.rounds)])


def measure(config: Any, name: str, images: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model and number of images."""
    torch.manual_seed(0)
    sampling = Sampling("ddim", steps, "trailing", guidance=GUIDANCE)
    plain = Pipeline(fill(DiT(config).eval()), sampling=sampling)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        context = Context(plain, Path(folder))
        ours = {"floats": Compile().apply(plain.copy(), context)}
        save(Quantize(weights="int8", activations="int8").apply(ours["floats"].copy(), context), Path(folder, "int8"))
        ours["int8"] = load(Path(folder, "int8"))
        called = {"floats": f"slimdit {ours['floats'].runtime.dtype}", "int8": "slimdit int8"}
        expected = whole(plain, images)
        for kind, peer, run in peers(plain, images, Path(folder)):
            beside = {called[kind]: ours[kind]}
            if peer.startswith("OpenVINO"):
                beside |= in_openvino(kind, ours["floats"], context)
            for mine, pipeline in beside.items():
                own = partial(whole, pipeline, images)
                rows.append({"model": name, "images": images, "steps": steps, "a": peer, "b": mine,
                             **compare(run, own, rounds, settle=1), "a_error": relative(run(), expected),
                             "b_error": relative(own(), expected)})
    return rows


def in_openvino(kind: str, floats: Pipeline, context: Context) -> dict[str, Pipeline]:
    """Ours with OpenVINO as its engine, by name."""
    made = Compile(engine="openvino").apply(floats.copy(), context)
    if kind == "floats":
        return {f"slimdit {made.runtime.dtype} in OpenVINO": made}
    static = Quantize(weights="int8", activations="int8_static", images=4).apply(made, context)
    return {"slimdit static int8 in OpenVINO": static}


def peers(plain: Pipeline, images: int, folder: Path) -> Iterator[tuple[str, str, Run]]:
    """What is installed: the kind of ours that it is set beside, its name, and a whole run."""
    config = plain.model.config
    yield "floats", "eager float32", partial(whole, plain, images, plain.denoise)
    yield from with_diffusers(plain, images, folder)
    both = (torch.zeros(2 * images, config.channels, *config.input_size), torch.zeros(2 * images, dtype=torch.int64),
            torch.zeros(2 * images, dtype=torch.int64))
    for kind, name, model in (*with_torchao(plain), *with_onnx_runtime(plain, both, folder),
                              *with_openvino(plain, both)):
        yield kind, name, partial(whole, plain, images, model)


class Nothing:
    """An autoencoder whose images are the latents."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """As diffusers' own; the latents are kept."""
        self.latents = latents
        return SimpleNamespace(sample=latents)


def with_diffusers(plain: Pipeline, images: int, folder: Path) -> Iterator[tuple[str, str, Run]]:
    """Runs of diffusers' pipeline from the files that we write for it."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    from diffusers.pipelines.dit import pipeline_dit

    save(plain, folder / "diffusers", format="diffusers")
    config, ids = plain.model.config, range(images)
    labels = image_labels(0, ids, config.classes).tolist()
    for kind, dtype in (("eager", torch.float32), ("eager", torch.bfloat16), ("compiled", torch.bfloat16)):
        transformer = DiTTransformer2DModel.from_pretrained(folder / "diffusers" / "transformer", torch_dtype=dtype)
        pipe = DiTPipeline(transformer.eval(), Nothing(), DDIMScheduler.from_pretrained(folder / "diffusers/scheduler"))
        pipe.set_progress_bar_config(disable=True)
        if kind == "compiled":
            pipe.transformer.forward = compiled(pipe.transformer.forward)

        @torch.inference_mode()
        def run(pipe: Any = pipe, dtype: torch.dtype = dtype) -> Tensor:
            noise = ImageNoise(0, ids, (config.channels, *config.input_size)).draw()
            with mock.patch.object(pipeline_dit, "randn_tensor", lambda **_: noise.to(dtype)):  # it takes none of ours
                pipe(labels, guidance_scale=GUIDANCE, num_inference_steps=plain.sampling.steps, output_type="pt")
            return pipe.vae.latents.float()

        yield "floats", f"diffusers {kind} {str(dtype).removeprefix('torch.')}", run


def with_torchao(plain: Pipeline) -> Iterator[tuple[str, str, Any]]:
    """Our model under torchao's int8 configurations, compiled."""
    if not importlib.util.find_spec("torchao"):
        return
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    for name, chosen in (("weight-only", Int8WeightOnlyConfig()), ("dynamic", Int8DynamicActivationInt8WeightConfig())):
        model = plain.copy().model.bfloat16()
        quantize_(model, chosen)
        model.use_attention(replace(plain.runtime, dtype="bfloat16", compile=True).attention_form(
            model.config.tokens, plain.device))
        forward = compiled(model)
        yield "int8", f"torchao int8 {name}", lambda x, t, y, forward=forward: forward(x.bfloat16(), t, y).float()


def with_onnx_runtime(plain: Pipeline, inputs: Inputs, folder: Path) -> Iterator[tuple[str, str, Any]]:
    """The exported model in float32 and in ONNX Runtime's dynamic int8."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        return
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exported, quantized = folder / "model.onnx", folder / "int8.onnx"
    torch.onnx.export(plain.model, inputs, exported, dynamo=True, input_names=["x", "t", "y"], output_names=["noise"],
                      verbose=False)
    quantize_dynamic(exported, quantized, weight_type=QuantType.QInt8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # as a run ends: ours took twice as long
    for kind, name, path in (("floats", "float32", exported), ("int8", "dynamic int8", quantized)):
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def run(*given: Tensor, session: Any = session, names: list[str] = names) -> Tensor:
            return torch.from_numpy(session.run(None, dict(zip(names, (part.numpy() for part in given))))[0])

        yield kind, f"ONNX Runtime {name}", run


def with_openvino(plain: Pipeline, inputs: Inputs) -> Iterator[tuple[str, str, Any]]:
    """The model run by OpenVINO."""
    for name, model in openvino(plain, inputs).items():
        yield "int8" if "int8" in name else "floats", name, model


if __name__ == "__main__":
    settle()
    torch.set_grad_enabled(False)
    main()
