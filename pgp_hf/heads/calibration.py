"""Make scores as sure as they are right: the temperature of a softmax, and the error that is left; torch alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURES = torch.logspace(0, 2, 65, dtype=torch.float64)
"""Candidates, from 1 to 100 in steps of 7 %. Below 1, scores would be surer than Gaussian classes with known means."""

WITHIN = 0.5  # of the log-likelihood: one standard error
BINS = 10


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, summed over images, at each of [`TEMPERATURES`].

    Args:
        logits: `(N, C)`; minus infinity for classes that cannot win.
        labels: `(N,)`.
    """
    logits = logits.double()
    found = [F.cross_entropy(logits / float(t), labels, reduction="sum") for t in TEMPERATURES]
    return torch.stack(found) if len(logits) else torch.zeros_like(TEMPERATURES)


def best_temperature(curve: Tensor) -> float:
    """Return the largest candidate that is consistent with the images; 1.0 if there were none.

    Its loss is at most [`WITHIN`] above the smallest: one standard error, in units of the log-likelihood. The images are
    training images of the newest task, which the model knows better than it knows test images, or older images whose
    features have drifted. Where several candidates fit, the least confident scores are therefore the safest.

    Args:
        curve: [`losses`], or sums of them.
    """
    if not curve.any():
        return 1.0
    return float(TEMPERATURES[int((curve <= curve.min() + WITHIN).nonzero().max())])


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Return how far the scores of predicted classes are from the share of right predictions, on average over images.

    Images are sorted by score and divided into ten bins of equal size (Nixon et al. 2019; Roelofs et al. 2022): with bins
    of equal width, most hold a few images, whose share of right predictions is chance. For fewer than ten images, each
    is a bin.

    Args:
        confidence: the score of each image's predicted class, `(N,)`, N >= 1.
        right: whether it is the image's class, `(N,)`.
    """
    order = confidence.argsort(stable=True)
    gap = (confidence.double() - right.double())[order]
    return float(sum(part.sum().abs() for part in gap.tensor_split(min(BINS, len(gap))))) / len(gap)
