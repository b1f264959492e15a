"""The diffusion loss at the deployed timesteps, and how it changes with weights and with whole blocks.

What a weight is worth differs between timesteps (Diff-Pruning, arXiv 2305.10924), and a model that was trained well has
a gradient near zero on average over them: so gradients come batch by batch, each of one part of the timesteps, for a
criterion to average their sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..models.dit import DiT
from ..pipeline import Pipeline
from ..sampling.process import NoiseProcess
from ..sampling.seeds import seeded
from ..sampling.solvers import timesteps
from .data import ImageData
from .loop import Batch, require_fit
from .samples import own_samples


def loss_batches(pipeline: Pipeline, data: ImageData | None = None, *, images: int = 16, batch: int = 8,
                 draws: int = 8, seed: int = 0) -> list[Batch]:
    """Batches on which to ask for the diffusion loss, at the deployed timesteps and with labels dropped as in training.

    Args:
        data: where the clean images come from; None samples them with the pipeline, of ids that nobody evaluates.
        draws: how often each image is noised: once in each of so many equal parts of the deployed timesteps.

    Raises:
        ValueError: the data does not fit the model.
    """
    config, visited = pipeline.model.config, torch.tensor(timesteps(pipeline.process, pipeline.sampling))
    generator = seeded(seed, "loss batches")
    data = own_samples(pipeline, images, seed=seed) if data is None else data
    require_fit(data, config)
    clean, labels = data.batch(torch.randperm(len(data), generator=generator)[torch.arange(images) % len(data)],
                               generator)
    batches = []
    for first in range(0, images, batch):
        some, named = clean[first:first + batch], labels[first:first + batch]
        for draw in range(draws):
            place = (draw + torch.rand(len(some), generator=generator)) / draws * len(visited)
            dropped = torch.rand(len(some), generator=generator) < config.label_dropout
            batches.append(Batch(some, torch.where(dropped, config.classes, named),
                                 torch.randn(some.shape, generator=generator),
                                 visited[place.long().clamp(max=len(visited) - 1)]).to(pipeline.device))
    return batches


def noise_loss(model: DiT, process: NoiseProcess, batch: Batch) -> Tensor:
    """Mean squared error of the predicted noise, the variance left out: a scalar."""
    noisy = process.add_noise(batch.clean, batch.noise, batch.t)
    eps = model(noisy, batch.t, batch.labels)[:, :batch.clean.shape[1]]
    return (eps - batch.noise).square().mean()


def loss_gradients(model: DiT, process: NoiseProcess, batches: Sequence[Batch],
                   tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Gradients of the loss with respect to some of the model's parameters, batch after batch; nothing is changed."""
    for batch in batches:
        with torch.enable_grad():
            loss = noise_loss(model, process, batch)
        yield torch.autograd.grad(loss, tensors)


@contextmanager
def gated(model: DiT, gates: Tensor) -> Iterator[None]:
    """While inside, block i changes its tokens by gates[i] times what it does: 1 is the block, 0 is none."""
    with ExitStack() as hooks:
        for block, gate in zip(model.blocks, gates, strict=True):
            def weigh(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, gate: Tensor = gate) -> Tensor:
                return inputs[0] + gate * (output - inputs[0])

            hooks.callback(block.register_forward_hook(weigh).remove)
        yield


def learned_scores(model: DiT, process: NoiseProcess, batches: Sequence[Batch], keep: int, *, steps: int = 200,
                   rate: float = 0.1, seed: int = 0) -> Tensor:
    """A score per block, learned so that the blocks with the `keep` highest leave the smallest loss: (blocks,), on CPU.

    After TinyFusion (arXiv 2412.01199): every step samples which blocks stay (Gumbel noise on the scores, the highest
    stay) and moves the scores along the straight-through gradient, its largest so far being a move of `rate`. The
    weights stay as they are, where TinyFusion trains an update of them along with the scores: what is found is a small
    loss now, which is not the same as a good start for training.
    """
    generator = seeded(seed, "learned scores")
    device = batches[0].clean.device
    scores, steepest = torch.zeros(len(model.blocks), requires_grad=True), 1e-12
    for step in range(steps):
        uniform = torch.rand(len(scores), generator=generator).clamp(1e-9, 1 - 1e-7)
        noisy = scores - torch.log(-torch.log(uniform))
        stay = noisy.topk(keep).indices
        soft = torch.sigmoid(noisy - noisy[stay[-1]].detach())
        hard = torch.zeros_like(scores).index_fill(0, stay, 1.0)
        with gated(model, (hard + soft - soft.detach()).to(device)):
            (slope,) = torch.autograd.grad(noise_loss(model, process, batches[step % len(batches)]), scores)
        with torch.no_grad():
            steepest = max(steepest, slope.norm().item())
            scores -= rate * slope / steepest
    return scores.detach()
