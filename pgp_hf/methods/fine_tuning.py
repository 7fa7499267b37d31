"""Fine-tuning, the lower bound: each task is learned as it comes. And the upper bound: all tasks are learned as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import ContinualMethod, MethodCard
from .registry import register

if TYPE_CHECKING:
    from ..data.stream import TaskStream


@register
class FineTuning(ContinualMethod):
    """Sequential fine-tuning, the lower bound of the field's tables: cross-entropy over the task's classes alone."""

    name = "fine_tuning"

    def describe(self) -> MethodCard:
        return MethodCard(
            title="Sequential fine-tuning",
            sentence="each task was learned by cross-entropy alone; nothing was done to keep what older tasks had taught",
            limits=("Nothing protects older tasks: the figures above show what remains of them.",),
        )


@register
class Joint(FineTuning):
    """Fine-tuning on the training images of all tasks together, the upper bound of the field's tables.

    The model learns one task that has all classes, with as many passes over each image as any other method makes. It is
    evaluated on the stream's own tasks, after the last of them alone: the accuracy matrix has no other row, and
    forgetting is not defined.
    """

    name = "joint"

    def describe(self) -> MethodCard:
        return MethodCard(
            title="Joint training",
            sentence="cross-entropy over all classes, on the training images of all tasks at once",
            limits=("All images were there at once: this is a bound for continual learning, not an example of it.",),
        )

    def training_stream(self, stream: TaskStream) -> TaskStream:
        return stream.joined()
