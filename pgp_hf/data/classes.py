"""Divide classes into tasks, and give classes that come later their ids by name."""

from __future__ import annotations

import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from .checking import check_int, shorten

Labels = Sequence[Sequence[int | str]]
LabelNames = Sequence[str] | Mapping[Any, str]


@dataclass(frozen=True)
class Division:
    """Say how the classes of a dataset known in advance become tasks, in exactly one of three ways.

    Args:
        num_tasks: number of tasks, of (nearly) the same number of classes.
        tasks: the classes of each task, by name or by their value in the label column.
        init_classes: number of classes of the first task; `increment` by default.
        increment: number of classes of each further task.
        class_order: label ids in stream order, unless `tasks` says it.
    """

    num_tasks: int | None = None
    tasks: Labels | None = None
    init_classes: int | None = None
    increment: int | None = None
    class_order: Sequence[int] | None = None

    def check(self) -> None:
        """Raise TypeError or ValueError unless the arguments fit each other; the classes need not be known yet."""
        ways = [name for name in ("num_tasks", "tasks", "increment") if getattr(self, name) is not None]
        if self.init_classes is not None and self.increment is None:
            raise ValueError(
                f"init_classes={self.init_classes} needs increment, the number of classes of each further task"
            )
        if len(ways) != 1:
            got = f"got {' and '.join(ways)}" if ways else "got none of them"
            raise ValueError(
                f"tasks are made by num_tasks=, by tasks= or by increment= (with init_classes=), exactly one: {got}"
            )
        for name in ("num_tasks", "init_classes", "increment"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.tasks is not None and self.class_order is not None:
            raise ValueError("class_order and tasks were both given: tasks has the order already; pass one of them")

    def divide(
        self, names: Sequence[str], values: Sequence[int], column: str, seed: int | None
    ) -> tuple[list[tuple[int, ...]], list[int]]:
        """Divide the classes of a dataset.

        Args:
            names: of all classes.
            values: of all classes in the label column.
            column: the label column.
            seed: of the order, see [`_class_order`].

        Returns:
            The label ids of each task, and the classes that have these ids, in their order, as positions in `names`.

        Raises:
            TypeError, ValueError: tasks that the classes do not allow.
        """
        if self.tasks is not None:
            return _listed(self.tasks, names, values, column)
        order = np.array(_class_order(self.class_order, seed, len(names)))
        if self.num_tasks is not None:
            if self.num_tasks > len(names):
                raise ValueError(f"num_tasks={self.num_tasks} is more than the {len(names)} classes of {column!r}")
            parts = np.array_split(order, self.num_tasks)
        else:
            assert self.increment is not None, "see check"
            first = self.increment if self.init_classes is None else self.init_classes
            if first > len(names):
                name = "increment" if self.init_classes is None else "init_classes"
                raise ValueError(f"{name}={first} is more than the {len(names)} classes of {column!r}")
            parts = np.split(order, range(first, len(names), self.increment))
        return [tuple(part.tolist()) for part in parts], list(range(len(names)))


def drawn_order(seed: int, num_classes: int) -> list[int]:
    """Return the label ids 0..C-1 in the order that a seed draws."""
    return np.random.default_rng(seed).permutation(num_classes).tolist()


def _class_order(given: Sequence[int] | None, seed: int | None, num_classes: int) -> Sequence[int]:
    """Return the label ids in stream order: as given, drawn with `seed`, or in label order when `seed` is None."""
    if given is None:
        return range(num_classes) if seed is None else drawn_order(seed, num_classes)
    if not isinstance(given, Sequence | np.ndarray):
        raise TypeError(f"class_order must be a list of label ids, got {given!r} ({type(given).__name__})")
    order = [check_int("an element of class_order", label, 0, num_classes - 1) for label in given]
    duplicates = sorted(label for label, count in Counter(order).items() if count > 1)
    missing = sorted(set(range(num_classes)) - set(order))
    if duplicates or missing:
        raise ValueError(
            f"class_order must be a permutation of the label ids 0..{num_classes - 1}; "
            f"duplicates: {shorten(duplicates)}, missing: {shorten(missing)}"
        )
    return order


def _listed(
    tasks: Labels, names: Sequence[str], values: Sequence[int], column: str
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Find the classes that `tasks` lists by name or value; classes that it does not list are left out."""
    by_name, by_value = ({key: i for i, key in enumerate(keys)} for keys in (names, values))
    if isinstance(tasks, str) or not isinstance(tasks, Sequence | np.ndarray):
        raise TypeError(f"tasks must be a list of lists of classes, got {type(tasks).__name__}")
    found: list[list[int]] = []
    for t, task in enumerate(tasks):
        if isinstance(task, str) or not isinstance(task, Sequence | np.ndarray | range):
            raise TypeError(f"tasks[{t}] must be a list of classes, such as ['cat', 'dog'] or [3], got {task!r}")
        if len(task) == 0:
            raise ValueError(f"tasks[{t}] has no classes; leave it out")
        own = [by_name.get(one) if isinstance(one, str) else by_value.get(_value(one, t)) for one in task]
        if None in own:
            unknown = [one for one, position in zip(task, own, strict=True) if position is None]
            raise ValueError(
                f"tasks[{t}] names {shorten(unknown)}, not classes of {column!r}, which has {shorten(names)}; "
                "give names, or values of that column"
            )
        found.append([position for position in own if position is not None])
    if not found:
        raise ValueError("tasks has no task; list the classes of one at least")
    twice = [names[position] for position, count in Counter(chain(*found)).items() if count > 1]
    if twice:
        raise ValueError(f"tasks lists {shorten(twice)} more than once; a class belongs to one task")
    kept = sorted(chain(*found))
    ids = {position: label for label, position in enumerate(kept)}
    return [tuple(ids[position] for position in own) for own in found], kept


def _value(label: Any, task: int) -> int:
    return check_int(f"a class in tasks[{task}]", label, -(2**63), expected="a name or an integer")


def rename(
    names: Sequence[str], values: Sequence[int], given: LabelNames | None, column: str, named: bool
) -> list[str]:
    """Return the names of a dataset's classes.

    Args:
        names: as the dataset has them.
        values: of the classes in the label column.
        given: the names to use, by value.
        column: the label column.
        named: whether the dataset has names: a column of integers alone does not say what they mean.

    Raises:
        TypeError: names that are not strings, or `given` is neither a sequence nor a mapping.
        ValueError: a class without a name, or two of the same.
    """
    if given is None:
        if not named:
            raise ValueError(
                f"label column {column!r} holds integers {shorten(values)}, and classes are matched by name: say what they "
                f"mean by label_names, a list or a dict such as {{{values[0]}: 'cat'}}"
            )
        return list(names)
    if isinstance(given, str) or not isinstance(given, Mapping | Sequence):
        raise TypeError(
            f"label_names must be a list of names or a dict from value to name, got {type(given).__name__}"
        )
    by_value = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
    if isinstance(given, Sequence) and named and len(given) != len(names):
        raise ValueError(f"label_names has {len(given)} names, and {column!r} has {len(names)} classes")
    kept = dict(zip(values, names, strict=True)) if named else {}
    lacking = [value for value in values if value not in by_value and value not in kept]
    if lacking:
        raise ValueError(f"label_names has no name for {shorten(lacking)} in {column!r}; add them")
    if named and (unknown := [value for value in by_value if value not in kept]):
        raise ValueError(f"label_names names {shorten(unknown)}; {column!r} has the values 0..{len(names) - 1}")
    renamed = [by_value.get(value, kept.get(value)) for value in values]
    wrong = [name for name in renamed if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"label_names must be strings, got {shorten(wrong)}")
    return [str(name) for name in renamed]


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError if a class of a dataset has no name, or two have the same."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{shorten(twice)} name more than one class of the dataset; give each a name of its own")
    if any(not name.strip() for name in names):
        raise ValueError(f"the classes {shorten(names)} have one without a name; name it by label_names")


def warn_of_similar(names: Sequence[str], new: Sequence[str]) -> None:
    """Warn of new class names that look like another, known or new: see [`alike`]."""
    known: dict[str, str] = {}
    for name in names:
        known.setdefault(_plain(name), name)
    for name in new:
        other = known.setdefault(_plain(name), name)
        if other != name:
            warnings.warn(
                f"the new class {alike(name, other)}, and is another class: if it is the same, name it {other!r} by "
                "label_names",
                UserWarning,
                stacklevel=3,
            )


def alike(name: str, other: str) -> str | None:
    """Return how two names differ if they differ only in case, blanks, or Unicode form as "é" may; None otherwise."""
    if name == other or _plain(name) != _plain(other):
        return None
    if _composed(name) == _composed(other):
        return f"{name!a} differs from {other!a} only in the Unicode form of its letters"
    return f"{name!r} differs from {other!r} only in case or blanks"


def _plain(name: str) -> str:
    return _composed("".join(name.split()).casefold())


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
