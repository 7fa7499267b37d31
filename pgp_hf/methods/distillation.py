"""Distillation: a model goes on saying what its teacher, the same model as the task found it, says of the same images."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import Batch, TaskContext


def teacher_of(context: TaskContext) -> dict[str, Tensor] | None:
    """Return copies of the trainable parameters as the task finds them, by name; None for the first task."""
    if not context.task:
        return None
    return {name: value.detach().clone() for name, value in context.model.trainable().items()}


def teacher_logits(context: TaskContext, batch: Batch, teacher: Mapping[str, Tensor]) -> Tensor:
    """Return the teacher's scores `(B, C)` of the same views as the model is given, without a gradient."""
    return context.model.class_logits(context.forward(batch, teacher)).float()


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Return `H(softmax(taught / T), softmax(logits / T))` for each image, `(B,)`.

    Where both agree, the gradient is zero to the bit: Adam would turn its rounding errors into steps of full size.

    Args:
        logits: `(B, C)`, of the classes that share a softmax.
        taught: the teacher's, likewise.
        temperature: T. The loss is not multiplied by its square, so that its gradient is `(p - q) / T`.
    """
    scaled, target = logits.float() / temperature, taught.float() / temperature
    weights = (target - target.logsumexp(-1, keepdim=True)).exp()  # as the gradient of logsumexp is computed
    return scaled.logsumexp(-1) - (weights * scaled).sum(-1)
