"""What the frozen backbone alone achieves: classifiers in closed form on its CLS features.

None has a prompt, an epoch or anything to forget: sums over the images of a class are added as classes arrive. A
method that trains prompts has to be better than these rows to be worth its cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.stream import TaskStream

SHRINKAGE = 0.1
RIDGES = 10.0 ** np.arange(-8, 9)  # the strengths that RanPAC tries


class _Refit(ABC):
    """A scikit-learn classifier fitted anew to all features so far, which equals adding to its class sums."""

    def __init__(self) -> None:
        self._x: list[np.ndarray] = []
        self._y: list[np.ndarray] = []

    @abstractmethod
    def _make(self) -> Any:
        """The classifier, unfitted."""

    def update(self, x: np.ndarray, y: np.ndarray) -> None:
        """Learn a task's features `(N, d)` and labels `(N,)`."""
        self._x.append(x)
        self._y.append(y)
        labels = np.concatenate(self._y)
        # scikit-learn refuses a single class
        self._fitted = self._make().fit(np.concatenate(self._x), labels) if len(np.unique(labels)) > 1 else None

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Labels `(N,)` of features `(N, d)`."""
        return np.full(len(x), self._y[0][0]) if self._fitted is None else self._fitted.predict(x)


@dataclass
class NearestClassMean(_Refit):
    """The class whose mean is nearest in Euclidean distance."""

    def __post_init__(self) -> None:
        super().__init__()

    def _make(self) -> Any:
        return NearestCentroid()


@dataclass
class ShrinkageLDA(_Refit):
    """Class means and one covariance, shrunk towards a multiple of the identity."""

    shrinkage: float = field(
        default=SHRINKAGE, metadata={"help": "share of the identity in the covariance, in [0, 1]"}
    )

    def __post_init__(self) -> None:
        super().__init__()
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage} is outside [0, 1]: it is a share, such as {SHRINKAGE}.")

    def _make(self) -> Any:
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=self.shrinkage)


@dataclass
class RandomProjectionRidge:
    """Ridge regression to one-hot targets on `h = relu(f W)`, W Gaussian: RanPAC without its adapters.

    McDonnell et al., NeurIPS 2023, sections 3 and 4: with the sums `G = sum h h^T` and `C = sum h y^T` over all images
    so far, a task ends with the weights `(G + r I)^-1 C`. r is the power of ten with the least squared error on a
    fifth of the task's images, the others having joined the sums of the earlier tasks: out of 17 at the first task,
    then downhill from the last one.

    While there are fewer images than random features, the same weights come cheaper from the images' own Gram matrix,
    `H^T (H H^T + r I)^-1 Y`: seconds for 5,000 images and the paper's M = 10,000. From then on G and C are kept
    instead. All in float64, by Cholesky; a ridge too weak for that is passed over.

    Attributes:
        ridge: the r chosen last.
    """

    width: int = field(default=10_000, metadata={"help": "number M of random features"})
    seed: int = field(default=0, metadata={"help": "of the random features, and of the images that validate"})

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: at least one random feature is needed.")
        self._rng = np.random.default_rng(self.seed)
        self.classes = np.empty(0, dtype=np.int64)
        self.ridge: float | None = None
        self._h, self._y = torch.zeros(0, self.width, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        self._images, self._gram = True, torch.zeros(0, 0, dtype=torch.float64)

    def features(self, x: np.ndarray) -> Tensor:
        """`relu(x W)`, `(N, M)`, of features `(N, d)`; W is drawn at the first call."""
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
        self._choose(sums, held_out, targets[-len(held_out) :])
        if not self._images:
            self._gram.addmm_(h[fit:].T, h[fit:])
            self._y.addmm_(h[fit:].T, targets[fit:])
        while (weight := _ridge(self._gram, self._y, self.ridge)) is None:
            self.ridge *= 10
        self._weight = self._h.T @ weight if self._images else weight

    def _choose(self, sums: tuple[Tensor, Tensor], h: Tensor, targets: Tensor) -> None:
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
        self.ridge = float(RIDGES[best])

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Labels `(N,)` of features `(N, d)`."""
        return self.classes[(self.features(x) @ self._weight).argmax(1).numpy()]


def _ridge(gram: Tensor, right: Tensor, ridge: float) -> Tensor | None:
    """`(gram + ridge I)^-1 right`; None where that is not positive definite in float64."""
    regular = gram.clone()
    regular.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(regular)
    return None if failed else torch.cholesky_solve(right, factor)


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "nearest class mean": NearestClassMean,
    "shrinkage LDA": ShrinkageLDA,
    "random-projection ridge": RandomProjectionRidge,
}


@torch.no_grad()
def extract_features(
    extract: Callable[[Tensor], Tensor],
    images: Dataset,
    collator: Callable[[list], dict[str, Tensor]],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> np.ndarray:
    """Features `(N, d)`, float32, of all images; `extract` maps pixel values `(B, 3, H, W)` to `(B, d)`."""
    loader = DataLoader(images, batch_size=batch_size, collate_fn=collator, generator=torch.Generator())
    return np.concatenate([extract(batch["pixel_values"].to(device)).float().cpu().numpy() for batch in loader])


def stream_features(
    extract: Callable[[Tensor], Tensor],
    images: Callable[[int], Dataset],
    num_tasks: int,
    collator: Callable[[list], dict[str, Tensor]],
    *,
    progress: str | None = None,
    **kwargs: Any,
) -> list[np.ndarray]:
    """[`extract_features`] of each task's images, `images(t)`; `progress` names the bar, None hides it."""
    tasks = tqdm(range(num_tasks), desc=progress, leave=False, disable=progress is None)
    return [extract_features(extract, images(t), collator, **kwargs) for t in tasks]


def frozen_matrices(
    stream: TaskStream,
    train: list[np.ndarray],
    test: list[np.ndarray],
    classifiers: Mapping[str, Callable[[], Any]] = CLASSIFIERS,
) -> dict[str, list[list[float | None]]]:
    """Accuracy matrix (percent) of each classifier over the stream.

    Args:
        train, test: features `(N_t, d)` of each task's images, in the order of `stream.train(t)` and `stream.test(t)`.
        classifiers: by name, what makes a new one with `update(x, y)`, called task by task, and `predict(x)`.

    Returns:
        By classifier, `matrix[i][j]`: accuracy on task j with the classes of tasks 0..i known, None for j > i. In the
        task-incremental scenario each task is classified among its own classes.
    """
    own = stream.scenario == "task_incremental"
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
