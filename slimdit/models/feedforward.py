"""The feed-forward half of a block: what each token computes on its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU, named `fc1` and `fc2` as in the original DiT."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        return self.fc2(gelu(self.fc1(x)))


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (arXiv 1606.08415), elementwise.

    0.5 (1 + tanh u) is sigmoid(2 u). The compiler turns the sigmoid into one exponential, where its vectorised tanh
    took a quarter of a training step on a CPU; in eager mode PyTorch's own kernel is the faster one.
    """
    if not torch.compiler.is_compiling():
        return nn.functional.gelu(x, approximate="tanh")
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
