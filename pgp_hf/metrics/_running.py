"""Follow the accuracies of a head over a stream in space that is linear in the number of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = list[float | None]
"""Accuracies in percent on each task so far; None where there were no test images."""


@dataclass
class Accuracies:
    """Keep what the metrics of an accuracy matrix need of it, but not the matrix itself.

    They are those of `metrics.summarize`, to the bit. None stands for what a missing value would be needed for.

    Attributes:
        now: the last row.
        learned: the accuracy on each task right after it was learned.
        best: the best accuracy on each task but the last in the rows before the last one.
        averages, forgetting: average accuracy and forgetting after each task.
    """

    now: Row = field(default_factory=list)
    learned: Row = field(default_factory=list)
    best: Row = field(default_factory=list)
    averages: Row = field(default_factory=list)
    forgetting: Row = field(default_factory=list)

    def take(self, at: int, row: Sequence[float | None]) -> None:
        """Take the row of the 0-based task `at`: the one after the last, or the last again.

        Where tasks are learned as one, the rows of those before `at` are missing.
        """
        if at > len(self.averages):
            self.now, self.learned, self.best = [None] * at, [None] * at, [None] * (at - 1)
            self.averages, self.forgetting = [None] * at, [None] * at
        if at == len(self.averages):
            self.best = [*map(_larger, self.best, self.now), *self.now[-1:]]
        self.now = list(row)
        self.learned[at:] = [row[at]]
        self.averages[at:] = [_mean(row)]
        self.forgetting[at:] = [_mean(map(_difference, self.best, row))]

    @property
    def summary(self) -> dict[str, Any]:
        """Return the metrics, under the names that `results.json` uses."""
        clipped = map(_difference, map(_larger, self.best, self.now), self.now)
        return {
            "average_accuracy": self.averages[-1] if self.averages else None,
            "forgetting": self.forgetting[-1] if self.forgetting else None,
            "forgetting_clipped": _mean(clipped),
            "backward_transfer": _mean(map(_difference, self.now[:-1], self.learned)),
            "learning_accuracy": _mean(self.learned),
            "per_task_average_accuracy": list(self.averages),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics, and what `load` needs."""
        return {
            **self.summary,
            "per_task_forgetting": list(self.forgetting),
            "by_task": {"now": list(self.now), "when_learned": list(self.learned), "best_before": list(self.best)},
        }

    @classmethod
    def of(cls, matrix: Iterable[Sequence[float | None]]) -> Accuracies:
        """Return what follows from the rows of an accuracy matrix; entries above its diagonal do not count."""
        found = cls()
        for i, row in enumerate(matrix):
            found.take(i, row[: i + 1])
        return found

    @classmethod
    def load(cls, content: dict[str, Any], rows: range) -> Accuracies:
        """Go on from the content of a results file.

        Args:
            content: as from `to_dict`, or with an `accuracy_matrix` from an earlier version.
            rows: of the matrix, of the finished tasks.

        Raises:
            KeyError, TypeError: content of another form.
        """
        if "accuracy_matrix" in content:
            return cls.of(content["accuracy_matrix"][: rows.stop])
        own, tasks = content["by_task"], rows.stop
        by_task = [own["now"], own["when_learned"], own["best_before"]]
        lists = [*by_task, content["per_task_average_accuracy"], content["per_task_forgetting"]]
        for values, length in zip(lists, (tasks, tasks, tasks - 1, tasks, tasks), strict=True):
            if not isinstance(values, list) or len(values) != length or not all(map(_is_measured, values)):
                raise TypeError(f"{str(values)[:60]} is not a list of {length} numbers, or null, in by_task")
        return cls(*map(list, lists))


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, None where a value is missing; 0.0 of none, as only what compares with earlier tasks can have."""
    found = list(values)
    if None in found:
        return None
    return float(np.mean(np.array(found, dtype=np.float64))) if found else 0.0


def _larger(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else max(a, b)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _is_measured(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
