"""Computed costs against the literature's table of DiT sizes and against PyTorch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slimdit.metrics.cost import macs, parameters
from slimdit.models.dit import BlockConfig, DiT, DiTConfig, preset, uniform

GMACS = {"XS/2": "1.415", "XS/4": "0.320", "S/2": "6.056", "S/4": "1.413", "B/2": "23.0", "L/2": "80.7",
         "XL/2": "118.6"}
MILLIONS_200_CLASSES = {"XS/2": "7.49", "XS/4": "7.48", "S/2": "32.66", "S/4": "32.64"}
MILLIONS_1000_CLASSES = {"L/2": "458", "XL/2": "675"}  # as published, for ImageNet


@pytest.mark.parametrize("name", GMACS)
def test_macs_of_every_preset(name):
    printed = GMACS[name]
    total = macs(preset(name, classes=200)).total / 1e9
    assert f"{total:.{len(printed.partition('.')[2])}f}" == printed


@pytest.mark.parametrize("name", MILLIONS_200_CLASSES)
def test_parameters(name):
    assert f"{parameters(preset(name, classes=200)) / 1e6:.2f}" == MILLIONS_200_CLASSES[name]


@pytest.mark.parametrize("name", MILLIONS_1000_CLASSES)
def test_parameters_as_published(name):
    assert f"{parameters(preset(name, classes=1000)) / 1e6:.0f}" == MILLIONS_1000_CLASSES[name]


UNEVEN = DiTConfig(input_size=(8, 24), channels=3, classes=5, patch=4, width=24,
                   blocks=(BlockConfig(2, 8, 10), BlockConfig(3, 4, 96), BlockConfig(1, 24, 7)), learn_sigma=False)

KINDS = DiTConfig(input_size=(8, 24), channels=3, classes=5, patch=4, width=24, blocks=(
    BlockConfig(4, 6, 8, conv=3), BlockConfig(4, 6, 8, kv_heads=2), BlockConfig(4, 6, 8, kv_heads=1, conv=5),
    BlockConfig(4, 6, 8, "mediated", mediators=(1, 3)),
    BlockConfig(4, 6, 8, "mediated", mediators=(2, 2), kv_heads=2, conv=3),
    BlockConfig(4, 6, 8, "focused"), BlockConfig(4, 5, 8, "focused", kv_heads=1, conv=5)))


@pytest.mark.parametrize("config", [
    *(preset(name, classes=200) for name in GMACS),
    uniform(depth=3, width=32, heads=4, patch=2, input_size=(16, 16), channels=1, classes=10),
    UNEVEN,
    *(replace(KINDS, blocks=(block,)) for block in KINDS.blocks),
], ids=[*GMACS, "pixels", "uneven", *(f"attention {number}" for number in range(len(KINDS.blocks)))])
@pytest.mark.parametrize("form", ["fused", "explicit"])
def test_macs_are_what_pytorch_counts(config, form):
    with torch.device("meta"):
        model = DiT(config)
        model.use_attention(form)
        x = torch.empty(2, config.channels, *config.input_size)
        with FlopCounterMode(display=False) as counter:
            model(x, torch.empty(2), torch.zeros(2, dtype=torch.int64))
    images = 2
    assert counter.get_total_flops() == images * macs(config).flops
