"""A mixture of experts in the place of a block's MLP: hidden units that not every token is put through.

Experts take tokens ("expert choice", arXiv 2202.09368), tokens take experts (arXiv 2101.03961), or the timestep decides
for whole images. Labelled and unlabelled images are told apart by the null class: guidance subtracts the answers to
one from the answers to the other, and their tokens differ too much for one router (arXiv 2510.24711). Every shape is
fixed by the config and nothing waits for the device, so that the layers compile.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .experts_config import ExpertsConfig
from .feedforward import MLP, gelu

TIMESTEPS = 1000


def feed_forward(width: int, mlp_width: int, config: ExpertsConfig | None) -> nn.Module:
    """The MLP of a block, or its experts."""
    if config is None:
        return MLP(width, mlp_width)
    return (TimestepExperts if config.router == "timestep" else TokenExperts)(width, mlp_width, config)


class Experts(nn.Module):
    """What both kinds of experts have: `shared`, an MLP for every token where there is one, and `experts`."""

    def __init__(self, width: int, mlp_width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = MLP(width, config.shared) if config.shared else None

    def forward(self, x: Tensor, t: Tensor, unlabelled: Tensor) -> Tensor:
        """(batch, tokens, width), timesteps (batch,) and whether the label is the null class (batch,) to x's shape."""
        raise NotImplementedError

    def uses(self, x: Tensor, t: Tensor, unlabelled: Tensor) -> Tensor:
        """Which experts each token uses: bool, (batch, tokens, experts)."""
        raise NotImplementedError


class TokenExperts(Experts):
    """Experts among which a router shares out the tokens of each image, whatever else is in the batch.

    An expert's answer counts in full, with gate 1; the gate's gradient is that of the score, so that the router learns
    whose answers help ("straight through", arXiv 1308.3432).
    """

    def __init__(self, width: int, mlp_width: int, config: ExpertsConfig) -> None:
        super().__init__(width, mlp_width, config)
        units = config.units(mlp_width)
        self.router = Router(width, config.count)
        self.experts = nn.ModuleList(MLP(width, units) for _ in range(config.count))

    def forward(self, x: Tensor, t: Tensor, unlabelled: Tensor) -> Tensor:
        """See `Experts`; the timesteps are not looked at."""
        index, gate = self.route(x, unlabelled)
        total = torch.zeros_like(x) if self.shared is None else self.shared(x)
        for number, expert in enumerate(self.experts):
            places = index[:, number, :, None].expand(-1, -1, x.shape[-1])
            answer = expert(x.gather(1, places)) * gate[:, number, :, None]
            total = total.scatter_add(1, places, answer.to(total.dtype))
        return total

    def route(self, x: Tensor, unlabelled: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens each expert takes and with what gate, 0 in an empty slot: (batch, experts, slots) both."""
        scores = self.router(x, unlabelled)
        biased = (scores + self.router.bias[unlabelled.long()][:, None]).detach()
        choose = by_experts if self.config.router == "expert_choice" else by_tokens
        index, filled = choose(biased, self.config.slots(x.shape[1]))
        score = scores.transpose(1, 2).gather(2, index)
        return index, (1 + (score - score.detach())) * filled

    def uses(self, x: Tensor, t: Tensor, unlabelled: Tensor) -> Tensor:
        """See `Experts`."""
        index, gate = self.route(x, unlabelled)
        used = gate.new_zeros(*index.shape[:2], x.shape[1]).scatter_add(2, index, gate.detach())
        return used.transpose(1, 2) > 0


class Router(nn.Module):
    """A linear score per expert of what tells a token from its image's mean, with other weights for unlabelled images.

    The room that experts have is per image: without the mean, which moves with the timestep, an image's tokens spread
    over them. `weight` is (2, experts, width) and learns; `bias`, (2, experts), only shifts who is chosen, so that it
    can balance the experts without a say in the gradient (arXiv 2408.15664). Row 0 is for labelled images, row 1 for
    the others.
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, experts, width))
        self.bias = nn.Parameter(torch.zeros(2, experts), requires_grad=False)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, unlabelled: Tensor) -> Tensor:
        """(batch, tokens, width) and bool (batch,) to (batch, tokens, experts), without the bias."""
        return (x - x.mean(1, keepdim=True)) @ self.weight[unlabelled.long()].transpose(1, 2)


def by_experts(scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Each expert's highest-scored tokens: (batch, tokens, experts) to (batch, experts, slots), every one filled.

    Expert choice, arXiv 2202.09368, within an image.
    """
    index = scores.transpose(1, 2).topk(slots).indices
    return index, torch.ones_like(index, dtype=torch.bool)


def by_tokens(scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Each token's highest-scored expert that has room: (batch, tokens, experts) to (batch, experts, slots) and filled.

    Experts take their tokens one after the other: of those left, the ones that prefer it most clearly to the experts
    still to come (the last goes by its scores); also some that do not, where those could not seat them all. So a token
    is left out only where there are more tokens than seats.
    """
    batch, tokens, experts = scores.shape
    gone = scores.new_zeros(batch, tokens)  # -inf where a token was taken
    rank = torch.arange(slots, device=scores.device)
    chosen = []
    for expert in range(experts):
        own, last = scores[..., expert], expert == experts - 1
        rivals = own.amin(1, keepdim=True) if last else scores[..., expert + 1:].amax(-1)
        margin, index = (own - rivals + gone).topk(slots)
        left = (gone == 0).sum(1, keepdim=True)
        filled = (margin > -torch.inf) & ((margin >= 0) | (rank < left - slots * (experts - 1 - expert)))
        gone = gone.scatter_add(1, index, torch.where(filled, -torch.inf, 0.0).to(gone.dtype))
        chosen.append((index, filled))
    return torch.stack([index for index, _ in chosen], 1), torch.stack([filled for _, filled in chosen], 1)


class TimestepExperts(Experts):
    """Experts of which each image uses those that `table`, (2, bins, active), names for its timestep.

    Row 0 of the table is for labelled images, row 1 for the others. Images of one batch may differ in their timesteps:
    the weights are gathered for each, and so are not linear layers that could be packed.
    """

    table: Tensor

    def __init__(self, width: int, mlp_width: int, config: ExpertsConfig) -> None:
        super().__init__(width, mlp_width, config)
        self.experts = StackedMLPs(width, config.units(mlp_width), config.count)
        turns = torch.arange(2 * config.bins * config.active) % config.count
        self.register_buffer("table", turns.view(2, config.bins, config.active))

    def forward(self, x: Tensor, t: Tensor, unlabelled: Tensor) -> Tensor:
        """See `Experts`."""
        routed = self.experts(x, self.chosen(t, unlabelled))
        return routed if self.shared is None else self.shared(x) + routed

    def chosen(self, t: Tensor, unlabelled: Tensor) -> Tensor:
        """The experts that each image uses: (batch, active)."""
        return self.table[unlabelled.long(), timestep_bin(t, self.config.bins)]

    def uses(self, x: Tensor, t: Tensor, unlabelled: Tensor) -> Tensor:
        """See `Experts`."""
        chosen = nn.functional.one_hot(self.chosen(t, unlabelled), self.config.count).sum(1) > 0
        return chosen[:, None].expand(-1, x.shape[1], -1)


class StackedMLPs(nn.Module):
    """MLPs of one size, their weights stacked: fc1 is (count, units, width), and so is fc2, transposed."""

    def __init__(self, width: int, units: int, count: int) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(count, units, width))
        self.fc1_bias = nn.Parameter(torch.zeros(count, units))
        self.fc2 = nn.Parameter(torch.empty(count, units, width))
        self.fc2_bias = nn.Parameter(torch.zeros(count, width))
        for weights in (self.fc1, self.fc2):
            for one in weights:
                nn.init.xavier_uniform_(one)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The summed answers of each image's MLPs: (batch, tokens, width) and (batch, active) to x's shape."""
        first, second = self.fc1[chosen].flatten(1, 2), self.fc2[chosen].flatten(1, 2)  # (batch, active units, width)
        hidden = gelu(torch.baddbmm(self.fc1_bias[chosen].flatten(1)[:, None], x, first.transpose(1, 2)))
        return torch.baddbmm(self.fc2_bias[chosen].sum(1)[:, None], hidden, second)


def timestep_bin(t: Tensor, bins: int) -> Tensor:
    """Which of so many equal parts of the 1000 timesteps each lies in, as integers."""
    return (t * bins / TIMESTEPS).floor().clamp(0, bins - 1).long()
