"""How the classes of a dataset become tasks: by number, by list, by size; and what streams known in advance contain."""

from __future__ import annotations

import hashlib
import json

import datasets
import numpy as np
import pytest
from numbered import NAMES, cycle, make, numbers_of

from pgp_hf.data.stream import Task, TaskStream

INTEGERS = [70, 10, -5, 10, 70, -5] * 4


@pytest.fixture
def splits() -> datasets.DatasetDict:
    return datasets.DatasetDict(train=make(cycle(60)), test=make(cycle(24), first=500))


# ---- streams as they were -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        # of the manifests as they were written before streams could be open
        ({"num_tasks": 3}, "428693e6a1f6a904"),
        ({"num_tasks": 2, "seed": 5, "scenario": "online"}, "6e283fb3f6efd749"),
        (
            {"num_tasks": 4, "seed": None, "max_train_samples_per_class": 4, "max_eval_samples_per_class": 2},
            "466eca38fb7c06ac",
        ),
        ({"num_tasks": 2, "train_val_split": 0.3}, "b0b91dd1ec98da61"),
        ({"num_tasks": 2, "class_order": [5, 3, 1, 0, 2, 4]}, "9194c00f72d7a399"),
        (
            {
                "num_tasks": 3,
                "seed": 2,
                "test_dataset": None,
                "test_fraction": 0.3,
                "train_val_split": 0.25,
                "max_eval_samples_per_class": 2,
            },
            "368118a40252a020",
        ),
    ],
)
def test_manifests_of_streams_known_in_advance_are_the_same_to_the_byte(settings, digest):
    contents = [f"image {i}".encode() for i in range(84)]  # the bytes of a PNG depend on the version of PIL
    train, test = make(cycle(60), contents[:60]), make(cycle(24), contents[60:])
    manifest = TaskStream.from_dataset(train, **{"test_dataset": test, **settings}).manifest()
    manifest["dataset"] = None  # fingerprints are those of `datasets`
    assert hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16] == digest


def test_a_stream_known_in_advance_is_not_open(splits):
    stream = TaskStream.from_dataset(splits, num_tasks=2)
    assert not stream.is_open and all(task.new_classes == task.classes for task in stream.tasks)
    for split, images in (("train", stream.train), ("test", stream.test)):
        assert [stream.num_images(split, t) for t in range(2)] == [len(images(t)) for t in range(2)]
    assert stream.has_train(1) and stream.has_test(1)
    assert not stream.joined().is_open and stream.joined().num_images("train", 0) == 60


# ---- tasks that are listed ------------------------------------------------------------------------------------------


def test_tasks_by_name_and_by_label_id(splits):
    stream = TaskStream.from_dataset(splits, tasks=[["dog", "ant"], [2, "fox", np.int64(1)], [4]])
    assert stream.tasks == [Task(0, (3, 0)), Task(1, (2, 5, 1)), Task(2, (4,))]
    assert stream.class_order == [3, 0, 2, 5, 1, 4] and stream.label_names == NAMES
    one = TaskStream.from_dataset(splits, num_tasks=1, class_order=stream.class_order)
    assert stream.joined().manifest() == one.manifest()
    equal = TaskStream.from_dataset(splits, num_tasks=2, class_order=[3, 0, 2, 5, 1, 4]).manifest()
    assert TaskStream.from_dataset(splits, tasks=[[3, 0, 2], [5, 1, 4]]).manifest() == equal


def test_classes_that_are_not_listed_are_left_out_with_their_images(splits):
    stream = TaskStream.from_dataset(splits, tasks=[["fox"], ["bee", "dog"]])
    assert stream.label_names == ["bee", "dog", "fox"] and stream.tasks == [Task(0, (2,)), Task(1, (0, 1))]
    for t, names in enumerate([{"fox"}, {"bee", "dog"}]):
        for split, part, first in (("train", stream.train, 0), ("test", stream.test, 500)):
            rows = [number - first for number in numbers_of(part(t))]
            assert rows == [i for i, label in enumerate(splits[split]["label"]) if NAMES[label] in names]
            assert [stream.label_names[c] for c in part(t).labels] == [NAMES[splits[split]["label"][i]] for i in rows]
    manifest = stream.manifest()
    assert (manifest["num_classes"], manifest["label_values"]) == (3, [1, 3, 5])
    assert manifest.keys() == TaskStream.from_dataset(splits, num_tasks=2).manifest().keys()
    few = splits.filter(lambda label: label in (1, 3, 5), input_columns="label")
    compact = [few[name].cast_column("label", datasets.Value("int64")) for name in ("train", "test")]
    same = TaskStream.from_dataset(compact[0], test_dataset=compact[1], tasks=[[5], [1, 3]])
    assert [task["train"] for task in same.manifest()["tasks"]] == [task["train"] for task in manifest["tasks"]]


def test_held_out_rows_of_listed_classes(splits):
    stream = TaskStream.from_dataset(splits["train"], tasks=[["bee"], ["fox"]], test_fraction=0.3)
    rows = numbers_of(stream.train(1)) + numbers_of(stream.test(1))
    assert sorted(rows) == [i for i, label in enumerate(cycle(60)) if label == 5] and len(stream.test(1)) == 3


def test_listed_integers_are_values_of_the_column():
    data = make(INTEGERS, label_feature=datasets.Value("int16"))
    stream = TaskStream.from_dataset(data, tasks=[[70], ["-5"]])
    assert stream.label_names == ["-5", "70"] and stream.manifest()["label_values"] == [-5, 70]
    assert stream.tasks == [Task(0, (1,)), Task(1, (0,))]


# ---- tasks by size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"increment": 2}, [2, 2, 2]),
        ({"increment": 4}, [4, 2]),
        ({"increment": 6}, [6]),
        ({"init_classes": 3, "increment": 2}, [3, 2, 1]),
        ({"init_classes": 1, "increment": 5}, [1, 5]),
        ({"init_classes": 6, "increment": 9}, [6]),
    ],
)
@pytest.mark.parametrize("order", [{"seed": 4}, {"class_order": [5, 4, 3, 2, 1, 0]}])
def test_tasks_by_size(splits, settings, sizes, order):
    stream = TaskStream.from_dataset(splits, **settings, **order)
    assert [len(task.classes) for task in stream.tasks] == sizes
    assert stream.class_order == TaskStream.from_dataset(splits, num_tasks=1, **order).class_order
    assert [label for task in stream.tasks for label in task.classes] == stream.class_order
    listed = TaskStream.from_dataset(splits, tasks=[task.classes for task in stream.tasks], seed=order.get("seed", 0))
    assert listed.manifest() == stream.manifest()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one: got none of them"),
        ({"num_tasks": 2, "tasks": [[0]]}, ValueError, "exactly one: got num_tasks and tasks"),
        ({"num_tasks": 2, "increment": 2}, ValueError, "exactly one: got num_tasks and increment"),
        ({"tasks": [[0]], "increment": 2, "init_classes": 1}, ValueError, "got tasks and increment"),
        ({"init_classes": 2}, ValueError, "init_classes=2 needs increment"),
        ({"num_tasks": 2, "init_classes": 2}, ValueError, "init_classes=2 needs increment"),
        ({"increment": 0}, ValueError, "increment must be at least 1, got 0"),
        ({"increment": 2.0}, TypeError, "increment must be an integer"),
        ({"increment": 7}, ValueError, "increment=7 is more than the 6 classes of 'label'"),
        ({"init_classes": 7, "increment": 1}, ValueError, "init_classes=7 is more than the 6 classes"),
        ({"init_classes": 0, "increment": 1}, ValueError, "init_classes must be at least 1"),
        ({"tasks": [[0], [1]], "class_order": [0, 1]}, ValueError, "class_order and tasks were both given"),
        ({"tasks": []}, ValueError, "tasks has no task"),
        ({"tasks": [["ant"], []]}, ValueError, r"tasks\[1\] has no classes"),
        ({"tasks": ["ant", "bee"]}, TypeError, r"tasks\[0\] must be a list of classes.*got 'ant'"),
        ({"tasks": "ant"}, TypeError, "tasks must be a list of lists of classes, got str"),
        ({"tasks": [{"ant", "bee"}]}, TypeError, r"tasks\[0\] must be a list"),
        ({"tasks": [[0.5]]}, TypeError, r"a class in tasks\[0\] must be a name or an integer, got 0.5"),
        (
            {"tasks": [["ant", "gnu", 9]]},
            ValueError,
            r"tasks\[0\] names \['gnu', 9\], not classes of 'label', which has",
        ),
        ({"tasks": [["ant", "bee"], [0]]}, ValueError, r"tasks lists \['ant'\] more than once"),
        ({"tasks": [["ant", "ant"]]}, ValueError, r"tasks lists \['ant'\] more than once"),
    ],
)
def test_bad_divisions(splits, arguments, error, message):
    with pytest.raises(error, match=message):
        TaskStream.from_dataset(splits, **arguments)
