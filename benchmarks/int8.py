"""Our int8 against the compiled model in its best float precision, and against OpenVINO's, on the same weights.

    python -m benchmarks.int8 --presets S/2 B/2 --batches 1 8

Times one forward. The baseline is the compiled model in the machine's best float type, with the attention form that
`Runtime(attention="auto")` takes; eager float32 is what papers compare with. Ours is `quantize(weights="int8",
activations="int8")`, saved, loaded again and compiled. `ratio` is how many times faster ours (b) is than the other (a).
Where `openvino` and `nncf` are installed (`pip install openvino nncf`), NNCF quantizes the same model, timed in the
same process.

Weights are random: `error` is numerical, relative to the float32 model's output, and says nothing of images.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimdit.context import Context
from slimdit.formats import load, save
from slimdit.methods.compile import Compile
from slimdit.methods.quantize import Quantize
from slimdit.models.dit import DiT, preset
from slimdit.pipeline import Pipeline

from .result import compare, settle, show

Inputs = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time int8 against compiled float, and against OpenVINO.")
    parser.add_argument("--presets", nargs="+", default=["S/2", "B/2"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    show("int8", [row for name, batch in product(options.presets, options.batches)
                  for row in measure(name, batch, options.rounds)])


def measure(name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one preset at one batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pipelines(name, device) as (float_model, baseline, ours):
        config = float_model.model.config
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(tensor.to(device) for tensor in (
            torch.randn(batch, config.channels, *config.input_size, generator=generator),
            torch.randint(0, 1000, (batch,), generator=generator),
            torch.randint(0, config.classes + 1, (batch,), generator=generator)))
        expected = float_model.denoise(*inputs)
        calls: dict[str, Callable[[], Tensor]] = {
            f"compiled {baseline.runtime.dtype}": lambda: baseline.denoise(*inputs),
            "eager float32": lambda: float_model.denoise(*inputs),
            **({name: partial(engine, *inputs) for name, engine in openvino(float_model, inputs).items()}
               if device == "cpu" else {})}
        with torch.inference_mode():
            mine = lambda: ours.denoise(*inputs)  # noqa: E731
            return [{"model": name, "batch": batch, "a": other, "b": "slimdit int8", **compare(call, mine, rounds),
                     "a_error": relative(call(), expected), "b_error": relative(mine(), expected)}
                    for other, call in calls.items()]


@contextmanager
def pipelines(name: str, device: str, **settings: Any) -> Iterator[tuple[Pipeline, Pipeline, Pipeline]]:
    """A preset as it is, compiled in its best float type, and in int8 as it is after saving and loading."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Pipeline(random_model(name), **settings).to(device)
        context = Context(plain, Path(folder), device=device)
        baseline = Compile().apply(plain.copy(), context)
        save(Quantize(weights="int8", activations="int8").apply(baseline.copy(), context), Path(folder) / "int8")
        yield plain, baseline, load(Path(folder) / "int8").to(device)


def opened(name: str, device: str = "cpu") -> Pipeline:
    """The bundled model, or a preset with random weights, on which no time depends."""
    return load("bundled").to(device) if name == "bundled" else Pipeline(random_model(name, device))


def random_model(name: str, device: str = "cpu") -> DiT:
    """A preset with weights of a trained model's size; the paper's initialisation would leave every block silent."""
    torch.manual_seed(0)
    with torch.device(device):
        return fill(DiT(preset(name)).eval())


def fill(model: DiT) -> DiT:
    """A model with weights of a trained one's size."""
    for label, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05 if "adaLN" in label else 0.02)
    return model


def openvino(pipeline: Pipeline, inputs: Inputs) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """A model run by OpenVINO at the inputs' shape, in its best float type and in NNCF's int8; none if missing."""
    if not all(importlib.util.find_spec(name) for name in ("openvino", "nncf")):
        print("openvino and nncf are not installed: not compared with them")
        return {}
    import nncf
    import openvino as ov

    arrays = [tensor.numpy() for tensor in inputs]
    with torch.no_grad():
        converted = ov.convert_model(pipeline.model, example_input=inputs, input=[list(a.shape) for a in arrays])
    samples = [[arrays[0] * (1 - step / 16), arrays[1] * 0 + 62 * step, arrays[2]] for step in range(16)]
    quantized = nncf.quantize(converted, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=16)
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY"}
    core = ov.Core()

    def run(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda *given: torch.from_numpy(next(iter(request.infer([part.numpy() for part in given]).values())))

    return {"OpenVINO bf16": run(converted), "OpenVINO NNCF int8": run(quantized)}


def relative(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float(f"{((actual.float() - expected).norm() / expected.norm()).item():.3g}")


if __name__ == "__main__":
    settle()
    main()
