"""Learning without forgetting: the scores of old classes are held, on the images of the new task."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from ..data.scenarios import SCENARIOS
from ..fields import check_fields
from .base import Batch, ContinualMethod, MethodCard, TaskContext
from .distillation import distillation, teacher_logits, teacher_of
from .registry import register


@dataclass
class LwFConfig:
    """Configure [`LwF`].

    Args:
        strength: weight lambda of the distillation, at least 0; 0 is fine-tuning. Papers and code that multiply the loss
            by the squared temperature have a lambda that is that much smaller: 0.25 for 1.0 here.
        temperature: what scores are divided by before they are compared, above 0.

    Raises:
        ValueError: a setting out of its range.
    """

    strength: float = field(default=1.0, metadata={"help": "weight of the distillation; 0 is fine-tuning"})
    temperature: float = field(
        default=2.0, metadata={"help": "temperature of the distillation, which divides both scores"}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength={self.strength} is out of range: use a finite number >= 0.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} is out of range: use a finite number > 0, such as 2.")


@register
class LwF(ContinualMethod):
    """Learning without forgetting (Li and Hoiem, ECCV 2016).

    From the second task on, the teacher, which is the model as the task finds it, scores the same augmented images as the
    model in training, and the model is held to its scores of old classes:

        loss = cross-entropy + strength * H(softmax(teacher / T), softmax(z / T))

    There is no factor T^2. In the task-incremental scenario each old task has a softmax of its own, and their terms are
    added, as in the paper; in the others all old classes share one. The new classes' part of the head is not trained
    alone at first, which the paper calls helpful, but not crucial.

    The teacher predicts without dropout, and with prompts that each image selects for itself. It is a second copy of
    whatever learns, and another forward pass for each step. Nothing is remembered: a task's teacher is the result of the
    task before.

    Args:
        config, settings: see [`LwFConfig`].
    """

    name = "lwf"
    config_class = LwFConfig
    config: LwFConfig

    def __init__(self, config: LwFConfig | None = None, **settings: object) -> None:
        super().__init__(config, **settings)
        self._teacher: dict[str, Tensor] | None = None

    def describe(self) -> MethodCard:
        return MethodCard(
            title="Learning without forgetting (LwF)",
            sentence="from the second task on, the model was also held to the scores that it had given old classes before "
            "the task, on the images of the new one",
            limits=("Old classes are held on the images of new ones alone, which may show little of them.",),
            citation="Li and Hoiem, Learning without Forgetting, ECCV 2016",
        )

    def begin_task(self, context: TaskContext) -> None:
        self._teacher = teacher_of(context) if self.config.strength else None
        if self._teacher is not None and all(len(classes) == 1 for classes in _competing(context)):
            warnings.warn(
                f"LwF holds nothing in task {context.task + 1}: an old class that competes with no other has the same "
                "probability whatever its score is. Begin with two classes or more, or choose another method.",
                stacklevel=2,
            )

    def loss(self, context: TaskContext, batch: Batch, output: ModelOutput, losses: Tensor) -> Tensor:
        if self._teacher is None:
            return losses
        logits, taught = context.model.class_logits(output), teacher_logits(context, batch, self._teacher)
        terms = [
            distillation(logits[:, classes], taught[:, classes], self.config.temperature)
            for classes in _competing(context)
        ]
        return losses + self.config.strength * torch.stack(terms).sum(0)


def _competing(context: TaskContext) -> list[Sequence[int]]:
    """Return the old classes that share a softmax."""
    if SCENARIOS[context.stream.scenario].task_known:
        return [list(task.classes) for task in context.stream.tasks[: context.task]]
    return [context.stream.seen_classes(context.task - 1)]
