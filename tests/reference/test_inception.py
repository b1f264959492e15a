"""Inception-v3 as FID knows it is torch-fidelity's, layer by layer, with random weights and batch norms."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimdit.metrics import inception

from .fidelity import torch_fidelity

RELATIVE = 1e-4


@pytest.fixture(scope="module")
def ours() -> inception.InceptionV3:
    """Random weights that keep the signal's size, and norms that move it: a wrong epsilon or bias would show."""
    torch.manual_seed(0)
    network = inception.InceptionV3().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                      (module.running_mean, -0.5, 0.5), (module.running_var, 0.01, 2)):
                values.uniform_(low, high)
    return network


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory) -> nn.Module:
    """Their network, which takes our weights by the same names."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(ours.state_dict(), path)
    return torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Two uint8 images, (2, 3, 60, 80)."""
    return torch.from_numpy(np.random.default_rng(2).integers(0, 256, (2, 3, 60, 80), dtype=np.uint8))


def traced(network: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """What every convolution with its norm, and every block, puts out; and what the network does."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, inputs, output: seen.__setitem__(name, output.clone())  # theirs works in place

    layers = {name: module for name, module in network.named_modules() if hasattr(module, "bn") or "." not in name}
    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items() if name]
    with torch.inference_mode():
        outputs = network(images)
    for hook in hooks:
        hook.remove()
    return seen, outputs


def apart(a: Tensor, b: Tensor) -> float:
    """The difference of two outputs, relative to their size."""
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


def test_every_layer_is_theirs(ours, theirs, images):
    found, (pool, _, logits) = traced(ours, images.float())
    expected, outputs = traced(theirs, images)
    same = found.keys() & expected.keys()
    assert len(same) == 94 + 11  # convolutions with a norm, and mixed blocks
    assert found.keys() ^ expected.keys() == {"MaxPool_1", "MaxPool_2", "AvgPool"}  # plain calls here
    distances = {name: apart(found[name], expected[name]) for name in same}
    assert {name: distance for name, distance in distances.items() if not distance < RELATIVE} == {}
    assert pool.std() > 0.1 and logits.std() > 0.01
    assert apart(pool, outputs[0]) < RELATIVE and apart(logits, outputs[1]) < RELATIVE
    assert logits.shape == (2, 1008)


def test_the_comparison_sees_each_of_fids_peculiarities(ours, theirs, images, monkeypatch):
    """What torchvision's network does instead is far beyond the tolerance."""
    expected = traced(theirs, images)[1][0]

    def pooled() -> float:
        with torch.inference_mode():
            return apart(ours(images.float())[0], expected)

    with monkeypatch.context() as patch:
        patch.setattr(ours.Mixed_7c, "pool", inception.average_pool)
        assert pooled() > 10 * RELATIVE
    with monkeypatch.context() as patch:
        patch.setattr(inception, "average_pool", lambda x: nn.functional.avg_pool2d(x, 3, 1, 1))
        assert pooled() > 10 * RELATIVE
    with monkeypatch.context() as patch:
        patch.setattr(inception, "resize_tf1", lambda x, side: nn.functional.interpolate(
            x, (side, side), mode="bilinear", align_corners=False))
        assert pooled() > 10 * RELATIVE


def test_the_spatial_features_are_seven_channels_of_mixed_6_conv(ours, theirs, images):
    """TensorFlow counts the mixed blocks from `mixed`, 35 x 35: `mixed_6` is the seventh, here Mixed_6d."""
    blocks = [name for name, _ in theirs.named_children() if name.startswith("Mixed_")]
    assert blocks[6] == "Mixed_6d"
    tap = traced(theirs, images)[0][f"{blocks[6]}.branch1x1"]
    assert tap.shape == (2, 192, 17, 17)
    with torch.inference_mode():
        spatial = ours(images.float())[1]
    assert spatial.shape == (2, 2023) and tap[:, :7].std() > 0.1
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (3, 11, 2), (16, 16, 6)):
        place = (row * 17 + column) * 7 + channel  # H, W, C
        assert spatial[:, place].tolist() == pytest.approx(tap[:, channel, row, column].tolist(), rel=1e-3, abs=1e-4)
    assert apart(spatial, torch.stack([image[:7].permute(1, 2, 0).reshape(-1) for image in tap])) < RELATIVE


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (256, 256), (299, 299), (512, 300), (7, 1)])
def test_the_resize_is_theirs_to_the_bit(size):
    resize = torch_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (1, 3, *size)).astype(np.float32))
    assert torch.equal(inception.resize_tf1(images, 299), resize(images, size=(299, 299), align_corners=False))
