"""What the frozen backbone alone achieves: nearest class mean and shrinkage LDA on its CLS features.

Neither has a prompt, an epoch or anything to forget: class statistics are added as classes arrive. A method that
trains prompts has to be better than these rows to be worth its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..stream import TaskStream

SHRINKAGE = 0.1
CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "nearest class mean": NearestCentroid,
    "shrinkage LDA": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE),
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


def frozen_matrices(
    stream: TaskStream, train: list[np.ndarray], test: list[np.ndarray]
) -> dict[str, list[list[float | None]]]:
    """Accuracy matrix (percent) of each classifier over the stream.

    Args:
        train, test: features `(N_t, d)` of each task's images, in the order of `stream.train(t)` and `stream.test(t)`.

    Returns:
        By classifier, `matrix[i][j]`: accuracy on task j with the classes of tasks 0..i known, None for j > i. In the
        task-incremental scenario each task is classified among its own classes.
    """
    tasks = range(stream.num_tasks)
    labels = [(stream.train(t).labels, stream.test(t).labels) for t in tasks]
    matrices: dict[str, list[list[float | None]]] = {}
    for name, make in CLASSIFIERS.items():
        rows = []
        for i in tasks:
            row: list[float | None] = [None] * stream.num_tasks
            known = [[j] for j in tasks] if stream.scenario == "task_incremental" else [list(range(i + 1))] * (i + 1)
            for j in range(i + 1):
                if j == 0 or known[j] != known[j - 1]:
                    x = np.concatenate([train[k] for k in known[j]])
                    y = np.concatenate([labels[k][0] for k in known[j]])
                    predict = (
                        make().fit(x, y).predict
                        if len(np.unique(y)) > 1
                        else lambda z, only=y[0]: np.full(len(z), only)
                    )
                row[j] = float(100 * np.mean(predict(test[j]) == labels[j][1]))
            rows.append(row)
        matrices[name] = rows
    return matrices
