"""Keeping experts in even use while they train: a bias that needs no loss (arXiv 2408.15664), or the auxiliary loss.

Only `token_choice` has first choices to even out; which of the two acts is for each block's `ExpertsConfig` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.dit import DiT
from ..models.experts import Router, TokenExperts

RATE = 1e-3  # of a bias, per step: arXiv 2408.15664
WEIGHT = 1e-2  # of the auxiliary loss: arXiv 2101.03961


class Balance:
    """What the routers of a model scored in the last forward pass, and what is done about it."""

    def __init__(self, model: DiT) -> None:
        layers = [module for module in model.modules() if isinstance(module, TokenExperts)]
        self.lossy = [layer.router for layer in layers if layer.config.balance == "loss"]
        self.biased = [layer.router for layer in layers if layer.config.balance == "bias"]
        self.seen: dict[Router, tuple[Tensor, Tensor]] = {}

    def see(self, router: nn.Module, inputs: tuple[Tensor, Tensor], scores: Tensor) -> None:
        """Keep the scores (batch, tokens, experts), and whether images are unlabelled (batch,)."""
        assert isinstance(router, Router)
        self.seen[router] = scores, inputs[1]

    def loss(self) -> Tensor | float:
        """The weighted auxiliary loss of the last forward pass: 0 where no block has one.

        Switch Transformers' equation 4: experts times the sum over them of the share of tokens whose first choice they
        are, times their mean probability.
        """
        total: Tensor | float = 0.0
        for router in self.lossy:
            scores, unlabelled = self.seen[router]
            first = first_choices(router, scores, unlabelled).flatten(0, 1)
            total = total + WEIGHT * scores.shape[-1] * (first.mean(0) * scores.softmax(-1).mean((0, 1))).sum()
        return total

    @torch.no_grad()
    def shift(self, gathered: Callable[[Tensor], Tensor]) -> None:
        """Lower the bias of whoever was first choice too often in the last forward pass, and raise the others'.

        Args:
            gathered: sums a tensor over processes.
        """
        for router in self.biased:
            scores, unlabelled = self.seen[router]
            first = first_choices(router, scores, unlabelled).sum(1)  # (batch, experts)
            half = nn.functional.one_hot(unlabelled.long(), 2).to(first)
            load = gathered(half.t() @ first)  # (2, experts)
            router.bias.add_(RATE * (load.mean(1, keepdim=True) - load).sign())


def first_choices(router: Router, scores: Tensor, unlabelled: Tensor) -> Tensor:
    """1 where an expert is a token's first choice, else 0: (batch, tokens, experts)."""
    biased = scores.detach() + router.bias[unlabelled.long()][:, None]
    return nn.functional.one_hot(biased.argmax(-1), scores.shape[-1]).to(scores.dtype)


@contextmanager
def balancing(model: DiT) -> Iterator[Balance]:
    """While inside, what is given sees what the routers score."""
    balance = Balance(model)
    handles = [router.register_forward_hook(balance.see) for router in (*balance.lossy, *balance.biased)]
    try:
        yield balance
    finally:
        for handle in handles:
            handle.remove()
