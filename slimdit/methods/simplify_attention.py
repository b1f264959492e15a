"""Replace the softmax attention of some blocks by a cheaper kind that begins with the trained weights.

Mediators (arXiv 2312.08874, 2408.05710), focused linear attention (2308.00442), shared keys and values (2305.13245,
1911.02150), narrower heads. Each new attention is regressed on what the old one answers while sampling, as its weights
and then training end to end are what conversion lives on ("LiT", arXiv 2501.12976).
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from ..context import Context, require

if TYPE_CHECKING:
    from ..models.attention import Attention
    from ..models.dit import BlockConfig, DiT, DiTConfig
    from ..pipeline import Pipeline
    from ..training.calibration import Call
    from ..training.data import ImageData
    from ..training.regression import Answers

KINDS = ("mediated", "focused", "grouped", "multi_query", "shallow", "softmax")
GROUPS = 2  # of heads that share keys and values, where grouped attention is not told
HELD_OUT = 8  # images whose calls nothing is regressed on
BATCH, RATE, ALPHA, EMA = 64, 1e-4, 0.9, 0.999  # of distillation; finetune has every option


@dataclass(frozen=True)
class SimplifyAttention:
    """Give some blocks another attention.

    Attributes:
        kind: `"mediated"`, softmax by way of a few mediators; `"focused"`, linear in the tokens; `"grouped"` and
            `"multi_query"`, softmax of heads that share keys and values; `"shallow"`, softmax of narrower heads;
            `"softmax"`, as it is, which with `conv` is the control of all others with it.
        blocks: share of the blocks to change, rounded up: those whose new attention errs least; or their numbers.
        mediators: how many at most; they form a grid as nearly of the tokens' shape as goes.
        groups: heads of keys and values, each shared by a group of heads: of `"grouped"` (2 if left out), and of
            `"mediated"` and `"focused"` if wanted.
        inner: share of the features of a head that `"shallow"` keeps.
        conv: side of a depth-wise convolution of the values, 3 or 5, which starts at zero; None is none.
        regression: steps that each new attention is regressed for, on its own; 0 takes it as inherited, and so does
            regression that leaves it further off on other images.
        distill: steps that the whole model is then trained for, mostly towards the teacher's outputs (noise and
            variance); 0 is none. On the run's own images, or where it has none, on images that the teacher makes.
        images: sampled images to regress on.
        samples: images that the teacher makes for distillation.
        seed: of everything random here.

    Raises:
        ValueError: an option is unknown, out of its range, or does not go with the kind.
    """

    kind: Literal["mediated", "focused", "grouped", "multi_query", "shallow", "softmax"] = "mediated"
    blocks: float | tuple[int, ...] = 0.5
    mediators: int = 16
    groups: int | None = None
    inner: float = 0.5
    conv: int | None = None
    regression: int = 200
    distill: int = 0
    images: int = 32
    samples: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"simplify_attention: kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if isinstance(self.blocks, tuple):
            if not self.blocks or len(set(self.blocks)) < len(self.blocks):
                raise ValueError("simplify_attention: blocks must name each block once, and at least one, not "
                                 f"{list(self.blocks)}")
        elif isinstance(self.blocks, bool) or not 0 <= self.blocks <= 1:
            raise ValueError("simplify_attention: blocks is a share, 0 up to 1, or a list of blocks, not "
                             f"{self.blocks!r}")
        for name, least in (("mediators", 1), ("regression", 0), ("distill", 0), ("images", 1), ("samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"simplify_attention: {name} must be at least {least}, not {getattr(self, name)}")
        if self.groups is not None and (self.kind not in ("grouped", "mediated", "focused") or self.groups < 1):
            raise ValueError("simplify_attention: groups is a number above 0 that goes with grouped, mediated and "
                             f"focused attention, not {self.groups} with {self.kind}")
        if isinstance(self.inner, bool) or not 0 < self.inner < 1:
            raise ValueError("simplify_attention: inner is the share of a head's features that stays, above 0 and "
                             f"below 1, not {self.inner!r}")
        if self.conv not in (None, 3, 5):
            raise ValueError(f"simplify_attention: conv is the side of the convolution, 3 or 5, not {self.conv!r}")
        if self.kind == "softmax" and self.conv is None:
            raise ValueError("simplify_attention: softmax is what the model has: give it conv, or name another kind")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Make every candidate's new attention, keep those that err least, and train as asked."""
        from ..models.surgery import put_attention, weight_bytes
        from ..training.calibration import output_error, outputs

        model, before = pipeline.model, weight_bytes(pipeline.model)
        method = self.rehearsed() if context.rehearsal else self
        count, candidates = method.candidates(model)
        if not count:
            context.witness(kind=self.kind, blocks=[])
            return pipeline
        held_out = method.calls(pipeline, HELD_OUT, self.seed + 1)
        expected = outputs(model, held_out)
        converted = method.converted(pipeline, candidates, held_out, context)
        chosen = sorted(sorted(converted, key=lambda number: converted[number].error)[:count])
        for number in chosen:
            put_attention(model, number, converted[number].config, converted[number].attention)
        facts = {"output_error": rounded(output_error(model, held_out, expected))}
        if self.distill:
            model = method.distilled(pipeline, context)
            facts |= {"steps": method.distill,
                      "output_error_distilled": rounded(output_error(model, held_out, expected))}
        context.witness(kind=self.kind, blocks=chosen, bytes_before=before, bytes_after=weight_bytes(model),
                        errors_inherited={str(number): found.inherited for number, found in converted.items()},
                        errors={str(number): found.error for number, found in converted.items()}, **facts)
        return pipeline.replace(model=model)

    def rehearsed(self) -> SimplifyAttention:
        """The same in a step or two, on a few images of the tiny twin, whose heads are too narrow for most shares."""
        return replace(self, inner=0.5, regression=min(2, self.regression), distill=min(2, self.distill), images=2,
                       samples=4)

    def candidates(self, model: DiT) -> tuple[int, list[int]]:
        """How many blocks are to change, and which may."""
        from ..models.attention import is_plain

        packed, depth = len(model.config.linears), len(model.config.blocks)
        require(not packed, f"simplify_attention needs float weights, and {packed} layers are packed: put it before "
                            "quantize")
        places: Any = model.blocks
        plain = [number for number, block in enumerate(places) if is_plain(block.attn)]
        count = len(self.blocks) if isinstance(self.blocks, tuple) else math.ceil(self.blocks * depth)
        if isinstance(self.blocks, tuple):
            for number in self.blocks:
                require(0 <= number < depth, f"simplify_attention: there is no block {number}: this model's are "
                                             f"0..{depth - 1}")
                require(number in plain, f"simplify_attention: block {number} no longer has plain softmax attention: "
                                         "choose others, or change it once")
        require(count <= len(plain), f"simplify_attention would change {count} blocks, and {len(plain)} of {depth} "
                                     "have plain softmax attention: ask for fewer")
        for number in plain if count else []:
            self.described(model.config, number)  # refused before anything is computed
        return count, sorted(self.blocks) if isinstance(self.blocks, tuple) else plain

    def described(self, config: DiTConfig, number: int) -> BlockConfig:
        """A block's config with its new attention."""
        block = replace(config.blocks[number], conv=self.conv)
        groups = {"grouped": self.groups or GROUPS, "multi_query": 1}.get(self.kind, self.groups)
        if groups is not None:
            require(block.heads % groups == 0 and groups < block.heads,
                    f"simplify_attention: {groups} groups do not divide the {block.heads} heads of block {number}: use "
                    f"one of {', '.join(map(str, divisors(block.heads)))}")
            block = replace(block, kv_heads=groups)
        if self.kind == "mediated":
            require(2 * self.mediators < config.tokens,
                    f"simplify_attention: {self.mediators} mediators for {config.tokens} tokens save nothing: use "
                    f"fewer than {-(-config.tokens // 2)}")
            return replace(block, attention="mediated", mediators=mediator_grid(config.grid, self.mediators))
        if self.kind == "shallow":
            narrow = round(self.inner * block.head_dim)
            require(0 < narrow < block.head_dim, f"simplify_attention: {self.inner:g} of the {block.head_dim} features "
                                                 f"of a head is {narrow}: use another inner")
            return replace(block, head_dim=narrow)
        return replace(block, attention="focused" if self.kind == "focused" else "softmax")

    def calls(self, pipeline: Pipeline, images: int, seed: int) -> list[Call]:
        """Deployed calls of so many images."""
        from ..training.calibration import deployed_calls

        return deployed_calls(pipeline, images=min(images, self.images), seed=seed)

    def converted(self, pipeline: Pipeline, candidates: list[int], held_out: list[Call],
                  context: Context) -> dict[int, Converted]:
        """New attention for each candidate, regressed on calls of other images than those it is judged on."""
        from ..training.regression import attention_answers, mean_error, regress

        model, calls, found = pipeline.model, self.calls(pipeline, self.images, self.seed), {}
        for number in candidates:
            answers, judge = (attention_answers(model, some, number) for some in (calls, held_out))
            config = self.described(model.config, number)
            begun = self.inherited(model, number, config, answers)
            attention, inherited = deepcopy(begun), mean_error(begun, judge)
            regress(attention, answers, steps=self.regression, seed=self.seed)
            error = mean_error(attention, judge)
            if error > inherited:  # too few images, or too short a budget for its rate
                attention, error = begun, inherited
            found[number] = Converted(config, attention, rounded(inherited), rounded(error))
            context.report(f"simplify_attention: block {number}: error {found[number].inherited} as inherited, "
                           f"{found[number].error} after {self.regression} steps")
        return found

    def inherited(self, model: DiT, number: int, config: BlockConfig, answers: Answers) -> Attention:
        """The new attention as it begins."""
        import torch

        from ..models.inherited import inherited, narrowed

        place: Any = model.blocks[number]
        if self.kind != "shallow":
            return inherited(place.attn, config, model.config.grid)
        given = answers.x.flatten(0, 1).double()
        return narrowed(place.attn, config, model.config.grid, given.mean(0), torch.cov(given.T, correction=0))

    def distilled(self, pipeline: Pipeline, context: Context) -> DiT:
        """The pipeline's model after training towards the teacher, in place; killed and begun again, it goes on."""
        from ..models.surgery import pruned_weights, zero_weights
        from ..training.loop import TrainConfig, in_precision, teacher_loss, train, uses_bf16

        model, teacher = pipeline.model, context.teacher
        config = TrainConfig(steps=self.distill, batch=4 if context.rehearsal else BATCH, learning_rate=RATE,
                             schedule="cosine", ema=EMA, seed=self.seed, checkpoint_every=250)
        # A folder of its own for every beginning: what began otherwise is not gone on with.
        beginning = repr((self, pipeline.fingerprint(), teacher.fingerprint()))
        folder = context.folder / f"training-{sha256(beginning.encode()).hexdigest()[:12]}"
        pruned = pruned_weights(model)
        expert = in_precision(teacher.model, uses_bf16(config.precision, context.device))
        return train(model, pipeline.process, self.images_of(context), config, folder, resume=True,
                     device=context.device, loss=teacher_loss(pipeline.process, expert, ALPHA),
                     project=lambda trained: zero_weights(trained, pruned),
                     report=lambda now: context.report(f"simplify_attention: step {now.step}/{now.steps}: "
                                                       f"loss {now.loss:.4f}"))

    def images_of(self, context: Context) -> ImageData:
        """The run's images, or the teacher's."""
        from ..training.calibration import FIRST_ID
        from ..training.samples import own_samples

        if context.data is not None:
            return context.data
        return own_samples(context.teacher, self.samples, first=FIRST_ID + self.images, seed=self.seed,
                           progress=lambda done: context.report(f"{done}/{self.samples} samples of the teacher"))


@dataclass(frozen=True)
class Converted:
    """A block's new attention, and its error on held-out calls: squared, gated, relative to the old one's answers."""

    config: BlockConfig
    attention: Attention
    inherited: float
    error: float


def mediator_grid(grid: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and columns of at most so many mediators, whose cells of a token grid are as nearly square as goes."""
    def unequal(shape: tuple[int, int]) -> tuple[float, int]:
        rows, columns = shape
        return abs(math.log(grid[0] * columns / (grid[1] * rows))), -rows * columns

    shapes = [(rows, min(grid[1], most // rows)) for rows in range(1, min(grid[0], most) + 1)]
    full = max(rows * columns for rows, columns in shapes)
    return min((shape for shape in shapes if 4 * shape[0] * shape[1] >= 3 * full), key=unequal)


def divisors(heads: int) -> list[int]:
    """Numbers of groups that heads can be shared out to."""
    return [groups for groups in range(1, heads) if heads % groups == 0]


def rounded(value: float) -> float:
    """Three digits, which is all that a record needs."""
    return float(f"{value:.3g}")
