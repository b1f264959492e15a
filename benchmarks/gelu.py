"""GELU in a compiled training step: the compiler's tanh against the same function written with a sigmoid.

    python -m benchmarks.gelu

`ratio` is how many times faster a step with the sigmoid form (b) is than one with the tanh form (a); slimdit uses
the sigmoid where it compiles (`slimdit/models/feedforward.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimdit.models.dit import DiT, uniform
from slimdit.models.feedforward import MLP
from slimdit.sampling.process import NoiseProcess
from slimdit.training.loop import Batch, denoising_loss

from .result import compare, settle, show


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step with two forms of GELU.")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = vars(parser.parse_args())
    compiled = not options.pop("eager")
    show("gelu", [measure(compiled=compiled, **options)])


def measure(*, batch: int, width: int, depth: int, rounds: int, precision: str, compiled: bool) -> dict[str, Any]:
    """Time both forms on the same weights and the same batch of 32x32 images in patches of 4."""
    config = uniform(depth=depth, width=width, heads=4, patch=4, input_size=(32, 32), channels=1, classes=10)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    sigmoid = DiT(config)
    tanh = with_tanh(DiT(config))
    tanh.load_state_dict(sigmoid.state_dict())
    images, noise = torch.randn(2, batch, 1, 32, 32, device=device).unbind(0)
    seen = Batch(images.clamp(-1, 1), torch.randint(0, 10, (batch,), device=device), noise,
                 torch.randint(0, 1000, (batch,), device=device))
    dtype = getattr(torch, precision)
    times = compare(training_step(tanh.to(device), seen, dtype, compiled),
                    training_step(sigmoid.to(device), seen, dtype, compiled), rounds)
    return {"batch": batch, "width": width, "depth": depth, "precision": precision, "compiled": compiled, **times}


def training_step(model: DiT, batch: Batch, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    """One step of the training loop as a call: loss, gradients, AdamW."""
    loss = denoising_loss(NoiseProcess())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    forward = torch.compile(model) if compiled else model
    device = batch.clean.device.type

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = loss(forward, batch).mean()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_tanh(model: DiT) -> DiT:
    """The model with PyTorch's own GELU in every block, compiled or not."""
    for block in model.blocks:
        block.mlp = TanhMLP(block.mlp.fc1.in_features, block.mlp.fc1.out_features)
    return model


class TanhMLP(MLP):
    """The feed-forward layer with the tanh left for the compiler to vectorise."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


if __name__ == "__main__":
    settle()
    main()
