"""Inception-v3 as FID knows it: the TensorFlow graph of 2015, under the names of its PyTorch port's weights.

"Rethinking the Inception Architecture" (Szegedy et al., arXiv 1512.00567). It differs from torchvision's network in the
places that move FID: average pools do not count the padding, the last block pools by maximum, there are 1008 classes,
and images are resized as TensorFlow 1 did. Spatial features as in ADM (Dhariwal and Nichol, arXiv 2105.05233).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299  # height and width of the input, pixels
POOL, SPATIAL_CHANNELS, CLASSES = 2048, 7, 1008
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of that file; torch-fidelity's `weights-inception-2015-12-05-6726825d.pth` is the same."""


class InceptionV3(nn.Module):
    """The network from pixels to pool3, with the first channels of `mixed_6/conv` on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(128)
        self.Mixed_6c = MixedC(160)
        self.Mixed_6d = MixedC(160)
        self.Mixed_6e = MixedC(192)
        self.Mixed_7a = MixedD()
        self.Mixed_7b = MixedE(1280, pool=average_pool)
        self.Mixed_7c = MixedE(2048, pool=max_pool)
        self.fc = nn.Linear(POOL, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pool features (n, 2048), spatial features (n, 17 * 17 * 7) and logits without bias (n, 1008).

        Args:
            images: RGB (n, 3, height, width) on the scale 0..255, of any size.
        """
        x = (resize_tf1(images, SIDE) - 128) / 128
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # oneDNN's convolutions are a quarter faster so
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        # TensorFlow's mixed_6/conv is the first branch of this block. ADM flattens H, W, C.
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = x.mean((2, 3))
        return pool, spatial, pool @ self.fc.weight.T


def load_inception(path: Path) -> InceptionV3:
    """The network with the weights of the PyTorch port's file, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another checksum, or is not a state dict of exactly this network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the path of {Path(URL).name}, or 'download'")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path} has sha256 {digest[:8]}..., not {SHA256[:8]}... of the published weights, and only "
                         f"theirs give FID: get {URL}")
    network = InceptionV3()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except Exception as error:  # PyTorch names no closed set of what a bad file raises
        raise ValueError(f"{path} does not hold the weights of FID's Inception-v3: get {URL}") from error
    return network.eval().requires_grad_(False)


def download() -> Path:
    """The weights' file in PyTorch Hub's folder of checkpoints, fetched and checked by its hash if not there yet.

    Raises:
        ConnectionError: it cannot be fetched, or what came is not the file it should be.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, os.fspath(path), hash_prefix=SHA256)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"{URL} could not be fetched ({error}): give the path of a copy") from error
    return path


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's bilinear resize of (n, c, h, w) to squares: source = target * scale, without antialias.

    Along the rows first and in TensorFlow's own order of operations, so that it rounds as TensorFlow does.
    """
    height, width = images.shape[2:]
    left, right, along = source_positions(width, side, images)
    above, below, down = source_positions(height, side, images)
    rows = between(images[..., left], images[..., right], along)
    return between(rows[:, :, above], rows[:, :, below], down[:, None])


def between(a: Tensor, b: Tensor, way: Tensor) -> Tensor:
    """The values between a and b at `way`, 0..1."""
    return a + (b - a) * way


def source_positions(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every target pixel of an axis: the source pixel at or before it, the one after, and the way between, 0..1."""
    position = torch.arange(side, device=like.device, dtype=torch.float32) * (size / side)
    before = position.floor().long().clamp(max=size - 1)
    return before, (before + 1).clamp(max=size - 1), (position - before).to(like.dtype)


def wide(inputs: int, outputs: int, side: int) -> ConvNorm:
    """A 1 x side convolution that keeps the size."""
    return ConvNorm(inputs, outputs, (1, side), padding=(0, side // 2))


def tall(inputs: int, outputs: int, side: int) -> ConvNorm:
    """A side x 1 convolution that keeps the size."""
    return ConvNorm(inputs, outputs, (side, 1), padding=(side // 2, 0))


def average_pool(x: Tensor) -> Tensor:
    """TensorFlow's 3 x 3 average, which leaves the padding out of the count."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """The 3 x 3 maximum that the 2015 graph has in its last block."""
    return F.max_pool2d(x, 3, 1, 1)


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: int | tuple[int, int] = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, ...)."""
        return F.relu(self.bn(self.conv(x)))


class MixedA(nn.Module):
    """35 x 35: four branches joined by channel."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 64, 1)
        self.branch5x5_1 = ConvNorm(inputs, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, 35, 35) to (n, 224 + pooled, 35, 35)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average_pool(x))], 1)


class MixedB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, 35, 35) to (n, inputs + 480, 17, 17)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class MixedC(nn.Module):
    """17 x 17: 7 x 7 convolutions as pairs of 1 x 7 and 7 x 1."""

    def __init__(self, middle: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1 = ConvNorm(768, middle, 1)
        self.branch7x7_2 = wide(middle, middle, 7)
        self.branch7x7_3 = tall(middle, 192, 7)
        self.branch7x7dbl_1 = ConvNorm(768, middle, 1)
        self.branch7x7dbl_2 = tall(middle, middle, 7)
        self.branch7x7dbl_3 = wide(middle, middle, 7)
        self.branch7x7dbl_4 = tall(middle, middle, 7)
        self.branch7x7dbl_5 = wide(middle, 192, 7)
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 768, 17, 17) to the same shape."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average_pool(x))], 1)


class MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(768, 192, 1)
        self.branch7x7x3_2 = wide(192, 192, 7)
        self.branch7x7x3_3 = tall(192, 192, 7)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 768, 17, 17) to (n, 1280, 8, 8)."""
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class MixedE(nn.Module):
    """8 x 8: two of the branches fork."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 320, 1)
        self.branch3x3_1 = ConvNorm(inputs, 384, 1)
        self.branch3x3_2a = wide(384, 384, 3)
        self.branch3x3_2b = tall(384, 384, 3)
        self.branch3x3dbl_1 = ConvNorm(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = wide(384, 384, 3)
        self.branch3x3dbl_3b = tall(384, 384, 3)
        self.branch_pool = ConvNorm(inputs, 192, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, 8, 8) to (n, 2048, 8, 8)."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(self.pool(x))], 1)
