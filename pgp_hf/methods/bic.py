"""BiC: distillation and exemplars, and two numbers that undo the head's bias towards the classes of the last task."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers.utils.generic import ModelOutput

from ..data.scenarios import SCENARIOS
from ..heads.bias import BiasCorrection, fit_bias
from .base import Batch, Item, MethodCard, MethodState, TaskContext
from .distillation import distillation, teacher_logits
from .exemplars import ExemplarConfig, ExemplarMethod, with_exemplars
from .registry import register

if TYPE_CHECKING:
    from ..data.stream import TaskStream


@dataclass
class BiCConfig(ExemplarConfig):
    """Configure [`BiC`].

    Args:
        memory_size: number of images that are kept in all, the same number of each class seen so far; 2000 where
            `memory_per_class` is not given either.
        memory_per_class: number of images that are kept of each class, instead.
        memory_stores: see [`MemoryConfig`].
        temperature: what scores are divided by before they are compared with the teacher's, above 0.
        validation_share: share of a class's exemplars that is not trained on, but used to correct the bias, in (0, 1). It
            is rounded down to whole images, of which there must be one at least.

    Raises:
        ValueError: a setting out of its range.
    """

    temperature: float = field(
        default=2.0, metadata={"help": "temperature of the distillation, which divides both scores"}
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "share of a class's exemplars that is used to correct the bias alone"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} is out of range: use a finite number > 0, such as 2.")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share={self.validation_share} is outside (0, 1): it is a share, such as 0.1."
            )


@register
class BiC(ExemplarMethod):
    """Bias correction (Wu et al., CVPR 2019).

    From the second task on, with O the old classes and A all classes so far, a task is learned in two stages. First, the
    model learns from the task's images and exemplars of older classes, where it is held to its teacher's scores:

        loss = w * H(softmax(teacher / T), softmax(z / T)) + (1 - w) * cross-entropy        w = |O| / |A|

    The first term is over O, the second over A, whatever `train_mask` is; there is no factor T^2. The teacher is the model
    as the task found it, its scores corrected as below. Then the model stays as it is, and two numbers are fitted for the
    scores of the task's own classes: `alpha * z + beta` minimises the cross-entropy of validation images with a penalty of
    `0.1 * beta^2 / 2`. Predictions are corrected by the last task's pair alone.

    Validation images are as many of every class, old and new, drawn by the run's seed. They are not trained on in this
    task; the exemplars among them may be in the next. A known class of which new images come is one of the new classes.
    Where each image's task is known, the correction would change
    nothing, since only classes of one task compete: the task-incremental scenario is not BiC's.

    Args:
        config, settings: see [`BiCConfig`].

    Attributes:
        memory: the exemplars.
        validation: places of the images that correct the bias in the task in training, and their labels.
        bias: the correction in use; none while a task is learned.
    """

    name = "bic"
    scenarios = frozenset(name for name, scenario in SCENARIOS.items() if not scenario.task_known)
    config_class = BiCConfig
    config: BiCConfig

    def __init__(self, config: BiCConfig | None = None, **settings: object) -> None:
        super().__init__(config, **settings)
        self.bias = self._teachers = BiasCorrection()
        self.validation: list[tuple[list[int], int]] = []

    def describe(self) -> MethodCard:
        return MethodCard(
            title="Bias correction (BiC)",
            sentence="each task was trained on together with exemplars of older classes, whose scores were held by "
            "distillation; when it had ended, two numbers, fitted on images that were held out, corrected the scores of "
            "its classes",
            limits=self.limits(),
            citation="Wu et al., Large Scale Incremental Learning, CVPR 2019",
        )

    def training_stream(self, stream: TaskStream) -> TaskStream:
        """Return the stream.

        Raises:
            ValueError: some of its classes have too few exemplars or images for a validation image.
        """
        super().training_stream(stream)
        last = stream.num_tasks - 1  # it has the most classes, and the fewest exemplars of each
        if last > 0 and stream.has_train(last):
            self._held_out(stream, last)
        return stream

    def _held_out(self, stream: TaskStream, t: int) -> int:
        """Return how many images of each class are for validation in the 0-based task t, which is not the first."""
        old, share = len(stream.seen_classes(t - 1)), self.config.validation_share
        here = [stream.train(j).labels for j in range(t + 1) if stream.has_train(j)]
        kept = [
            label for label, rows in self.memory.kept.items() for j in rows[:, 0].tolist() if not stream.has_train(j)
        ]
        counts = np.bincount(np.concatenate([*here, np.array(kept, dtype=np.int64)]))
        fewest, quota = int(counts[counts > 0].min()), self.config.quota(old)
        if count := int(share * min(fewest, quota) + 1e-9):  # a product such as 0.29 * 100 falls just short
            return count
        needed = math.ceil(1 / share - 1e-9)
        if fewest < min(needed, quota):
            what, fix = f"{fewest} images of a class", f"choose classes with at least {needed} training images"
        else:
            name, factor = ("memory_per_class", 1) if self.config.memory_size is None else ("memory_size", old)
            allowed = f"{name}={getattr(self.config, name)}"
            what = f"{quota} exemplars of each of {old} classes (all that {allowed} allows)"
            fix = f"set {name} to at least {needed * factor}"
        more = ", or raise validation_share" if min(fewest, quota) > 1 else ""  # it is below 1
        raise ValueError(
            f"validation_share={share} of {what} is less than one image to correct the bias with: {fix}{more}."
        )

    def train_images(self, context: TaskContext, images: Dataset[Item]) -> Dataset[Item]:
        """Return the task's images and the exemplars, without those for validation."""
        self.validation = []
        if not context.task:
            return images
        count, own = self._held_out(context.stream, context.task), context.stream.train(context.task).labels
        places = {label: rows[:, :2].tolist() for label, rows in self.memory.kept.items()}
        for label in context.stream.tasks[context.task].classes:
            new = [[context.task, position] for position in np.flatnonzero(own == label).tolist()]
            places[label] = [*places.get(label, []), *new]
        trained: list[list[int]] = []
        for label, known in places.items():
            order = np.random.default_rng([context.seed, context.task, label]).permutation(len(known))
            self.validation += [(known[i], label) for i in order[:count]]
            trained += [known[i] for i in np.sort(order[count:])]
        positions = sorted(position for task, position in trained if task == context.task)
        return with_exemplars(
            context, Subset(images, positions), [place for place in trained if place[0] != context.task]
        )

    def begin_task(self, context: TaskContext) -> None:
        super().begin_task(context)
        self._teachers, self.bias = self.bias, BiasCorrection()

    def loss(self, context: TaskContext, batch: Batch, output: ModelOutput, losses: Tensor) -> Tensor:
        if self.teacher is None:
            return losses
        if not (old := self.older_classes(context)):
            return losses
        weight = len(old) / len(self.classes(context))
        taught = self._teachers(teacher_logits(context, batch, self.teacher))
        logits = context.model.class_logits(output)
        held = distillation(logits[:, old], taught[:, old], self.config.temperature)
        if (own := context.model.auxiliary_loss(output)) is not None:  # which keeps its weight
            held = held + own
        return weight * held + (1 - weight) * losses

    def end_task(self, context: TaskContext) -> None:
        """Correct the bias, and choose exemplars of the task's classes."""
        if context.task:
            places, labels = zip(*self.validation, strict=True)
            logits = context.observe(places).logits
            new, old = context.stream.tasks[context.task].classes, self.older_classes(context)
            self.bias = fit_bias(logits, torch.tensor(labels), new, old)
            if self.bias.alpha <= 0:
                warnings.warn(
                    f"BiC corrects task {context.task + 1} by alpha={self.bias.alpha:.3g}, which turns the order of its "
                    f"classes round: {len(labels)} validation images are too few, or the task has not been learned.",
                    stacklevel=2,
                )
        super().end_task(context)

    def adjust_logits(self, logits: Tensor, features: Tensor) -> Tensor:
        return self.bias(logits)

    def state(self) -> MethodState:
        tensors, values = super().state()
        alpha, beta, classes = self.bias
        return MethodState(tensors, {**values, "alpha": alpha, "beta": beta, "corrected": list(classes)})

    def load_state(self, state: MethodState) -> None:
        values = state.values
        try:
            bias = BiasCorrection(float(values["alpha"]), float(values["beta"]), tuple(map(int, values["corrected"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the state of BiC holds {values}: expected alpha, beta and corrected classes."
            ) from error
        super().load_state(state)
        self.bias = bias
