"""Compute the continual-learning metrics by plain functions of one accuracy matrix, with numpy alone.

Everywhere `A[i][j]` is the accuracy on task `j` after training task `i` (0-based), in percent or as a fraction, and
`t` is the last row that holds values, so a run in progress has metrics too. `None` and NaN mean "not evaluated";
entries above the diagonal (tasks not yet trained) may be missing, entries on and below it may not. PGP is Qiao et al.,
ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

Matrix = Sequence[Sequence["float | None"]] | np.ndarray


def average_accuracy(matrix: Matrix) -> float:
    """Average the current model's accuracy over the tasks seen so far (PGP, Eq. 35).

        ACC = 1/(t+1) * sum_{j <= t} A[t][j]

    The mean is over tasks, not over images: small tasks count as much as large ones.

    Args:
        matrix: `A`, shape `(rows, tasks)` with `rows <= tasks`.

    Returns:
        The average, in the unit of `matrix`.

    Raises:
        TypeError: an entry is not a number.
        ValueError: the matrix is empty, ragged, out of range, or lacks an entry on or below the diagonal.
    """
    return _average(_seen(matrix))


def forgetting(matrix: Matrix) -> float:
    """Average the drop from each earlier task's best accuracy so far to its accuracy now (PGP, Eq. 36).

        FOR = 1/t * sum_{i < t} ( max_{i <= j <= t-1} A[j][i] - A[t][i] )

    Eq. 36 as printed has the opposite sign; this is the sign of the tables, where more is worse. The current row is
    left out of the maximum, so a task that is now better than ever counts as negative forgetting. 0.0 when only one
    task is trained.

    Args, Returns and Raises: as for [`average_accuracy`].
    """
    return _forgetting(_seen(matrix))


def forgetting_clipped(matrix: Matrix) -> float:
    """Compute forgetting as the released code does, where no task counts below zero.

        FOR = 1/t * sum_{i < t} ( max_{i <= j <= t} A[j][i] - A[t][i] )

    The current row is part of the maximum, which is the only difference from [`forgetting`].

    Args, Returns and Raises: as for [`average_accuracy`].
    """
    return _forgetting_clipped(_seen(matrix))


def backward_transfer(matrix: Matrix) -> float:
    """Average the change of each earlier task's accuracy since it was learned (Lopez-Paz and Ranzato, 2017).

        BWT = 1/t * sum_{i < t} ( A[t][i] - A[i][i] )

    Negative when earlier tasks got worse. 0.0 when only one task is trained.

    Args, Returns and Raises: as for [`average_accuracy`].
    """
    return _backward_transfer(_seen(matrix))


def forward_transfer(matrix: Matrix, baseline: Sequence[float | None] | np.ndarray) -> float:
    """Average the head start on each task before its training, over the untrained model (Lopez-Paz and Ranzato, 2017).

        FWT = 1/t * sum_{1 <= i <= t} ( A[i-1][i] - b[i] )

    0.0 when only one task is trained.

    Args:
        matrix: `A`, shape `(rows, tasks)` with `rows <= tasks`; here the entries right above the diagonal,
            `A[i-1][i]` for `1 <= i <= t`, are needed as well.
        baseline: `b`, shape `(tasks,)`: accuracy of the untrained model on each task, in the unit of `matrix`.
            `b[0]` is not used and may be `None`.

    Returns:
        The transfer, in the unit of `matrix`.

    Raises:
        TypeError: as for [`average_accuracy`].
        ValueError: as for [`average_accuracy`], and when `baseline` or one of the entries right above the diagonal is
            missing; the message names it.
    """
    values = _values(matrix)
    last = len(_seen(matrix)) - 1
    untrained = _array(baseline, "baseline")
    if untrained.shape != (values.shape[1],):
        raise ValueError(
            f"baseline has shape {untrained.shape}; expected one accuracy of the untrained model for each of the "
            f"{values.shape[1]} tasks in the matrix (None where unknown)."
        )
    _check_range(untrained, "baseline")
    for task in range(1, last + 1):
        if np.isnan(values[task - 1, task]):
            raise ValueError(
                f"forward transfer needs accuracy_matrix[{task - 1}][{task}], the accuracy on task {task} right "
                f"before it is trained, which is missing. After each task, evaluate the next one as well."
            )
        if np.isnan(untrained[task]):
            raise ValueError(
                f"forward transfer needs baseline[{task}], the untrained model's accuracy on task {task}, which is "
                f"missing. Evaluate the model on every task before training."
            )
    return _mean([values[task - 1, task] - untrained[task] for task in range(1, last + 1)])


def learning_accuracy(matrix: Matrix) -> float:
    """Average each task's accuracy right after it was learned (Riemer et al., 2019): plasticity without memory.

        LA = 1/(t+1) * sum_{i <= t} A[i][i]

    Args, Returns and Raises: as for [`average_accuracy`].
    """
    return _learning_accuracy(_seen(matrix))


def per_task_average_accuracy(matrix: Matrix) -> list[float]:
    """Return [`average_accuracy`] as it was after each task: entry `i` is the mean of `A[i][0..i]` (PGP, Eq. 35).

    Args and Raises: as for [`average_accuracy`].

    Returns:
        `t + 1` averages, in the unit of `matrix`.
    """
    return _per_task(_seen(matrix))


def summarize(matrix: Matrix, tasks: int | None = None) -> dict[str, float | list[float | None] | None]:
    """Return all metrics that need only the matrix, under the names that `results.json` uses.

    Here entries on and below the diagonal may be missing: a task's test images were not there, or several tasks were
    learned as one. A metric that needs one of them is None.

    Args:
        matrix: `A`, shape `(rows, tasks)` with `rows <= tasks`.
        tasks: number of trained tasks, whose rows count; by default up to the last row that holds a value. If given, the
            matrix may hold no value at all.

    Returns:
        `average_accuracy`, `forgetting`, `forgetting_clipped`, `backward_transfer`, `learning_accuracy` (floats or None)
        and `per_task_average_accuracy` (list of floats or None, one per row), as plain Python numbers.

    Raises:
        TypeError: an entry is not a number.
        ValueError: the matrix is empty, ragged or out of range, or has no `tasks` rows.
    """
    values = _values(matrix, empty=tasks is not None)
    if tasks is None:
        tasks = _last(values) + 1
    if not 1 <= tasks <= len(values):
        raise ValueError(f"tasks={tasks}: expected 1 to {len(values)}, the number of rows in the matrix.")
    seen = values[:tasks, :tasks]
    return {
        "average_accuracy": _known(_average(seen)),
        "forgetting": _known(_forgetting(seen)),
        "forgetting_clipped": _known(_forgetting_clipped(seen)),
        "backward_transfer": _known(_backward_transfer(seen)),
        "learning_accuracy": _known(_learning_accuracy(seen)),
        "per_task_average_accuracy": [_known(average) for average in _per_task(seen)],
    }


# Below, `a` is a validated square array (t+1, t+1); what is missing on and below its diagonal makes a result NaN.


def _average(a: np.ndarray) -> float:
    return _mean(a[-1])


def _forgetting(a: np.ndarray) -> float:
    return _mean([a[task:-1, task].max() - a[-1, task] for task in range(len(a) - 1)])


def _forgetting_clipped(a: np.ndarray) -> float:
    return _mean([a[task:, task].max() - a[-1, task] for task in range(len(a) - 1)])


def _backward_transfer(a: np.ndarray) -> float:
    return _mean([a[-1, task] - a[task, task] for task in range(len(a) - 1)])


def _learning_accuracy(a: np.ndarray) -> float:
    return _mean(np.diagonal(a))


def _per_task(a: np.ndarray) -> list[float]:
    return [_mean(a[task, : task + 1]) for task in range(len(a))]


def _mean(terms: Sequence[float] | np.ndarray) -> float:
    """Return the mean as a plain float; 0.0 for no terms, which only metrics over *earlier* tasks can have."""
    return float(np.mean(terms)) if len(terms) else 0.0


def _known(value: float) -> float | None:
    """Return a metric, or None where an entry that it needs is missing."""
    return None if np.isnan(value) else value


def _last(values: np.ndarray) -> int:
    """Return the index of the last row that holds a value."""
    return int(np.flatnonzero(~np.isnan(values).all(axis=1))[-1])


def _seen(matrix: Matrix) -> np.ndarray:
    """Return the square part `A[:t+1, :t+1]`, checked to be complete on and below the diagonal."""
    values = _values(matrix)
    last = _last(values)
    seen = values[: last + 1, : last + 1]
    holes = np.argwhere(np.isnan(np.tril(seen)))
    if len(holes):
        shown = ", ".join(f"[{i}][{j}]" for i, j in holes[:5]) + (", ..." if len(holes) > 5 else "")
        raise ValueError(
            f"accuracy_matrix has no value at {shown}; its last row with values is {last}, so every entry [i][j] with "
            f"j <= i <= {last} is required. Evaluate all seen tasks after each task."
        )
    return seen


def _values(matrix: Matrix, empty: bool = False) -> np.ndarray:
    """Return the matrix as float64 `(rows, tasks)`, NaN where not evaluated; check its shape and range.

    Args:
        empty: whether it may hold no value at all.
    """
    rows = list(matrix) if np.iterable(matrix) else []
    lengths = [len(row) if isinstance(row, Sized) and np.iterable(row) else 0 for row in rows]
    if not rows or 0 in lengths:
        raise ValueError(
            f"accuracy_matrix must be a non-empty list of non-empty rows, one row per trained task and one column per "
            f"task; got {_short(matrix)}."
        )
    if len(set(lengths)) > 1:
        raise ValueError(
            f"accuracy_matrix is ragged: its rows have lengths {lengths}. Give every row one entry per task, None "
            f"where the task was not evaluated."
        )
    if len(rows) > lengths[0]:
        raise ValueError(
            f"accuracy_matrix has {len(rows)} rows but only {lengths[0]} columns; row i holds the accuracies after "
            f"task i, so there are at most as many rows as tasks. Is it transposed?"
        )
    values = _array(rows, "accuracy_matrix")
    if values.ndim != 2:
        raise ValueError(f"accuracy_matrix must have two dimensions, (rows, tasks); got shape {values.shape}.")
    _check_range(values, "accuracy_matrix")
    if not empty and np.isnan(values).all():
        raise ValueError("accuracy_matrix holds no value at all; evaluate at least one task.")
    return values


def _array(values: Any, name: str) -> np.ndarray:
    try:
        return np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must hold numbers, None or NaN; got {_short(values)} ({error}).") from error


def _check_range(values: np.ndarray, name: str) -> None:
    wrong = np.argwhere((values < 0) | (values > 100 + 1e-9))  # NaN compares false; 1e-9 for rounding in 100 * k / n
    if len(wrong):
        place = "".join(f"[{i}]" for i in wrong[0])
        raise ValueError(
            f"{name}{place} is {values[tuple(wrong[0])]}; accuracies lie in [0, 100] (percent) or [0, 1] (fraction)."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
