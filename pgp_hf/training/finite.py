"""Refuse numbers that are not finite, before they become a part of the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.stream import TaskImages
from .evaluation import Recorded

_CAUSES = (
    "Look at that image, at what makes pixels of it (image_mean and image_std of the image processor, a data collator of "
    "your own), and use bf16 instead of fp16"
)


def check_loss(loss: Tensor, at: str, kept: str) -> None:
    """Raise FloatingPointError unless a step's loss is finite.

    Args:
        loss: a scalar.
        at: the step and its learning rate, for the message.
        kept: what remains of the run, likewise.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss became {loss.item()} in {at}; {kept}. Lower learning_rate, set max_grad_norm, or use bf16 instead of "
            "fp16."
        )


def check_pixels(pixels: Tensor, places: Sequence[tuple[TaskImages, int]]) -> None:
    """Raise FloatingPointError unless a batch's pixels `(B, ...)` are finite; `places` has each image's position."""
    wrong = ~torch.isfinite(pixels).flatten(1).all(1)
    if wrong.any():
        images, position = places[int(wrong.nonzero()[0])]
        raise FloatingPointError(
            f"{images.place(position)} has pixel values that are not finite (task {images.task + 1}). {_CAUSES}."
        )


def check_outputs(found: Recorded, images: TaskImages, kept: str) -> None:
    """Raise FloatingPointError unless the model's view of a task's test images is finite.

    Args:
        found: of these images; logits of classes that may not win are at minus infinity.
        images: of the task.
        kept: what remains of the run, for the message.
    """
    wrong = ~np.isfinite(found.features).all(-1)
    for logits in (found.logits, found.linear):
        if logits is not None:
            wrong |= np.isnan(logits).any(-1) | ~np.isfinite(logits.max(-1))
    if wrong.any():
        raise FloatingPointError(
            f"the model's output is not finite for {wrong.sum()} of {len(wrong)} test images of task {images.task + 1}; the "
            f"first is {images.place(int(wrong.argmax()))}. The task is not finished, and {kept}; train("
            f"resume_from_checkpoint=True) goes on from its last checkpoint. {_CAUSES}."
        )
