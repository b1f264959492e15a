"""Teach a model to answer at once what its teacher answers with guidance: the second pass of every step is saved.

"On Distillation of Guided Diffusion Models" (arXiv 2210.03142), its first stage at one scale of guidance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..context import Context, require
from ..training.student import StudentTraining, TrainingOptions, untrainable

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.dit import DiT
    from ..pipeline import Pipeline
    from ..sampling.settings import Sampling
    from ..training.calibration import Call


@dataclass(frozen=True)
class DistillGuidance(TrainingOptions):
    """Train guidance into the model, and sample without it from then on.

    The scale, channels and interval of guidance are those the pipeline samples with: choose them before, with
    `reduce_steps`. Budget, rate, images and checks are the options of all methods that train; 0 steps change nothing.

    Attributes:
        variance: weight of the learned variance beside the predicted noise in the distance from the teacher.

    Raises:
        ValueError: a number is out of its range, or both steps and images are given.
    """

    variance: float = 0.1

    def __post_init__(self) -> None:
        self.check("distill_guidance")
        if not 0 <= self.variance < float("inf"):
            raise ValueError(f"distill_guidance: variance must be 0 or more, not {self.variance}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Train within the budget; killed and applied again with the same folder, it goes on where it was."""
        from ..sampling.solvers import evaluations

        if self.budget == 0:
            context.witness(steps=0, images=0)
            return pipeline
        require(pipeline.sampling.guidance != 1 and pipeline.model.config.label_dropout,
                "distill_guidance saves guidance's second pass, and this pipeline samples without (guidance 1): leave "
                "distill_guidance out")
        require(not (reason := untrainable("distill_guidance", pipeline, context.teacher)), reason)
        chosen = self.rehearsed() if context.rehearsal else self
        model, facts = chosen.trained(pipeline, context)
        changed = pipeline.replace(model=model, sampling=unguided(pipeline.sampling))
        before, after = (evaluations(one.process, one.sampling) for one in (pipeline, changed))
        context.witness(guidance=pipeline.sampling.guidance, evaluations_before=before, evaluations_after=after,
                        **facts)
        return changed

    def trained(self, pipeline: Pipeline, context: Context) -> tuple[DiT, dict[str, Any]]:
        """The pipeline's model after training, in place, and what a witness says of it."""
        from ..training.distillation import guided, weighed_distance
        from ..training.loop import teacher_loss

        teacher = context.teacher.replace(sampling=pipeline.sampling)
        training = StudentTraining(self, teacher, context.folder / "training", context.data, context.device,
                                   context.seed, context.rehearsal, context.report)
        training.begin(pipeline)
        config = pipeline.model.config
        loss = teacher_loss(pipeline.process, training.kept(guided(training.expert, pipeline.sampling, config)), 1.0,
                            self.weighting, weighed_distance(config.channels, self.variance))
        return training.train(pipeline, loss, held_out=guided_calls(training))


def guided_calls(training: StudentTraining) -> tuple[list[Call], list[Tensor]]:
    """Deployed calls of the guided teacher's that are not trained on, their labelled half, and its guided answers."""
    from ..training.calibration import outputs
    from ..training.distillation import guided, labelled

    config = training.teacher.model.config
    calls = [labelled(call, config.classes) for call in training.calls()]
    return calls, outputs(guided(training.plain, training.teacher.sampling, config), calls)


def unguided(sampling: Sampling) -> Sampling:
    """The same steps in one pass each."""
    return replace(sampling, guidance=1.0, guidance_channels=None, guidance_interval=(0, 1000))
