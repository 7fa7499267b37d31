"""Fine-tuning: each task is learned as it comes, and nothing is done for the older ones."""

from __future__ import annotations

from .base import ContinualMethod, MethodCard
from .registry import register


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
