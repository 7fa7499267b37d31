"""Tabulate what a run knew before it learned on, and what it knows now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..data.markup import shorten_names
from ..data.stream import TaskStream
from ..report.formatting import WIDTH, one_line, printable
from ..report.table import plain

NOT_MEASURED = "not measured"
_SHOWN = 6  # class names in a row

Tasks = Sequence[Mapping[str, Any]]
Accuracies = Sequence[float | None]


def growth_table(results: Mapping[str, Any], manifest: Mapping[str, Any], known: int) -> str:
    """Return a table of the tasks: their classes, training images, and accuracies before and now.

    Args:
        results: content of `results.json` after the last task.
        manifest: content of `stream.json`, likewise.
        known: number of tasks that were learned before; the others are new.
    """
    for shown in range(_SHOWN, 0, -1):  # class names in a row: as many as fit
        table = _table(results, manifest, known, shown)
        if max(map(len, table.splitlines())) <= WIDTH:
            break
    return table


def _table(results: Mapping[str, Any], manifest: Mapping[str, Any], known: int, shown: int) -> str:
    tasks, names = manifest["tasks"], manifest["label_names"]
    before, now = (results["accuracy_matrix"][count - 1][:count] if count else [] for count in (known, len(tasks)))
    rows = [["", "images", "before", "now"]]
    for kind, part in (("known", range(known)), ("new", range(known, len(tasks)))):
        for t in part:
            accuracies = [_mean(before[t : t + 1]), _mean(now[t : t + 1])]
            title = f"{kind:<5}  task {t + 1}: {_described(tasks[t], names, shown)}"
            rows.append([title, _images([tasks[t]]), *accuracies])
        if known and len(part) > 1:
            own = tasks[part.start : part.stop]
            title = f"{kind:<5}  all {_counted(own, tasks[: part.start])}"
            rows.append([title, _images(own), _mean(before[part.start :]), _mean(now[part.start : part.stop])])
    rows.append([f"all {_counted(tasks)}", _images(tasks), "", _mean(now)])
    return plain(rows)


def known_classes(stream: TaskStream) -> str:
    """Return the number and the names of the classes that a stream has so far."""
    names = [stream.label_names[label] for label in stream.class_order]
    return f"{_count(len(names))} ({_names(names)})" if names else _count(0)


def _names(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Return class names as a phrase; of many, the first ones and how many more there are."""
    return shorten_names([printable(one_line(name)) for name in names], shown)


def _described(task: Mapping[str, Any], names: Sequence[str], shown: int) -> str:
    """Return the names of a task's new classes, and of known ones that it has more images of."""
    new = task.get("new_classes", task["classes"])
    parts = [_names([names[label] for label in new], shown)] if new else []
    if old := [names[label] for label in task["classes"] if label not in new]:
        parts.append(f"more of {_names(old, shown)}")
    return "; ".join(parts)


def _counted(tasks: Tasks, others: Tasks = ()) -> str:
    """Return the number of classes in tasks that are not in others."""
    return _count(len(_labels(tasks) - _labels(others)))


def _count(classes: int) -> str:
    return f"{classes} {'class' if classes == 1 else 'classes'}"


def _labels(tasks: Tasks) -> set[int]:
    return {label for task in tasks for label in task["classes"]}


def _images(tasks: Tasks) -> str:
    return str(sum(task["train"]["num_images"] for task in tasks))


def _mean(accuracies: Accuracies) -> str:
    """Return the mean of accuracies in percent; nothing where there are none."""
    found = [value for value in accuracies if value is not None]
    if len(found) < len(accuracies):
        return NOT_MEASURED
    return f"{fmean(found):.2f}" if found else ""
