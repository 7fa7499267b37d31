"""Steps that a method makes by itself when a task has been trained: on cached features, or on images of its choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from .base import TaskContext

TEMPERATURE = 5.0  # divides the scores while heads are tuned
BATCH = 128  # images in a step of the heads
SCALE = 2.0**10  # of a loss, whose gradients would underflow in half precision


def steps(optimizer: Optimizer, images: int, batch_size: int, epochs: int, key: Sequence[int]) -> Iterator[Tensor]:
    """Yield the images of each step, in an order that is drawn anew in each epoch.

    In the second half of the epochs, the optimizer's learning rates are a tenth.

    Args:
        images: how many there are.
        key: integers of which the order is a function, with the epoch.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(epochs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate if 2 * epoch < epochs else rate / 10
        order = torch.from_numpy(np.random.default_rng([*key, epoch]).permutation(images))
        yield from torch.split(order, batch_size)


def descend(optimizer: Optimizer, loss: Tensor, what: str) -> None:
    """Make a step along the gradient of a loss.

    Args:
        what: names the loss and the setting to lower, for the message.

    Raises:
        FloatingPointError: it is not finite.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss of {what} became {loss.item()}: lower its learning rate.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # not by backward(), which would set off what data-parallel training has attached to the parameters
    gradients = torch.autograd.grad(SCALE * loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient / SCALE
    optimizer.step()


def tune_heads(
    features: Sequence[Tensor],
    labels: Tensor,
    sizes: Sequence[int],
    bias: bool,
    epochs: int,
    learning_rate: float,
    key: Sequence[int],
) -> list[list[Tensor]]:
    """Return a linear head for each expert, all trained together: its weight `(C_t, d)`, and its bias `(C_t,)`.

    They start from zero. Adam minimizes the cross-entropy of their scores, side by side and divided by 5.

    Args:
        features: what each expert makes of the same images, `(N, d)`.
        labels: positions of the classes in the order in which they came, `(N,)`.
        sizes: number of classes of each expert.
        bias: whether there is one.
        epochs: passes over the images.
        learning_rate: in the first half of them; then a tenth.
        key: integers of which the order of the images is a function.
    """
    heads = [
        [features[0].new_zeros(size, own.shape[1]), *([features[0].new_zeros(size)] if bias else [])]
        for size, own in zip(sizes, features, strict=True)
    ]
    optimizer = torch.optim.Adam([part.requires_grad_() for head in heads for part in head], lr=learning_rate)
    for rows in steps(optimizer, len(labels), BATCH, epochs, key):
        scores = [F.linear(own[rows], *head) for own, head in zip(features, heads, strict=True)]
        loss = F.cross_entropy(torch.cat(scores, 1) / TEMPERATURE, labels[rows])
        descend(optimizer, loss, "the heads (tuning_learning_rate)")
    return [[part.detach() for part in head] for head in heads]


def from_main_process(context: TaskContext, tensor: Tensor) -> Tensor:
    """Return the main process's tensor: rounding may differ between devices."""
    return tensor if context.collectives.broadcast is None else context.collectives.broadcast(tensor)
