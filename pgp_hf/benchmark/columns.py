"""Define the columns of the benchmark's main table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..runs.checks import first_task
from .figures import HEADS, Run, own_head


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Return the mean, with the standard deviation if there are several values; a dash if there are none."""
    if not values:
        return "–"
    text = f"{np.mean(values):{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def paired_spread(values: list[float], digits: int) -> str:
    """Return the mean of differences that are paired by seed, and all of them; a dash if there are none.

    From three on, with the standard error, and what may be said: "better" or "worse" where all have one sign and their mean
    exceeds two standard errors, else "no difference seen".
    """
    if len(values) < 2:
        return spread(values, digits, sign="+")
    mean, each = np.mean(values), ", ".join(f"{value:+.{digits}f}" for value in values)
    if len(values) < 3:
        return f"{mean:+.{digits}f} ({each})"
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    apart = (min(values) > 0 or max(values) < 0) and abs(mean) > 2 * error
    said = ("better" if mean > 0 else "worse") if apart else "no difference seen"
    return f"{mean:+.{digits}f} ({each}; s.e. {error:.{digits}f}): {said}"


class Column(NamedTuple):
    """A column of the main table.

    Attributes:
        title: its head.
        of: the values of a row's runs.
        digits: decimals of mean and standard deviation; None for numbers that are the same in all runs.
        optional: left out where no run has a value above 0.
    """

    title: str
    of: Callable[[list[Run]], list[float]]
    digits: int | None
    optional: bool = False

    def cell(self, runs: list[Run]) -> str:
        """Return the cell of a row."""
        values = self.of(runs)
        if self.digits is not None:
            return spread(values, self.digits)
        return " / ".join(f"{value:,g}" if value % 1 else f"{value:,.0f}" for value in dict.fromkeys(values)) or "–"


def columns_of(runs: list[Run]) -> list[Column]:
    """Return all columns; times are in seconds if none of these runs takes as long as two minutes."""
    columns: list[Column] = []
    for head, title in HEADS.items():
        columns += [
            Column(f"{title}: average accuracy (%)", _of_head(head, "average_accuracy"), 2),
            Column(f"{title}: forgetting", _of_head(head, "forgetting"), 2),
            Column(f"{title}: task-incremental (%)", _of_head(head, "task_incremental"), 2, True),
        ]
    long = max(max(seconds(run), run.get("cpu_seconds", 0.0)) for run in runs) >= 120
    unit, scale, digits = ("min", 60, 1) if long else ("s", 1, 0)
    return [
        *columns,
        Column("drift", _last("drift"), 3),
        Column("changed selections (%)", _last("changed_selections", 100), 1),
        Column("rank", _last("projection_rank"), 0),
        Column("exemplars a class", _memory(lambda run: run["memory"]["images"] / run["num_classes"]), None, True),
        Column("exemplars (% of the training images)", _memory(_share), None, True),
        Column("exemplars in all", _memory(lambda run: run["memory"]["images"]), None, True),
        Column("exemplars (bytes)", _memory(lambda run: run["memory"]["bytes"]), None, True),
        Column("trainable parameters", _each("trainable_parameters"), None, True),
        Column(f"training ({unit})", lambda runs: [seconds(run) / scale for run in runs], digits),
        Column(f"CPU ({unit})", _each("cpu_seconds", 1 / scale), digits),
        Column("peak memory (MB)", _each("peak_memory_mb"), 0),
    ]


def in_turn(run: Run) -> bool:
    """Return True unless the run has learned all classes as one task."""
    head = next(iter(run["heads"].values()))
    return run["num_tasks"] > 1 and not first_task({**run, "accuracy_matrix": head.get("accuracy_matrix")})


def equal_tasks(run: Run) -> bool:
    """Return True if all tasks of a run have the same number of classes."""
    data, classes = run["settings"]["data"], run["num_classes"]
    if (increment := data.get("increment")) is None:
        return bool(classes % run["num_tasks"] == 0)
    return bool((data.get("init_classes") or increment) == increment and classes % increment == 0)


def _of_head(head: str, key: str) -> Callable[[list[Run]], list[float]]:
    def value(found: Run) -> float | None:
        if key == "task_incremental":
            return found[key]["average_accuracy"] if key in found else None
        return found[key]

    def values(runs: list[Run]) -> list[float]:
        if key == "forgetting":
            runs = [run for run in runs if in_turn(run)]
        elif key == "task_incremental":  # of a single task, it is the same as class-incremental
            runs = [run for run in runs if run["num_tasks"] > 1]
        heads = [found for run in runs if (found := own_head(run, head)) is not None]
        return [each for found in heads if (each := value(found)) is not None]

    return values


def _last(key: str, scale: float = 1.0) -> Callable[[list[Run]], list[float]]:
    return lambda runs: [
        scale * run[key][-1] for run in runs if run.get(key) and run[key][-1] is not None and in_turn(run)
    ]


def _each(key: str, scale: float = 1.0) -> Callable[[list[Run]], list[float]]:
    return lambda runs: [scale * run[key] for run in runs if key in run]


def _memory(of: Callable[[Run], float]) -> Callable[[list[Run]], list[float]]:
    return lambda runs: [of(run) for run in runs if "memory" in run]


def _share(run: Run) -> float:
    """Return the share of the training images that a run keeps, in percent; 0 where their number is not known."""
    per_class = run["settings"]["data"]["max_train_samples_per_class"]
    total = run.get("train_images") or (per_class or 0) * run["num_classes"]
    return round(100 * run["memory"]["images"] / total, 1) if total else 0.0


def seconds(run: Run) -> float:
    """Return the wall time of everything except evaluation."""
    return sum(value for name, value in run["seconds"].items() if name != "evaluation")
