"""Classify by the nearest mean of a few examples of each class; torch alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def unit_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the mean direction of each class, `(C, d)`, of length 1; zeros for a class without examples.

    Args:
        features: `(N, d)`; each counts with length 1.
        labels: `(N,)`.
        num_classes: C.
    """
    sums = features.new_zeros(num_classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, F.normalize(features.double(), dim=-1))
    return F.normalize(sums, dim=-1).float()


def nearest_mean_scores(features: Tensor, means: Tensor) -> Tensor:
    """Return the cosine between each image and each class's mean, `(B, C)`: the largest is that of the nearest mean.

    A class without a mean gets minus infinity.

    Args:
        features: `(B, d)`.
        means: `(C, d)`, as `unit_means` returns them.
    """
    means = means.to(features.device)
    scores = F.normalize(features.float(), dim=-1) @ means.mT
    return scores.masked_fill(~means.any(-1), float("-inf"))
