"""The feed-forward half of a block: what each token computes on its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import kernels
from .linear import GeluLinear, Int8Dynamic, Prepacked, PrepackedInt8


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU, named `fc1` and `fc2` as in the original DiT.

    `native` says that between integer layers the GELU is that of `kernels.py`. Like the form of attention it is chosen
    by who runs the model, and never saved.
    """

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.native = False

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        if self.native and isinstance(self.fc1, Int8Dynamic) and isinstance(self.fc2, Int8Dynamic) and kernels.take(x):
            levels, step = torch.ops.slimdit.gelu_levels(*self.fc1.product(x), self.fc1.bias)
            return self.fc2.finished(self.fc2.product_of_levels(levels, x.dtype), step, x)
        if isinstance(self.fc1, PrepackedInt8) and isinstance(self.fc2, PrepackedInt8):
            return self.fc2.of_levels(self.fc1.gelu_levels(x, self.fc2)).view(x.shape)
        return self.fc2(self.fc1(x, gelu=True) if isinstance(self.fc1, Prepacked | GeluLinear) else gelu(self.fc1(x)))


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (arXiv 1606.08415), elementwise.

    0.5 (1 + tanh u) is sigmoid(2 u). The compiler turns the sigmoid into one exponential, where its vectorised tanh
    took a quarter of a training step on a CPU; in eager mode PyTorch's own kernel is the faster one.
    """
    if not torch.compiler.is_compiling():
        return nn.functional.gelu(x, approximate="tanh")
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
