"""Small things that several tests need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimdit.formats import save
from slimdit.models.dit import DiT, uniform
from slimdit.pipeline import Pipeline
from slimdit.sampling.settings import Sampling


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved DiT of 12 x 12 pixels whose blocks are not idle, as training leaves them."""
    torch.manual_seed(0)
    model = DiT(uniform(depth=2, width=32, heads=2, patch=2, input_size=(12, 12), channels=1, classes=10))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(Pipeline(model.eval(), sampling=Sampling(steps=6, guidance=1.5), name="tiny"), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_protocol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protocol that takes seconds: few images, nothing compiled."""
    path = tmp_path_factory.mktemp("protocols") / "tiny.toml"
    path.write_text("""
name = "tiny"
images = 16
batch = 8
latency_batches = [1]
rounds = 2
resamples = 20
timeout_s = 300.0
margin = {fd_lite0 = 1000.0}
sampling = {solver = "ddim", steps = 6}
runtime = {dtype = "float32", compile = false}
""")
    return path
