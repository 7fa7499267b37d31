"""Which classes may win; torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_classes(logits: Tensor, classes: Sequence[int] | None) -> Tensor:
    """`logits` `(B, C)` with every class outside `classes` at minus infinity; None keeps all."""
    if classes is None:
        return logits
    mask = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    mask[list(classes)] = False
    return logits.masked_fill(mask, float("-inf"))
