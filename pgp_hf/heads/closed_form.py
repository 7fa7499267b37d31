"""Measure what the frozen backbone achieves alone: classifiers in closed form on its CLS features.

None of them has prompts, epochs or anything to forget: sums over the images of a class are added as classes arrive. A
method that trains prompts has to beat these to be worth its cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.scenarios import SCENARIOS
from ..data.stream import TaskStream
from .statistics import ClassStatistics

SHRINKAGE = 0.1
RIDGES = 10.0 ** np.arange(-8, 9)  # the strengths that RanPAC tries


class Classifier(Protocol):
    """Learn classes from features, task by task, and tell them apart."""

    def update(self, x: np.ndarray, y: np.ndarray) -> None:
        """Learn a task's features `(N, d)` and labels `(N,)`."""

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the labels `(N,)` of features `(N, d)`."""


class _FromStatistics:
    """Keep [`ClassStatistics`] of classes that need not be known in advance.

    Attributes:
        classes: the labels seen so far, sorted.
        statistics: of these classes, in this order.
    """

    def __init__(self, shrinkage: float = 1.0) -> None:
        self._shrinkage = shrinkage
        self.classes = np.empty(0, dtype=np.int64)
        self.statistics: ClassStatistics

    def update(self, x: np.ndarray, y: np.ndarray) -> None:
        """Learn a task's features `(N, d)` and labels `(N,)`."""
        classes = np.union1d(self.classes, y)
        grown = ClassStatistics(len(classes), x.shape[1], self._shrinkage)
        if len(self.classes):
            places = torch.from_numpy(np.searchsorted(classes, self.classes))
            grown.counts[places], grown.means[places] = self.statistics.counts, self.statistics.means
            grown.scatter.copy_(self.statistics.scatter)
        self.statistics = grown.update(torch.from_numpy(x), torch.from_numpy(np.searchsorted(classes, y)))
        self.classes = classes


@dataclass
class NearestClassMean(_FromStatistics):
    """Choose the class whose mean is nearest in Euclidean distance."""

    def __post_init__(self) -> None:
        super().__init__()

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the labels `(N,)` of features `(N, d)`."""
        features = torch.from_numpy(x).to(torch.float64)
        # not by matrix products, in which distances between close points lose digits
        distances = torch.cdist(features, self.statistics.means, compute_mode="donot_use_mm_for_euclid_dist")
        return self.classes[distances.argmin(1).numpy()]


@dataclass
class ShrinkageLDA(_FromStatistics):
    """Classify by class means and one covariance, shrunk towards a multiple of the identity.

    Args:
        shrinkage: share of the identity in the covariance, in [0, 1]; at 0 the features alone must give it an inverse.
    """

    shrinkage: float = field(
        default=SHRINKAGE, metadata={"help": "share of the identity in the covariance, in [0, 1]"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage} is outside [0, 1]: it is a share, such as {SHRINKAGE}.")
        super().__init__(self.shrinkage)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the labels `(N,)` of features `(N, d)`.

        Raises:
            ValueError: a shrinkage of 0 and a covariance without an inverse.
        """
        weight, bias, centre = self.statistics.solve()
        logits = (torch.from_numpy(x).to(torch.float64) - centre) @ weight.mT + bias
        return self.classes[logits.argmax(1).numpy()]


@dataclass
class RandomProjectionRidge:
    """Fit one-hot targets by ridge regression on `h = relu(f W)`, W Gaussian: RanPAC without its adapters.

    McDonnell et al., NeurIPS 2023, sections 3 and 4: with the sums `G = sum h h^T` and `C = sum h y^T` over all images
    so far, a task ends with the weights `(G + r I)^-1 C`. r is the power of ten with the least squared error on a
    fifth of the task's images, after the others have joined the sums of the earlier tasks. The first task tries all 17
    powers; later ones search downhill from the last r.

    As long as there are fewer images than random features, the same weights are cheaper to compute from the images' own
    Gram matrix, `H^T (H H^T + r I)^-1 Y`: seconds for 5,000 images and the paper's M = 10,000. From then on G and C
    are kept instead. Everything is float64 and solved by Cholesky; a ridge too weak for that is skipped.

    Args:
        width: number M of random features.
        seed: of the random features, and of the choice of images that validate.

    Attributes:
        ridge: the r chosen last.
    """

    width: int = field(default=10_000, metadata={"help": "number M of random features"})
    seed: int = field(
        default=0, metadata={"help": "seed of the random features, and of the choice of images that validate"}
    )

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: at least one random feature is needed.")
        self._rng = np.random.default_rng(self.seed)
        self.classes = np.empty(0, dtype=np.int64)
        self.ridge: float | None = None
        self._h, self._y = torch.zeros(0, self.width, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        self._images, self._gram = True, torch.zeros(0, 0, dtype=torch.float64)

    def features(self, x: np.ndarray) -> Tensor:
        """Return `relu(x W)`, `(N, M)`, of features `(N, d)`; W is drawn by the first call."""
        if not hasattr(self, "_projection"):
            self._projection = torch.from_numpy(self._rng.standard_normal((x.shape[1], self.width)))
        return (torch.from_numpy(np.asarray(x, dtype=np.float64)) @ self._projection).relu_()

    def update(self, x: np.ndarray, y: np.ndarray) -> None:
        """Learn a task's features `(N, d)` and labels `(N,)`."""
        order = self._rng.permutation(len(y))
        h, y, fit = self.features(x[order]), y[order], len(y) - max(1, len(y) // 5)
        new = np.setdiff1d(y, self.classes)
        self.classes = np.concatenate([self.classes, new])
        self._y = torch.nn.functional.pad(self._y, (0, len(new)))
        targets = torch.from_numpy((y[:, None] == self.classes).astype(np.float64))
        if self._images and len(self._h) + len(h) > self.width:
            self._images, self._gram, self._y = False, self._h.T @ self._h, self._h.T @ self._y
            self._h = self._h[:0]
        if self._images:
            old, self._h, self._y = len(self._h), torch.cat([self._h, h]), torch.cat([self._y, targets])
            cross = h @ self._h.T
            self._gram = torch.cat([torch.cat([self._gram, cross[:, :old].T], 1), cross])
            fit += old
            sums, held_out = (self._gram[:fit, :fit], self._y[:fit]), self._gram[fit:, :fit]
        else:
            sums = self._gram.addmm_(h[:fit].T, h[:fit]), self._y.addmm_(h[:fit].T, targets[:fit])
            held_out = h[fit:]
        ridge = self._choose(sums, held_out, targets[-len(held_out) :])
        if not self._images:
            self._gram.addmm_(h[fit:].T, h[fit:])
            self._y.addmm_(h[fit:].T, targets[fit:])
        while (weight := _ridge(self._gram, self._y, ridge)) is None:
            ridge *= 10
        self.ridge = ridge
        self._weight = self._h.T @ weight if self._images else weight

    def _choose(self, sums: tuple[Tensor, Tensor], h: Tensor, targets: Tensor) -> float:
        """Return the ridge with the least squared error on features `h`, starting from the last one."""
        errors: dict[int, float] = {}

        def error(k: int) -> float:
            if k not in errors:
                weight = _ridge(*sums, RIDGES[k]) if 0 <= k < len(RIDGES) else None
                errors[k] = float("inf") if weight is None else float((h @ weight - targets).square().sum())
            return errors[k]

        ks = range(len(RIDGES))
        best = min(reversed(ks), key=error) if self.ridge is None else int(np.abs(RIDGES - self.ridge).argmin())
        while (better := min((best, best + 1, best - 1), key=error)) != best:
            best = better
        return float(RIDGES[best])

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the labels `(N,)` of features `(N, d)`."""
        return self.classes[(self.features(x) @ self._weight).argmax(1).numpy()]


def _ridge(gram: Tensor, right: Tensor, ridge: float) -> Tensor | None:
    """Return `(gram + ridge I)^-1 right`, or None if that matrix is not positive definite in float64."""
    regular = gram.clone()
    regular.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(regular)
    return None if failed else torch.cholesky_solve(right, factor)


CLASSIFIERS: dict[str, Callable[[], Classifier]] = {
    "nearest class mean": NearestClassMean,
    "shrinkage LDA": ShrinkageLDA,
    "random-projection ridge": RandomProjectionRidge,
}


@torch.no_grad()
def extract_features(
    extract: Callable[[Tensor], Tensor],
    images: Dataset[Any],
    collator: Callable[[list[Any]], dict[str, Tensor]],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> np.ndarray:
    """Return the features `(N, d)`, float32, of all images; `extract` maps pixel values `(B, 3, H, W)` to `(B, d)`."""
    loader = DataLoader(images, batch_size=batch_size, collate_fn=collator, generator=torch.Generator())
    return np.concatenate([extract(batch["pixel_values"].to(device)).float().cpu().numpy() for batch in loader])


def stream_features(
    extract: Callable[[Tensor], Tensor],
    images: Callable[[int], Dataset[Any]],
    num_tasks: int,
    collator: Callable[[list[Any]], dict[str, Tensor]],
    *,
    progress: str | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> list[np.ndarray]:
    """Return [`extract_features`] of each task's `images(t)`; `progress` names the bar, None hides it."""
    tasks = tqdm(range(num_tasks), desc=progress, leave=False, disable=progress is None or None)
    return [extract_features(extract, images(t), collator, device=device, batch_size=batch_size) for t in tasks]


def frozen_matrices(
    stream: TaskStream,
    train: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    classifiers: Mapping[str, Callable[[], Classifier]] = CLASSIFIERS,
) -> dict[str, list[list[float | None]]]:
    """Return the accuracy matrix (percent) of each classifier over the stream.

    Where the task of a test image is known, each task has its own classifier, which knows the task's classes alone.

    Args:
        stream: the tasks.
        train: features `(N_t, d)` of each task's training images, in the order of `stream.train(t)`.
        test: the same of each task's test images.
        classifiers: by name, a function that makes a new classifier.

    Returns:
        By name, `matrix[i][j]`: accuracy on task j with the classes of tasks 0..i known, None for j > i.
    """
    own = SCENARIOS[stream.scenario].task_known
    matrices: dict[str, list[list[float | None]]] = {}
    for name, make in classifiers.items():
        rows: list[list[float | None]] = []
        model = make()
        for i in range(stream.num_tasks):
            model = make() if own else model
            model.update(train[i], stream.train(i).labels)
            row = list(rows[-1][:i]) if own and rows else []  # a task's own classifier never changes
            for j in range(len(row), i + 1):
                row.append(float(100 * np.mean(model.predict(test[j]) == stream.test(j).labels)))
            rows.append([*row, *[None] * (stream.num_tasks - i - 1)])
        matrices[name] = rows
    return matrices
