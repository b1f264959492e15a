"""Models executed by OpenVINO in the place of PyTorch's compiler, on a CPU: for few rows, where it is the faster one.

OpenVINO (https://docs.openvino.ai, Apache-2.0) is given the traced operations of a copy of the model. Layers of
`Int8Static` keep their integers, whose products it knows; other packed layers become float ones of the weights they
mean. `benchmarks/peers.py` says where it is ahead.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .dit import DiT
from .execution import run_as_floats
from .linear import Int8Static, set_linear
from .packed import PackedLinear

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""What OpenVINO calls the types that it computes in on a CPU."""
INPUTS = ("x", "t", "y", "modulations", "change")
"""Of a model's functions, in their order."""
EXTRA = "pip install 'slimdit[openvino]'"


@cache
def library() -> Any:
    """OpenVINO, without the package by which it would report its use over the network.

    Raises:
        ImportError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # an import then fails, and it does without
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"OpenVINO is not installed: {EXTRA}, or use the engine torch") from error
    return openvino


@cache
def core() -> Any:
    """What compiles models: one for as long as the process lives.

    Each gives the thread another stack for signals, and where two go in the order in which they came, the thread is
    left with that of the first, which is no more: the next Ctrl-C would be a crash.
    """
    return library().Core()


class InOpenVino:
    """A function of a model, compiled by OpenVINO for every set of shapes that it is called with; adaLN's once for all.

    Args:
        model: as `prepared` makes it.
        function: a method of it.
        dtype: what OpenVINO computes in, a key of `PRECISIONS`.
        threads: that it uses.
    """

    def __init__(self, model: DiT, function: Callable[..., Any], dtype: str, threads: int) -> None:
        self.model, self.function, self.dtype, self.threads = model, function.__name__, dtype, threads
        self.requests: dict[Any, Any] = {}

    def __call__(self, *given: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        """As the model's function, in float32; the answer is overwritten by the next one."""
        named = {name: tensor for name, tensor in zip(INPUTS, given) if tensor is not None}
        # adaLN's rows are as many as a batch has labels: compiled for every number they would cost a second each.
        shapes = self.sees_images and tuple((name, tensor.shape) for name, tensor in named.items())
        if shapes not in self.requests:
            self.requests[shapes] = self._request(named)
        request, taken = self.requests[shapes]
        answers = request.infer([named[name].numpy() for name in taken], share_inputs=True, share_outputs=True)
        tensors = tuple(torch.from_numpy(answer) for answer in answers.to_tuple())
        return tensors if len(tensors) > 1 else tensors[0]

    @property
    def sees_images(self) -> bool:
        """Whether it is a function of x."""
        return self.function != "modulations"

    def _request(self, named: dict[str, Tensor]) -> tuple[Any, list[str]]:
        model = converted(self.model, self.function, named)
        if self.sees_images:
            model.reshape({name: list(tensor.shape) for name, tensor in named.items()})
        settings = {"INFERENCE_PRECISION_HINT": PRECISIONS[self.dtype], "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": self.threads}
        request = core().compile_model(model, "CPU", settings).create_infer_request()
        return request, [given.get_any_name() for given in model.inputs]


@contextmanager
def alone() -> Iterator[None]:
    """While inside, PyTorch uses one thread: its idle ones stay awake for milliseconds, and slow OpenVINO's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prepared(model: DiT) -> DiT:
    """A float32 copy of a model in layers that OpenVINO knows."""
    shared = {id(buffer): buffer for buffer in model.buffers() if not buffer.is_floating_point()}
    model = copy.deepcopy(model, shared).float().eval()
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    run_as_floats(model, [name for name, layer in packed.items() if not isinstance(layer, Int8Static)])
    for name, layer in packed.items():
        if isinstance(layer, Int8Static):
            set_linear(model, name, Simulated(layer))
    return model


class Simulated(nn.Module):
    """An `Int8Static` in the operations by which OpenVINO recognises a product of integers."""

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: Int8Static) -> None:
        super().__init__()
        self.step, self.zero, self.bias = layer.step.item(), int(layer.zero), layer.bias
        self.register_buffer("weight", layer.weight)
        self.register_buffer("scale", layer.scale[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in float32."""
        x = torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, 0, 255)
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


class Function(nn.Module):
    """A function of a model that takes the named ones of its inputs."""

    def __init__(self, model: DiT, function: str, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.function, self.names = model, function, tuple(names)

    def forward(self, *given: Tensor) -> Any:
        """What the model's function answers."""
        named = dict(zip(self.names, given, strict=True))
        if "x" in named:
            named.setdefault("modulations", None)  # type: ignore[arg-type]
        return getattr(self.model, self.function)(**named)


@torch.no_grad()
def converted(model: DiT, function: str, named: dict[str, Tensor]) -> Any:
    """OpenVINO's model of a function, for any number of images.

    Its inputs are named as in `INPUTS`, those left out that the function does not look at.

    Args:
        model: as `prepared` makes it, its attention in the form that is wanted.
        named: inputs of any number of images, by name.
    """
    shapes = [[-1, *tensor.shape[1:]] for tensor in named.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of sizes that are fixed by the config
        made = library().convert_model(Function(model, function, list(named)), input=shapes,
                                       example_input=tuple(named.values()))
    for given, name in zip(made.inputs, named, strict=True):
        given.get_tensor().set_names({name})
    for number, answer in enumerate(made.outputs):
        answer.get_tensor().set_names({("noise" if "x" in named else "modulations", "change")[number]})
    return made
