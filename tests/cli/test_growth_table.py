"""The table of what was known and what is new."""

from __future__ import annotations

import pytest
import tiny

from pgp_hf import TaskStream
from pgp_hf.cli.growth import growth_table, known_classes

NAMES = ["ant", "bee", "cat", "dog", "eel"]


def manifest(*tasks, **more):
    """A `stream.json` of tasks, each `(classes, images)`."""
    entries = [{"classes": classes, "train": {"num_images": images}} for classes, images in tasks]
    return {"label_names": NAMES, "tasks": entries, **more}


def results(*rows, size=None):
    size = size or len(rows)
    full = [[*row, *[None] * (size - len(row))] for row in rows]
    return {"accuracy_matrix": [*full, *[[None] * size for _ in range(size - len(full))]]}


def cells(table):
    """The rows of a table, as a title and the columns that are filled."""
    return [[part.strip() for part in line.split("  ") if part.strip()] for line in table.splitlines()[2:]]


def test_accuracies_before_and_now():
    stream = manifest(([0, 1], 10), ([2], 5), ([3, 4], 8))
    table = growth_table(results([90.0], [80.0, 70.0], [60.0, 65.0, 99.0]), stream, known=2)
    assert table.splitlines()[0].split() == ["images", "before", "now"]
    assert cells(table) == [
        ["known", "task 1: ant, bee", "10", "80.00", "60.00"],
        ["known", "task 2: cat", "5", "70.00", "65.00"],
        ["known", "all 3 classes", "15", "75.00", "62.50"],
        ["new", "task 3: dog, eel", "8", "99.00"],
        ["all 5 classes", "23", "74.67"],
    ]


def test_what_was_not_measured_is_called_so():
    stream = manifest(([0, 1], 10), ([2], 5), ([3], 8))
    found = cells(growth_table(results([90.0], [80.0, 70.0], [None, 65.0, 99.0]), stream, known=2))
    assert found[0][-2:] == ["80.00", "not measured"] and found[1][-1] == "65.00"
    assert found[2][-2:] == ["75.00", "not measured"] and found[-1][-1] == "not measured"
    nothing = growth_table(results([90.0], [80.0, 70.0], [None, None, None]), stream, known=2)
    assert [row[-1] for row in cells(nothing)] == ["not measured"] * 5


def test_new_images_of_known_classes():
    stream = manifest(([0, 1], 10), ([1, 2], 5), ([0], 3))
    stream["tasks"][1]["new_classes"], stream["tasks"][2]["new_classes"] = [2], []
    found = cells(growth_table(results([90.0], [80.0, 70.0], [80.0, 70.0, 90.0]), stream, known=1))
    assert [row[1] for row in found] == [
        "task 1: ant, bee",
        "task 2: cat; more of bee",
        "task 3: more of ant",
        "all 1 class",
        "18",
    ]


@pytest.mark.parametrize("known", [0, 1])
def test_single_tasks_have_no_sums_of_their_own(known):
    stream = manifest(*[([0, 1], 10), ([2], 5)][: known + 1])
    rows = [[90.0], [80.0, 70.0]][: known + 1]
    assert len(cells(growth_table(results(*rows), stream, known))) == known + 2


def test_many_classes_are_shortened():
    stream = {
        "label_names": [f"kind\n{c}" for c in range(9)],
        "tasks": [{"classes": list(range(9)), "train": {"num_images": 9}}],
    }
    row = cells(growth_table(results([50.0]), stream, 0))[0]
    assert row[1] == "task 1: kind 0, kind 1, kind 2, kind 3, kind 4, kind 5 and 3 more"


def test_long_names_leave_the_table_within_100_columns():
    stream = {
        "label_names": [f"a rather long name of class {c}" for c in range(9)],
        "tasks": [{"classes": list(range(9)), "train": {"num_images": 9}}],
    }
    table = growth_table(results([50.0]), stream, 0)
    assert max(map(len, table.splitlines())) <= 100 and "task 1: a rather long name of class 0 and 8 more" in table


def test_known_classes():
    stream = tiny.stream(num_tasks=2)
    names = [stream.label_names[label] for label in stream.class_order]
    assert known_classes(stream) == f"6 classes ({', '.join(names)})"
    assert known_classes(TaskStream.empty()) == "0 classes"
