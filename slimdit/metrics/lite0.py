"""The trunk of EfficientNet-Lite0: a small network of ImageNet features that fits in the package.

"EfficientNet" (Tan and Le, arXiv 1905.11946) in the Lite form of TensorFlow's model garden: no squeeze-and-excite,
ReLU6 for swish. Only the first 11 of its 16 blocks are kept: the spatial mean there, 112 numbers, told small
images apart best.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..files import read_tensors

SIDE = 64  # height and width of the input, pixels
WIDTH = 112  # features of an image
NORM_EPS = 1e-3  # TensorFlow's, not PyTorch's
STAGES = (  # repeats, kernel, stride of the first, expansion, channels in, channels out
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
)
WEIGHTS = Path(__file__).parents[1] / "assets" / "lite0" / "model.safetensors"


class Lite0(nn.Module):
    """The stem and the first 11 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, kernel=3, stride=2)
        self.blocks = nn.ModuleList(
            InvertedResidual(inputs if first else outputs, outputs, kernel, stride if first else 1, expansion)
            for repeats, kernel, stride, expansion, inputs, outputs in STAGES
            for first in (True, *[False] * (repeats - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, 112) of RGB images (n, 3, 64, 64) on the scale 0..255."""
        x = F.relu6(self.stem((images - 127) / 128))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


def load_lite0(path: Path = WEIGHTS) -> Lite0:
    """The trunk with the weights of a file, in float32 and evaluation mode.

    Raises:
        ValueError: the file is not a whole safetensors file of this network.
    """
    tensors, _ = read_tensors(path)
    network = Lite0()
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the EfficientNet-Lite0 trunk: reinstall slimdit") from error
    return network.eval().requires_grad_(False)


class InvertedResidual(nn.Module):
    """Widen, mix each channel in space, narrow; the input is added where it fits (arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = ConvNorm(inputs, middle) if expansion > 1 else None
        self.depthwise = ConvNorm(middle, middle, kernel, stride, groups=middle)
        self.project = ConvNorm(middle, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y = F.relu6(self.expand(x)) if self.expand is not None else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class ConvNorm(nn.Module):
    """A convolution with TensorFlow's "same" padding, and its batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=NORM_EPS)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, ceil(h / stride), ceil(w / stride))."""
        rows, columns = (same_padding(size, self.kernel, self.stride) for size in x.shape[2:])
        return self.norm(self.conv(F.pad(x, (*columns, *rows))))


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "same" padding before and after: the odd pixel goes after, so stride 2 is asymmetric."""
    missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2
