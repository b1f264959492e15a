"""How a model is executed: compiled, and with other layers where those are faster and mean the same.

A copy of the model is changed, never what is saved. On a CPU the weights of float layers go into oneDNN's own layout
where `kernels.py` has products with it. On a GPU layers that it multiplies no faster in 8 bits become float ones, 2:4
sparse ones run sparse, float8 ones do without looks at their input where its size is known, and a GELU becomes a part
of the float product before it; which layers gain was measured by `benchmarks/gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention
from .dit import DiT, PatchEmbedder
from .feedforward import MLP
from .fp8 import Fp8Dynamic
from .linear import GeluLinear, Int8Dynamic, Int8Static, Prepacked, PrepackedInt8, set_linear
from .packed import PackedLinear

LEAST_WEIGHTS = 2**21  # of a layer that gains by float8: 1152 x 1152 loses, 1152 x 3456 gains
LEAST_ORDINARY = 2**20  # the same where it rounds its input as it is: 384 x 1536 loses, 768 x 2304 gains
HOPPER = (9, 0)  # its int8 products are those of the generation before, slower than bfloat16's
TOKEN_LAYERS = ("attn.", "mlp.")  # in the names of layers that see every token
HALVES = (torch.bfloat16, torch.float16)
ISOLATES = "isolate_recompiles" in signature(torch.compile).parameters  # from PyTorch 2.13 on
COMPILATIONS = 256  # of the same code, where it cannot isolate them


def prepack(model: nn.Module) -> None:
    """Change a copy of a model, in place, to have its float layers' weights in oneDNN's layout alone."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            set_linear(model, name, Prepacked(layer.weight, layer.bias))
        elif isinstance(layer, Int8Static):
            set_linear(model, name, PrepackedInt8(layer))
        elif isinstance(layer, PatchEmbedder):
            set_linear(layer, "proj", Prepacked(layer.proj.weight.flatten(1), layer.proj.bias))


def prepare_for_gpu(model: nn.Module, device: torch.device) -> None:
    """Change a copy of a model, in place, to what a GPU runs fastest: in the type and on the device it is run in."""
    round_as_they_are(model)
    run_as_floats(model, slow_packed(model, torch.cuda.get_device_capability(device)))
    put_gelu_inside(model)


def slow_packed(model: nn.Module, capability: tuple[int, int]) -> list[str]:
    """Names of the packed layers that round their inputs for a product that is not faster on such a GPU."""
    return [name for name, layer in model.named_modules() if not gains(layer, capability)]


def gains(layer: nn.Module, capability: tuple[int, int]) -> bool:
    """Whether a GPU of that compute capability should run a layer as it is.

    Other GPUs' int8 products have not been measured, and are used.
    """
    if isinstance(layer, Int8Static):
        return False
    if isinstance(layer, Fp8Dynamic):
        return layer.in_features * layer.out_features >= (LEAST_ORDINARY if layer.ordinary else LEAST_WEIGHTS)
    return not (isinstance(layer, Int8Dynamic) and capability == HOPPER)


@torch.no_grad()
def run_as_floats(model: nn.Module, names: list[str]) -> None:
    """Put float layers, of the type of the model's biases, in the place of packed ones."""
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    for name in names:
        set_linear(model, name, as_float(model.get_submodule(name), dtype))


def as_float(packed: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """The float layer that computes with the weights a packed one means."""
    assert isinstance(packed, PackedLinear)
    weight, bias = packed.dequantize(), packed.bias
    layer = nn.Linear(packed.in_features, packed.out_features, bias is not None, weight.device, dtype)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def round_as_they_are(model: nn.Module) -> None:
    """Spare float8 layers the look at what comes from a norm or a GELU.

    Numbers of a norm have a size of about 1 and at most the root of the width, 34 in XL, before adaLN scales them; a
    reduction over them, and another pass behind a GELU, is much of what 8 bits gain.
    """
    for module in model.modules():
        behind = (module.qkv,) if isinstance(module, Attention) else (
            (module.fc1, module.fc2) if isinstance(module, MLP) else ())
        for layer in behind:
            if isinstance(layer, Fp8Dynamic):
                layer.ordinary = True


def put_gelu_inside(model: nn.Module) -> None:
    """Let the float layers before a GELU compute it in their product, in the types whose products have room for it."""
    for module in model.modules():
        if isinstance(module, MLP) and type(module.fc1) is nn.Linear and module.fc1.weight.dtype in HALVES:
            module.fc1 = GeluLinear.of(module.fc1)


class SparseLinear(nn.Module):
    """A 2:4 sparse float layer run by a GPU's sparse tensor cores ("Accelerating Sparse Deep Neural Networks",
    arXiv 2104.08378), by way of cuSPARSELt.

    Args:
        algorithm: which of cuSPARSELt's; which is fast depends on the shape.
    """

    compressed: Tensor

    def __init__(self, linear: nn.Linear, algorithm: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("compressed", torch._cslt_compress(linear.weight))
        self.algorithm = algorithm

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        rows = x.reshape(-1, self.in_features)
        product = torch._cslt_sparse_mm(self.compressed, rows.t(), self.bias, transpose_result=True,
                                        alg_id=self.algorithm)
        return product.view(*x.shape[:-1], self.out_features)


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """A model's function compiled for the shapes it is first called with, however many models were compiled before.

    PyTorch counts compilations by the code, which all models share, and from the ninth on runs the rest uncompiled,
    with no more than a warning. What launches the kernels is compiled too, instead of written in Python, unless a mode
    is asked for: a small model on a CPU otherwise waits for Python a tenth of the time.
    """
    options: dict[str, Any] = {"isolate_recompiles": True} if ISOLATES else {}
    options |= {"mode": mode} if mode else {"options": {"cpp_wrapper": True}}
    if not ISOLATES:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
    return torch.compile(function, dynamic=False, **options)


class Graphed:
    """A function of a model whose kernels are launched as one CUDA graph: of x, t for every row that it sees, and more.

    It is compiled at its first call: how many tokens there are then decides which 2:4 layers gain by running sparse.
    """

    def __init__(self, model: DiT, function: Callable[..., Any]) -> None:
        self.model, self.function = model, function
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, x: Tensor, t: Tensor, *others: Any) -> Any:
        """As the function; the answer is overwritten by the next one."""
        if self.compiled is None:
            if torch.backends.cusparselt.is_available():
                run_sparse(self.model, len(t) * self.model.config.tokens)
            self.compiled = compiled(self.function, mode="reduce-overhead")
        return self.compiled(x, t, *others)


@torch.no_grad()
def run_sparse(model: nn.Module, rows: int) -> list[str]:
    """Run the 2:4 sparse layers that see every token sparse, where that is faster for so many; their names.

    For calls that become CUDA graphs: what a sparse product costs the processor is not counted.
    """
    tried: dict[tuple[Any, ...], int | None] = {}
    sparse = []
    for name, layer in list(model.named_modules()):
        sees_tokens = any(part in name for part in TOKEN_LAYERS)
        if sees_tokens and isinstance(layer, nn.Linear) and is_two_of_four(layer.weight):
            shape = (layer.in_features, layer.out_features, layer.bias is None)
            if shape not in tried:
                tried[shape] = faster_algorithm(layer, rows)
            if (algorithm := tried[shape]) is not None:
                set_linear(model, name, SparseLinear(layer, algorithm))
                sparse.append(name)
    return sparse


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four neighbours in a row are not zero, in a shape and type that GPUs take."""
    rows, columns = weight.shape
    fits = weight.dtype in HALVES and rows % 32 == 0 and columns % 32 == 0
    return fits and int((weight.view(-1, 4) != 0).sum(1).amax()) <= 2


def faster_algorithm(linear: nn.Linear, rows: int) -> int | None:
    """The algorithm by which a layer's sparse product is faster than its dense one, or None where none is."""
    x = torch.randn(rows, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    sparse = quickest(SparseLinear(linear), x)
    faster = kernel_seconds(partial(sparse, x)) < kernel_seconds(partial(linear, x))
    return sparse.algorithm if faster else None


def quickest(sparse: SparseLinear, x: Tensor) -> SparseLinear:
    """The layer with the algorithm that is quickest for rows (n, in_features)."""
    sparse.algorithm = int(torch._cslt_sparse_mm_search(sparse.compressed, x.t(), sparse.bias, transpose_result=True))
    return sparse


def kernel_seconds(call: Callable[[], Any], repeats: int = 10, rounds: int = 9) -> float:
    """What a call costs the GPU alone: the median of its CUDA graph's replays."""
    graph, times = captured(call, repeats), []
    for _ in range(1 + rounds):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return sorted(times[1:])[rounds // 2] / repeats / 1000


def captured(call: Callable[[], Any], repeats: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph
