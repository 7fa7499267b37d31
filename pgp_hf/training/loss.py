"""Compute the loss of a step, per image until the very end, so that accumulation and processes change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from ..methods import Batch, ContinualMethod, TaskContext


def cross_entropy(logits: Tensor, labels: Tensor, classes: Sequence[int], smoothing: float = 0.0) -> Tensor:
    """Return each image's cross-entropy over some of the classes, `(B,)`.

    Nothing waits for a device: there, the loss of an image with a label outside `classes` is NaN.

    Args:
        logits: `(B, C)`.
        labels: `(B,)`, all of them among `classes`.
        classes: label ids that take part.
        smoothing: label smoothing, in [0, 1].

    Raises:
        ValueError: on a CPU, such a label.
    """
    if labels.device.type == "cpu" and (outside := ~np.isin(labels.numpy(), classes)).any():
        raise ValueError(
            f"{int(outside.sum())} of {len(labels)} images of this batch have labels outside the classes of the loss: "
            f"{np.unique(labels.numpy()[outside]).tolist()} are not among {sorted(classes)}. Set train_mask='seen' to have "
            "all classes seen so far in the loss, or let the method's classes() name them."
        )
    index, position = _positions(tuple(classes), logits.shape[1], labels.device)
    targets = position[labels]
    losses = F.cross_entropy(logits.float()[:, index], targets, reduction="none", label_smoothing=smoothing)
    return losses.masked_fill(targets < 0, torch.nan) if labels.device.type != "cpu" else losses


@lru_cache(maxsize=4)
def _positions(classes: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return label ids as a tensor, and the place of each of `count` label ids among them, -100 for those without one."""
    index = torch.tensor(classes)
    position = torch.full((count,), -100)
    position[index] = torch.arange(len(index))
    return index.to(device), position.to(device)


def mean_over_step(losses: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return this batch's share of the mean loss over all images of the step.

    Args:
        losses: `(B,)`, of one process and one micro-batch.
        labels: `(B,)`.
        num_items_in_batch: images of the step, over all processes and micro-batches; those of this batch when None.
    """
    return losses.sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def image_losses(
    method: ContinualMethod, context: TaskContext, batch: Batch, output: ModelOutput, smoothing: float
) -> Tensor:
    """Return each image's loss, `(B,)`: cross-entropy and the model's auxiliary loss, as the method changes them.

    Raises:
        ValueError: a method that returns another shape, such as a mean.
    """
    logits = context.model.class_logits(output)
    losses = cross_entropy(logits, batch.labels, method.classes(context), smoothing)
    if (own := context.model.auxiliary_loss(output)) is not None:
        losses = losses + own
    losses = method.loss(context, batch, output, losses)
    if losses.shape != batch.labels.shape:
        raise ValueError(
            f"method {method.name!r} returned a loss of shape {tuple(losses.shape)}: expected {tuple(batch.labels.shape)}, "
            "one for each image; the trainer averages over the images of the whole step."
        )
    return losses
