"""iCaRL: classes are told apart by the means of a few examples of each, on features that distillation has held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from ..heads.nearest_mean import nearest_mean_scores, unit_means
from .base import Batch, MethodCard, MethodState, TaskContext
from .distillation import teacher_logits
from .exemplars import ExemplarConfig, ExemplarMethod
from .registry import register


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, new: Sequence[int], old: Sequence[int] = (), taught: Tensor | None = None
) -> Tensor:
    """Return each image's binary cross-entropy, summed over classes, `(B,)`.

    Args:
        logits: `(B, C)`.
        labels: `(B,)`; an image of an old class is none of the new ones.
        new: classes whose targets are the labels.
        old: classes whose targets are the teacher's probabilities, for every image.
        taught: the teacher's scores, `(B, C)`; None without old classes.
    """
    targets = F.one_hot(labels, logits.shape[-1]).float()[:, list(new)]
    if taught is not None:
        targets = torch.cat([taught[:, list(old)].float().sigmoid(), targets], 1)
    scores = logits.float()[:, [*old, *new]]
    return F.binary_cross_entropy_with_logits(scores, targets, reduction="none").sum(-1)


@register
class ICaRL(ExemplarMethod):
    """Incremental classifier and representation learning (Rebuffi et al., CVPR 2017).

    Each task is trained on together with exemplars of all older classes. Every class has an output that tells it from
    all others; those of new classes learn the labels, those of old classes the probabilities that the teacher, the model
    as the task found it, gives the same view of each image:

        loss = sum over old classes of BCE(z_c, sigmoid(teacher_c)) + sum over new classes of BCE(z_c, [c = y])

    A known class of which new images come is one of the new classes. The loss takes the place of the cross-entropy, so that `train_mask` and label smoothing do not matter; a loss of the model's
    own, such as L2P's pull term, stays. It is a sum over classes, as in the paper's Algorithm 3; the released code takes
    the mean, and goes with a learning rate that is as many times as large.

    An image is predicted to be of the class whose exemplars' mean is nearest to it in what the head reads, all at length
    1; scores are cosines. The means are computed when a task ends. While a task is learned, they would lag behind the
    features, and the trained head predicts.

    Exemplars are chosen by herding without replacement, of unaugmented images. A memory of 0 images would leave nothing
    to predict by, and is refused.

    Args:
        config, settings: see [`ExemplarConfig`].

    Attributes:
        memory: the exemplars.
        means: mean direction of each class's exemplars, `(C, d)`; None while a task is learned.
    """

    name = "icarl"

    def __init__(self, config: ExemplarConfig | None = None, **settings: object) -> None:
        super().__init__(config, **settings)
        self.means: Tensor | None = None

    def describe(self) -> MethodCard:
        return MethodCard(
            title="iCaRL",
            sentence="each task was trained on together with exemplars of older classes, whose outputs were held by "
            "distillation; an image is predicted to be of the class whose exemplars' mean is nearest",
            limits=(*self.limits(), "Scores are cosines to the exemplars' means, and not calibrated probabilities."),
            citation="Rebuffi et al., iCaRL: Incremental Classifier and Representation Learning, CVPR 2017",
        )

    def begin_task(self, context: TaskContext) -> None:
        super().begin_task(context)
        self.means = None

    def loss(self, context: TaskContext, batch: Batch, output: ModelOutput, losses: Tensor) -> Tensor:
        new, old, taught = context.stream.tasks[context.task].classes, list[int](), None
        if self.teacher is not None:
            old = self.older_classes(context)
            taught = teacher_logits(context, batch, self.teacher)
        found = binary_cross_entropy(context.model.class_logits(output), batch.labels, new, old, taught)
        own = context.model.auxiliary_loss(output)
        return found if own is None else found + own

    def end_task(self, context: TaskContext) -> None:
        """Choose exemplars of the task's classes, and compute the means of all classes by the features as they are now."""
        super().end_task(context)
        features = context.observe(self.memory.places()).features
        self.means = unit_means(features, self.memory.labels(), len(context.model.class_names or ()))

    def adjust_logits(self, logits: Tensor, features: Tensor) -> Tensor:
        return logits if self.means is None else nearest_mean_scores(features, self.means)

    def state(self) -> MethodState:
        tensors, values = super().state()
        return MethodState(tensors if self.means is None else {**tensors, "means": self.means}, values)

    def load_state(self, state: MethodState) -> None:
        tensors = dict(state.tensors)
        means = tensors.pop("means", None)
        if means is not None and (means.ndim != 2 or not means.is_floating_point()):
            raise ValueError(f"the state of iCaRL has means of shape {tuple(means.shape)}: expected (classes, width).")
        super().load_state(MethodState(tensors, state.values))
        self.means = means
