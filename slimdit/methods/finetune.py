"""Train a changed model a little further, so that it recovers what a method took: from images, its teacher, or both.

The teacher's output is a target for every noisy input (output distillation, arXiv 1503.02531); weights that were pruned
to zero stay zero. Alone on the unchanged model it is the control of every method that trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..context import Context, require
from ..training.student import StudentTraining, TrainingOptions, untrainable

if TYPE_CHECKING:
    from ..models.dit import DiT
    from ..pipeline import Pipeline



@dataclass(frozen=True)
class Finetune(TrainingOptions):
    """Train on. Budget, rate, images and checks are the options of all methods that train; 0 steps change nothing.

    Attributes:
        alpha: share of the teacher's output in the loss; 0 is DiT's own loss on the images.

    Raises:
        ValueError: a number is out of its range, or both steps and images are given.
    """

    alpha: float = 0.0

    def __post_init__(self) -> None:
        self.check("finetune")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"finetune: alpha must be in 0..1, not {self.alpha}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Train within the budget; killed and applied again with the same folder, it goes on where it was."""
        require(not (reason := untrainable("finetune", pipeline, context.teacher)), reason)
        if self.budget == 0:
            context.witness(steps=0, images=0)
            return pipeline
        chosen = self.rehearsed() if context.rehearsal else self
        return pipeline.replace(model=chosen.trained(pipeline, context))

    def trained(self, pipeline: Pipeline, context: Context) -> DiT:
        """The pipeline's model after training, in place."""
        from ..training.loop import teacher_loss

        training = StudentTraining(self, context.teacher, context.folder / "training", context.data, context.device,
                                   context.seed, context.rehearsal, context.report)
        training.begin(pipeline)
        loss = teacher_loss(pipeline.process, training.kept(training.expert), self.alpha, self.weighting)
        model, facts = training.train(pipeline, loss)
        context.witness(**facts)
        return model
