"""Build a smaller student out of the trained model and let the teacher train it.

The student inherits weights: with fewer blocks or narrower ones the rest stay, with a larger patch all blocks do. It
then learns the teacher's outputs, the images, and early on the teacher's tokens (arXiv 1503.02531, arXiv 2412.01199).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..context import Context, require
from ..training.student import StudentTraining, TrainingOptions, untrainable

if TYPE_CHECKING:
    from ..models.dit import BlockConfig, DiT, DiTConfig
    from ..pipeline import Pipeline

Criterion = Literal["taylor", "activation", "magnitude"]
Init = Literal["inherit", "random"]
Teacher = Literal["original", "before"]
MULTIPLE = 16  # an MLP wider than this keeps a multiple of it, as kernels like
CALIBRATED = 16  # images that units and heads are ranked on
REHEARSED = 2  # of them on the twin, where no number means anything


@dataclass(frozen=True)
class Distill(TrainingOptions):
    """Train a student made of this model. Budget, rate, images and checks are the options of all methods that train.

    Attributes:
        blocks: how many blocks the student has: the first, the last and those evenly between; None keeps all.
        patch: side of its patches, a multiple of the model's: 4 from 2, 8 from 4; None keeps it.
        macs: instead of blocks and mlp, the share to keep of the blocks' multiply-accumulates per token: the fewest
            blocks that have as many, their MLPs cut to what is left.
        mlp, heads: share of hidden units and of attention heads that stay in every block, the most important ones.
        criterion: what ranks them, as in `prune_width`.
        init: `"inherit"` takes the model's weights; `"random"` none, which is the control.
        teacher: who teaches: the `"original"` model of the recipe, or the model `"before"` this method, which a distill
            ahead of it made: a teaching assistant (arXiv 1902.03393).
        alpha: share of the teacher's output in the loss; 0 is DiT's own loss on the images.
        variance: weight of the learned variance beside the predicted noise in the distance from the teacher.
        features: weight of the distance from the teacher's tokens at the first step; it falls in a line.
        features_until: share of the steps after which it is 0.
        sigmas: tokens further from the mean than so many standard deviations are left out of it.

    Raises:
        ValueError: a number is out of its range, an option is unknown, or features are asked for without the teacher.
    """

    learning_rate: float = 2e-4
    blocks: int | None = None
    patch: int | None = None
    macs: float | None = None
    mlp: float = 1.0
    heads: float = 1.0
    criterion: Criterion = "taylor"
    init: Init = "inherit"
    teacher: Teacher = "original"
    alpha: float = 0.9
    variance: float = 0.1
    features: float = 0.01
    features_until: float = 0.6
    sigmas: float = 2.0

    def __post_init__(self) -> None:
        self.check("distill")
        for name, kind in (("criterion", Criterion), ("init", Init), ("teacher", Teacher)):
            self.check_choice("distill", name, kind)
        for name in ("blocks", "patch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ValueError(f"distill: {name} must be at least 1, not {value!r}")
        for name in ("mlp", "heads", "features_until"):
            share = getattr(self, name)
            if isinstance(share, bool) or not 0 < share <= 1:
                raise ValueError(f"distill: {name} is a share, above 0 up to 1, not {share!r}")
        if self.macs is not None and (isinstance(self.macs, bool) or not 0 < self.macs <= 1):
            raise ValueError(f"distill: macs is a share, above 0 up to 1, not {self.macs!r}")
        if self.macs is not None and (self.blocks, self.mlp) != (None, 1):
            raise ValueError("distill: macs finds blocks and mlp itself: give either it or them")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"distill: alpha must be in 0..1, not {self.alpha}")
        for name in ("variance", "features"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"distill: {name} must be 0 or more, not {getattr(self, name)}")
        if not self.sigmas > 0:
            raise ValueError(f"distill: sigmas must be above 0, not {self.sigmas}")
        if self.alpha == 0 and self.features:
            raise ValueError("distill: alpha = 0 asks the teacher nothing, and features are its tokens: set features = "
                             "0 with it")
        if self.repeat and self.features:
            raise ValueError("distill: repeat keeps the teacher's answers, and not its tokens, which features need: "
                             "set features = 0 with it")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Build the student and train it; killed and applied again with the same folder, it goes on where it was."""
        teacher = context.teacher if self.teacher == "original" else pipeline.copy()
        require(not (reason := untrainable("distill", pipeline, teacher)), reason)
        chosen = self.sized(pipeline.model.config)
        chosen = chosen.rehearsed() if context.rehearsal else chosen
        training = StudentTraining(chosen, teacher, context.folder / "training", context.data, context.device,
                                   context.seed, context.rehearsal, context.report)
        before = pipeline.model.config
        if chosen.budget:
            training.begin(pipeline)
        student = pipeline.replace(model=chosen.student(pipeline, context, training.own_seed))
        facts: dict[str, Any] = {"steps": 0, "images": 0}
        if chosen.budget:
            model, facts = chosen.taught(student, training)
            student = student.replace(model=model)
        context.witness(**changes(before, student.model.config), init=self.init, teacher=self.teacher, **facts)
        return student

    def sized(self, config: DiTConfig) -> Distill:
        """The method with the blocks and the share of their MLPs that `macs` comes to in a model.

        Raises:
            Refused: what is beside the MLPs takes more.
        """
        from ..models.surgery import block_macs, even_blocks

        if self.macs is None:
            return self
        blocks = config.blocks
        kept = [blocks[number] for number in even_blocks(len(blocks), math.ceil(len(blocks) * self.macs))]

        def cost(some: Sequence[BlockConfig], mlp: int) -> int:
            units, heads = [block.mlp_width * mlp for block in some], [block.heads for block in some]
            return block_macs(replace(config, blocks=tuple(some)), units, heads)

        least = cost(kept, 0)
        share = (self.macs * cost(blocks, 1) - least) / (cost(kept, 1) - least)
        require(share > 0, f"distill: {len(kept)} blocks without their MLPs have more than {self.macs} of the model's "
                           "multiply-accumulates: ask for macs above that, or give blocks, mlp and heads")
        return replace(self, macs=None, blocks=len(kept), mlp=min(share, 1.0))

    def student(self, pipeline: Pipeline, context: Context, seed: int) -> DiT:
        """The smaller model, made of the pipeline's own.

        Raises:
            Refused: it would not be smaller, or a part cannot be cut.
        """
        from ..models.surgery import enlarge_patch, even_blocks, keep_blocks

        model, config = pipeline.model, pipeline.model.config
        depth = len(config.blocks)
        blocks, patch = self.blocks or depth, self.patch or config.patch
        if context.rehearsal:
            patch = min(patch, *config.input_size)  # the twin's images are small
        require(blocks <= depth, f"distill makes a student of the model's own blocks, and {blocks} are more than its "
                                 f"{depth}: ask for fewer")
        require(patch % config.patch == 0 and not any(side % patch for side in config.input_size),
                f"distill: a patch of {patch} is no multiple of the model's {config.patch}, or does not divide its "
                f"input of {config.input_size[0]} x {config.input_size[1]}: choose one that does both")
        self.narrow(pipeline, context, seed)  # first: units are ranked in the model that is trained
        if blocks < depth:
            keep_blocks(model, even_blocks(depth, blocks))
        if patch > config.patch:
            enlarge_patch(model, patch)
        if self.init == "random":
            forget(model, seed)
        return model

    def narrow(self, pipeline: Pipeline, context: Context, seed: int) -> None:
        """Cut the least important units and heads out of every block."""
        from ..models.surgery import keep_heads, keep_units
        from ..training.importance import best, branches, importance, uncuttable

        model = pipeline.model
        for name, share, cut, multiple in (("mlp", self.mlp, keep_units, MULTIPLE),
                                           ("attn", self.heads, keep_heads, 1)):
            if share == 1:
                continue
            require(not (reason := uncuttable(model, name)), f"distill {reason}")
            ranked = branches(model, name)
            scores = importance(self.criterion, ranked, pipeline, context.data, seed=seed,
                                images=REHEARSED if context.rehearsal else CALIBRATED)
            grains = [multiple if branch.parts > multiple else 1 for branch in ranked]
            for number, kept in enumerate(best(scores, [share] * len(ranked), grains, "block")):
                cut(model, number, kept)

    def taught(self, student: Pipeline, training: StudentTraining) -> tuple[DiT, dict[str, Any]]:
        """The student's model after training, and what a witness says of it."""
        from contextlib import ExitStack

        from ..training.distillation import Features, unmatched, weighed_distance, with_features
        from ..training.loop import teacher_loss

        config, teacher = student.model.config, training.teacher.model
        loss = teacher_loss(student.process, training.kept(training.expert), self.alpha, self.weighting,
                            weighed_distance(config.channels, self.variance))
        with ExitStack() as stack:
            if self.features:
                require(not (reason := unmatched(config, teacher.config)),
                        f"distill: {reason}: set features = 0, or take another teacher")
                features = Features(student.model, teacher)
                stack.enter_context(features.watched())
                loss = with_features(loss, features, self.features, self.features_until * self.budget, self.sigmas)
            return training.train(student, loss)


def forget(model: DiT, seed: int) -> None:
    """Give a model the weights that one of its structure starts its first training with."""
    import torch

    from ..models.dit import DiT
    from ..sampling.seeds import seeded

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, "student").initial_seed())
        model.load_state_dict(DiT(model.config).state_dict())


def changes(before: DiTConfig, after: DiTConfig) -> dict[str, Any]:
    """What the student has where the model had more."""
    def told(config: DiTConfig) -> dict[str, Any]:
        return {"blocks": len(config.blocks), "patch": config.patch,
                "mlp_widths": [block.mlp_width for block in config.blocks],
                "heads": [block.heads for block in config.blocks]}

    return {"model_before": told(before), "student": told(after)}
