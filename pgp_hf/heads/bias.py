"""Correct scores that are biased towards the classes of the last task; torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class BiasCorrection(NamedTuple):
    """A linear correction of the scores of some classes: `alpha * z + beta`.

    Attributes:
        alpha, beta: the two numbers.
        classes: whose scores are corrected; none by default.
    """

    alpha: float = 1.0
    beta: float = 0.0
    classes: tuple[int, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the corrected scores `(B, C)`; nothing is changed in place."""
        if not self.classes:
            return logits
        corrected = logits.clone()
        corrected[:, list(self.classes)] = self.alpha * logits[:, list(self.classes)] + self.beta
        return corrected


def fit_bias(
    logits: Tensor, labels: Tensor, new: Sequence[int], old: Sequence[int], ridge: float = 0.1
) -> BiasCorrection:
    """Return the correction of new classes' scores that predicts some images best.

    It minimises the mean cross-entropy over all these classes, plus `ridge * beta^2 / 2`, from alpha = 1 and beta = 0. The
    problem is convex; L-BFGS solves it in float64, with all images at once.

    Args:
        logits: `(N, C)`.
        labels: `(N,)`, each a new or an old class.
        new, old: label ids.
        ridge: strength of the penalty on beta.
    """
    classes = torch.tensor([*old, *new])
    scores = logits.detach().cpu().double()[:, classes]
    targets = (labels.cpu()[:, None] == classes).int().argmax(-1)
    is_new = torch.arange(len(classes)) >= len(old)
    with torch.enable_grad():
        pair = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [pair], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            corrected = torch.where(is_new, pair[0] * scores + pair[1], scores)
            loss = F.cross_entropy(corrected, targets) + ridge / 2 * pair[1].square()
            loss.backward()
            return loss

        optimizer.step(objective)
    alpha, beta = pair.tolist()
    return BiasCorrection(alpha, beta, tuple(new))
