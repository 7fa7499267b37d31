"""Refuse numbers that are not finite, before they become a part of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.stream import TaskImages
from .evaluation import Recorded

_CAUSES = (
    "Look at that image, at what makes pixels of it (image_mean and image_std of the image processor, a data collator of "
    "your own), and use bf16 instead of fp16"
)


class LossWatch:
    """Find the first step whose loss is not finite, without waiting for the device.

    A device notes it for itself, and its note travels to the host meanwhile: on a GPU, the host reads it a few steps later,
    on a CPU at once. `settle` waits for it; nothing that a step has led to may be written before.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._noted = torch.tensor([-1.0, 0.0], dtype=torch.float64 if device.type != "mps" else torch.float32)
        self._landed = self._noted.clone()
        if device.type == "cuda":
            self._landed = self._landed.pin_memory()
        self._noted = self._noted.to(device)
        self._read = self._landed.numpy()  # which asks nothing of a device
        self._rates: dict[int, float] = {}

    def note(self, loss: Tensor, step: int, rate: float) -> None:
        """Take a step's loss, a scalar, and its learning rate; steps count from 1."""
        self._rates[step] = rate
        loss = loss.detach().to(self._noted.dtype)
        known = self._noted[0] >= 0
        found = torch.stack([torch.full_like(loss, step), loss])
        torch.where(known | torch.isfinite(loss), self._noted, found, out=self._noted)
        self._landed.copy_(self._noted, non_blocking=True)

    def check(self, task: int, steps: int, kept: str) -> None:
        """Raise FloatingPointError if the host knows of such a step.

        Args:
            task: 0-based, for the message.
            steps: of the task, likewise.
            kept: what remains of the run, likewise.
        """
        step, loss = int(self._read[0]), float(self._read[1])
        if step < 0:
            return
        labels = " It is NaN as well for labels outside the classes of the loss." if self._noted.is_cuda else ""
        raise FloatingPointError(
            f"the loss became {loss} in task {task + 1} at step {step} of {steps} (learning rate {self._rates[step]:g}); "
            f"{kept}. Lower learning_rate, set max_grad_norm, or use bf16 instead of fp16.{labels}"
        )

    def settle(self, task: int, steps: int, kept: str) -> None:
        """Wait for the steps so far, and raise FloatingPointError if the loss of one was not finite; see `check`."""
        self._landed.copy_(self._noted)
        self.check(task, steps, kept)
        self._rates.clear()


def check_weights(weights: Mapping[str, Tensor], task: int, kept: str) -> None:
    """Raise FloatingPointError unless what has been trained is finite: the last step's gradients may not have been.

    Args:
        weights: by name.
        task: 0-based, for the message.
        kept: what remains of the run, likewise.
    """
    wrong = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise FloatingPointError(
            f"{wrong[0]} is not finite after the last step of task {task + 1} ({len(wrong)} of {len(weights)} trained "
            f"parameters are not); the task is not finished, and {kept}. Lower learning_rate, set max_grad_norm, or use bf16 "
            "instead of fp16."
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
