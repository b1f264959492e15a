"""Put a mixture of experts in the place of MLPs: split the trained one for less compute, or copy it for more capacity.

Splitting a trained MLP by which hidden units work together is "MoEfication" (arXiv 2110.01786), copying it "Sparse
Upcycling" (arXiv 2212.05055); shared units that every token uses are arXiv 2401.06066. All is fitted in closed form to
the pipeline's own sampling; `finetune` after it trains experts and routers together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..context import Context, require

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.dit import DiT
    from ..models.experts_config import ExpertsConfig
    from ..models.feedforward import MLP
    from ..pipeline import Pipeline
    from ..training.experts import Given

Mode = Literal["partition", "upcycle"]
RouterKind = Literal["expert_choice", "token_choice", "timestep"]
Grouping = Literal["activations", "weights"]
Balance = Literal["none", "bias", "loss"]


@dataclass(frozen=True)
class SparseExperts:
    """Share out hidden units among experts that not every token uses.

    Attributes:
        mode: `"partition"` splits the hidden units among the experts: as many parameters, less compute. `"upcycle"`
            makes every expert a copy: as much compute in the experts, more parameters, and the same answers as before
            until training tells the copies apart.
        experts: how many.
        active: how many of them a token uses on average; left out, half of them where it may use several, else one.
        shared: share of the hidden units that every token uses, those that move it most: rounded up so that the others
            divide. Above 0 in a partition, where they also give what an absent expert does on average.
        router: `"expert_choice"`: experts take the tokens of an image that they would move farthest, by a
            least-squares guess. `"token_choice"`: a token goes to the expert of the nearest prototype, a mean of the
            tokens that it would move farthest (upcycle: of a cluster). `"timestep"`: by timestep, for whole images,
            the experts that move them farthest (upcycle: one after the other). Images without a label are routed by
            weights of their own.
        capacity: room in the experts over what their tokens need; below 1, tokens are left out. What is above 1 costs.
        grouping: hidden units that become an expert of a partition work on the same tokens (`"activations"`) or have
            similar weights (`"weights"`).
        balance: what evens out how often token_choice's experts are first choice, so that fewer tokens are passed on.
            `"bias"` shifts scores, now on the calibrated tokens and with every step of later training. `"loss"` adds
            the auxiliary loss to that training: the control, for it pulls at what is learned.
        bins: of the timesteps, of the timestep router; as many as experts in an upcycle.
        blocks: numbers of the blocks to change, `[]` for none; left out, all of them.
        images: how many sampled images to calibrate on.
        seed: of their noise.

    Raises:
        ValueError: an option is unknown or out of its range, or two do not go together.
    """

    mode: Mode = "partition"
    experts: int = 8
    active: int | None = None
    shared: float = 0.25
    router: RouterKind = "expert_choice"
    capacity: float = 1.0
    grouping: Grouping = "activations"
    balance: Balance = "none"
    bins: int = 4
    blocks: tuple[int, ...] | None = None
    images: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("router", RouterKind), ("grouping", Grouping), ("balance", Balance)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"sparse_experts: {name} {getattr(self, name)!r} is unknown; use one of "
                                 f"{', '.join(get_args(kind))}")
        if isinstance(self.shared, bool) or not 0 <= self.shared < 1:
            raise ValueError(f"sparse_experts: shared must be in 0..1 (1 excluded), not {self.shared!r}")
        if self.images < 1:
            raise ValueError(f"sparse_experts: images must be at least 1, not {self.images}")
        if self.mode == "partition" and not self.shared:
            raise ValueError("sparse_experts: a partition needs shared units, which give what absent experts do on "
                             "average: use a shared share above 0")
        if self.mode == "upcycle" and self.router == "expert_choice":
            raise ValueError("sparse_experts: expert_choice takes some tokens twice and leaves others out, and copies "
                             'must each be used by one: upcycle with router = "token_choice" or "timestep"')
        if self.mode == "upcycle" and self.active not in (None, 1):
            raise ValueError(f"sparse_experts: {self.active} active copies compute more than the MLP: leave active out "
                             "when upcycling")
        self.config(0)  # refuses what no experts can be

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Fit experts and routers to the tokens of deployed calls, block by block, and put them in place."""
        from ..files import write_text
        from ..report.charts import routing_svg
        from ..training.calibration import deployed_calls, output_error, outputs
        from ..training.experts import mlp_inputs
        from ..training.routing import report

        model = pipeline.model
        blocks = self.chosen_blocks(model)
        if not blocks:
            context.witness(blocks=0)
            return pipeline
        shared = {number: self.shared_units(model.config.blocks[number].mlp_width) for number in blocks}
        macs_kept = self.require_saving(model, shared)
        calls = deployed_calls(pipeline, images=2 if context.rehearsal else self.images, seed=self.seed)
        expected, given = outputs(model, calls), mlp_inputs(model, calls, blocks)
        for number in blocks:
            context.report(f"sparse_experts: block {number}")
            self.convert(model, number, shared[number], given[number])
        routing = report(model, calls)
        if not context.rehearsal:
            write_text(context.folder / "routing.svg", routing_svg(routing))
        context.witness(mode=self.mode, router=self.router, blocks=len(blocks), experts=self.experts,
                        active=self.actives, shared_units=list(shared.values()), mlp_macs_kept=round(macs_kept, 4),
                        output_error=float(f"{output_error(model, calls, expected):.3g}"), routing=routing)
        return pipeline.replace(model=model)

    @property
    def actives(self) -> int:
        """Experts that a token uses."""
        if self.active is not None:
            return self.active
        return 1 if self.mode == "upcycle" or self.router == "token_choice" else max(1, self.experts // 2)

    def config(self, shared: int) -> ExpertsConfig:
        """The structure beside so many shared units."""
        from ..models.experts_config import ExpertsConfig

        bins = 1 if self.router != "timestep" else self.experts if self.mode == "upcycle" else self.bins
        return ExpertsConfig(self.experts, shared, self.router, self.actives, self.capacity, self.balance, bins)

    def chosen_blocks(self, model: DiT) -> list[int]:
        """The blocks to change, refused where their MLPs cannot be experts."""
        from ..models.feedforward import MLP

        packed, depth = len(model.config.linears), len(model.blocks)
        require(not packed, f"sparse_experts needs float weights, and {packed} layers are packed: put it before "
                            "quantize")
        chosen = sorted(set(range(depth) if self.blocks is None else self.blocks))
        wrong = [number for number in chosen if not 0 <= number < depth]
        require(not wrong, f"sparse_experts: block {''.join(map(str, wrong[:1]))} is not one of 0..{depth - 1}: name "
                           "others, or leave blocks out for all")
        blocks: Any = model.blocks
        done = [number for number in chosen if type(blocks[number].mlp) is not MLP]
        require(not done, f"sparse_experts: {len(done)} blocks have experts already: name others in blocks, or choose "
                          "the experts once")
        return chosen

    def shared_units(self, mlp_width: int) -> int:
        """How many hidden units every token uses, of a block with so many."""
        routed = int(mlp_width * (1 - self.shared) + 1e-6)
        each = routed // self.experts if self.mode == "partition" else routed
        require(each, f"sparse_experts: {self.experts} experts are more than the {routed} hidden units beside the "
                      "shared ones: use fewer experts")
        return mlp_width - each * (self.experts if self.mode == "partition" else 1)

    def require_saving(self, model: DiT, shared: dict[int, int]) -> float:
        """Refuse experts that compute more than the MLP, or less than a copy must; what is computed over the MLPs'."""
        tokens, width = model.config.tokens, model.config.width
        before, experts, routers = 0, 0, 0
        for number, units in shared.items():
            dense, config = model.config.blocks[number].mlp_width, self.config(units)
            stored = dense if self.mode == "partition" else units + self.experts * (dense - units)
            in_experts, in_router = config.macs(stored, width, tokens)
            before, experts, routers = before + 2 * tokens * width * dense, experts + in_experts, routers + in_router
        if self.mode == "upcycle" and self.router == "token_choice":
            require(tokens % self.experts == 0, f"sparse_experts: {self.experts} copies cannot take equally many of "
                                                f"{tokens} tokens: use a number of experts that divides them")
        if self.mode == "upcycle":
            require(experts <= before, f"sparse_experts: copies with room for {self.capacity:g} of the tokens compute "
                                       "more than the MLP: use a capacity of at most 1")
        else:
            require(experts + routers < before, f"sparse_experts: {self.actives} of {self.experts} experts with "
                                                f"capacity {self.capacity:g} compute no less than the MLP: use fewer "
                                                "active ones, or less capacity")
        return (experts + routers) / before

    def convert(self, model: DiT, number: int, shared: int, given: Given) -> None:
        """Turn a block's MLP into experts, and set their router."""
        import torch

        from ..models.surgery import put_experts
        from ..training.experts import answers, contributions

        block: Any = model.blocks[number]
        mlp: MLP = block.mlp
        moves = contributions(mlp, given.x)
        order = moves.square().mean((0, 1)).argsort(descending=True, stable=True).tolist()
        common, others = sorted(order[:shared]), sorted(order[shared:])
        if self.mode == "upcycle":
            put_experts(model, number, self.config(shared), common, [others] * self.experts)
            self.set_router(block.mlp, given, None)
            return
        groups = self.grouped(mlp, others, moves)
        parts = [answers(mlp, group, given.x) for group in groups]
        absent = torch.stack([part.mean((0, 1)) for part in parts])
        sizes = torch.stack([(part - mean).norm(dim=-1) for part, mean in zip(parts, absent)], -1)
        put_experts(model, number, self.config(shared), common, groups, absent)
        self.set_router(block.mlp, given, sizes)

    def grouped(self, mlp: MLP, units: list[int], moves: Tensor) -> list[list[int]]:
        """The units of each expert: those that move the same tokens (or the same images), or read them alike."""
        import torch

        from ..training.experts import balanced_clusters

        if self.grouping == "weights":
            features = mlp.fc1.weight.detach()[units]
        else:
            sizes = moves[..., units].abs()
            features = (sizes.mean(1) if self.router == "timestep" else sizes.flatten(0, 1)).t()
        clusters = balanced_clusters(torch.nn.functional.normalize(features), self.experts, self.seed)
        return [[units[place] for place in cluster] for cluster in clusters]

    def set_router(self, layer: Any, given: Given, sizes: Tensor | None) -> None:
        """Fit the router; `sizes`, (images, tokens, experts), is how far each expert moves each token."""
        import torch

        from ..training.experts import balanced_bias, fitted_scores, prototypes

        with torch.no_grad():
            if self.router == "timestep":
                layer.table.copy_(timestep_table(layer.config, given, sizes))
            elif self.router == "expert_choice":
                assert sizes is not None
                layer.router.weight.copy_(fitted_scores(given, sizes))
            else:
                weight, bias = prototypes(given, sizes, self.experts, self.seed)
                layer.router.weight.copy_(weight)
                layer.router.bias.copy_(balanced_bias(given, weight, bias) if self.balance == "bias" else bias)


def timestep_table(config: ExpertsConfig, given: Given, sizes: Tensor | None) -> Tensor:
    """Which experts to use in each bin, (2, bins, active): those that move its images farthest, or each in its turn."""
    import torch

    from ..models.experts import timestep_bin

    if sizes is None:
        return torch.arange(config.bins).view(1, -1, 1).expand(2, -1, -1)
    energy, bins, rows = sizes.square().mean(1), timestep_bin(given.t, config.bins), []
    for half in given.halves():
        for number in range(config.bins):
            inside = half & (bins == number)
            mean = energy[inside if inside.any() else half].mean(0)
            rows.append(mean.topk(config.active).indices.sort().values)
    return torch.stack(rows).view(2, config.bins, config.active)
