"""Restrict which classes may win; torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_classes(logits: Tensor, classes: Sequence[int] | Tensor | None) -> Tensor:
    """Return `logits` with every class that may not win at minus infinity.

    Args:
        logits: `(B, C)`.
        classes: the class ids that may win; or a bool mask `(B, C)`, True where a class may win, for a batch whose
            images do not all have the same classes to choose from; None keeps all.

    Raises:
        ValueError: a mask of another shape than the logits.
    """
    if classes is None:
        return logits
    if isinstance(classes, Tensor) and classes.dtype == torch.bool:
        if classes.shape != logits.shape:
            raise ValueError(
                f"the mask of classes has the shape {tuple(classes.shape)}, the logits {tuple(logits.shape)}: expected "
                "one row for each image and one column for each class."
            )
        return logits.masked_fill(~classes.to(logits.device), float("-inf"))
    mask = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    mask[list(classes)] = False
    return logits.masked_fill(mask, float("-inf"))
