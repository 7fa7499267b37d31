"""Streams made from the manifest of an earlier run, without its training images and with or without its test images."""

from __future__ import annotations

import copy
import json
import pickle

import datasets
import pytest
from numbered import NAMES, cycle, make, numbers_of

from pgp_hf.data.stream import Task, TaskStream

TRAIN, TEST = make(cycle(60)), make(cycle(24), first=500)
BOTH = datasets.DatasetDict(train=TRAIN, test=TEST)


def named(labels: list[str], first: int = 0) -> datasets.Dataset:
    """A dataset of one image for each of `labels`."""
    names = sorted(set(labels))
    return make([names.index(label) for label in labels], label_feature=datasets.ClassLabel(names=names), first=first)


def renamed(data: datasets.Dataset, names: list[str]) -> datasets.Dataset:
    """The same images with a ClassLabel whose names stand in another order."""
    labels = [names.index(NAMES[label]) for label in data["label"]]
    feature = datasets.ClassLabel(names=names)
    return data.remove_columns("label").add_column("label", labels).cast_column("label", feature)


def grown(**settings) -> TaskStream:
    """A stream known in advance, to which a task with a known and a new class was appended."""
    stream = TaskStream.from_dataset(BOTH, num_tasks=3, **settings)
    stream.append(named(["gnu", "ant"] * 10, first=100), max_eval_samples_per_class=1)
    return stream


# ---- from a manifest and back ---------------------------------------------------------------------------------------


def streams():
    """Streams of all kinds, by what they are."""
    integers = make([70, 10, -5] * 8, label_feature=datasets.Value("int16"))
    empty = TaskStream.empty("online", seed=None)
    one = TaskStream.empty(seed=5)
    one.append(named(["cat"]))
    again = TaskStream.from_manifest(grown().manifest())
    again.append(named(["ant", "yak"] * 4))
    return {
        "known": TaskStream.from_dataset(BOTH, num_tasks=3),
        "held out": TaskStream.from_dataset(TRAIN, num_tasks=2, test_fraction=0.4, max_train_samples_per_class=3),
        "validation": TaskStream.from_dataset(BOTH, num_tasks=2, train_val_split=0.2),
        "listed": TaskStream.from_dataset(BOTH, tasks=[["fox"], ["bee", 3]]),
        "integers": TaskStream.from_dataset(integers, increment=2),
        "joined": TaskStream.from_dataset(BOTH, num_tasks=3).joined(),
        "empty": empty,
        "one image": one,
        "grown": grown(),
        "grown again": again,
    }


@pytest.mark.parametrize("name", streams())
def test_a_manifest_gives_the_stream_that_it_was_written_of(name):
    stream = streams()[name]
    manifest = json.loads(json.dumps(stream.manifest()))
    made = TaskStream.from_manifest(manifest)
    assert made.manifest() == manifest == stream.manifest() and made.is_open
    for attribute in (
        "tasks",
        "label_names",
        "class_order",
        "id2label",
        "num_tasks",
        "num_classes",
        "seed",
        "scenario",
    ):
        assert getattr(made, attribute) == getattr(stream, attribute)
    for t in range(made.num_tasks):
        assert not made.has_train(t) and not made.has_test(t)
        assert made.seen_classes(t) == stream.seen_classes(t)
        assert [made.num_images(s, t) for s in ("train", "test")] == [
            stream.num_images(s, t) for s in ("train", "test")
        ]
    made.check_manifest(manifest)
    made.verify()
    manifest["label_names"].append("changed")  # by the caller
    assert made.manifest() == stream.manifest()
    assert pickle.loads(pickle.dumps(made)).manifest() == stream.manifest()


def test_images_that_are_not_here():
    made = TaskStream.from_manifest(grown().manifest())
    with pytest.raises(ValueError, match=r"the 20 train images of task 1 \(0-based\) are not here"):
        made.train(1)
    with pytest.raises(ValueError, match=r"the 8 test images of task 1 .* are not here.*pass test_dataset"):
        made.test(1)


def test_more_can_be_appended_than_was_known():
    made = TaskStream.from_manifest(grown().manifest())
    task = made.append(named(["ant", "yak", "gnu"] * 5, first=200))
    assert task == Task(4, (*(c for c in made.class_order if c in (0, 6)), 7), (7,)) and made.label_names[7] == "yak"
    assert made.has_train(4) and made.has_test(4) and not made.has_train(3)
    made.verify()
    made.check_manifest(grown().manifest(), tasks=4)
    in_one = grown()
    in_one.append(named(["ant", "yak", "gnu"] * 5, first=200))
    assert in_one.manifest() == made.manifest()


# ---- a stream that goes on earlier ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", range(5))
def test_the_first_tasks_alone(kept):
    whole = grown()
    made = TaskStream.from_manifest(whole.manifest(), num_tasks=kept)
    assert made.tasks == whole.tasks[:kept] and made.num_tasks == kept
    assert made.label_names == whole.label_names and made.num_classes == 7  # the names stay
    assert made.class_order == [c for task in whole.tasks[:kept] for c in task.new_classes]
    manifest = made.manifest()
    assert manifest["tasks"] == whole.manifest()["tasks"][:kept] and manifest["class_order"] == made.class_order
    assert TaskStream.from_manifest(manifest).manifest() == manifest
    made.check_manifest(whole.manifest(), tasks=kept)
    whole.check_manifest(manifest, tasks=kept)


def test_a_name_whose_class_never_came_has_its_id():
    made = TaskStream.from_manifest(TaskStream.from_dataset(BOTH, tasks=[[0, 1], [4, 5]]).manifest(), num_tasks=1)
    assert made.label_names == ["ant", "bee", "eel", "fox"] and made.class_order == [0, 1]
    task = made.append(named(["fox", "cow", "ant"] * 4, first=100))
    assert task == Task(1, (0, 3, 4), (3, 4)) and made.label_names == ["ant", "bee", "eel", "fox", "cow"]
    manifest = made.manifest()
    assert manifest["tasks"][1]["new_classes"] == [3, 4] and manifest["class_order"] == [0, 1, 3, 4]
    assert TaskStream.from_manifest(manifest).manifest() == manifest  # the eel may come yet
    made.withdraw()
    assert made.label_names == ["ant", "bee", "eel", "fox"] and made.class_order == [0, 1]


@pytest.mark.parametrize(("kept", "error"), [(5, ValueError), (-1, ValueError), ("2", TypeError), (True, TypeError)])
def test_a_number_of_tasks_that_the_manifest_does_not_have(kept, error):
    with pytest.raises(error, match="num_tasks must be"):
        TaskStream.from_manifest(grown().manifest(), num_tasks=kept)


# ---- test images ----------------------------------------------------------------------------------------------------


def same_test_images(made: TaskStream, stream: TaskStream, tasks: range | list[int]) -> bool:
    return all(
        numbers_of(made.test(t)) == numbers_of(stream.test(t))
        and made.test(t).labels.tolist() == stream.test(t).labels.tolist()
        for t in tasks
    )


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("given", ["test split", "all splits", "another order of names", "integers"])
def test_the_test_images_of_the_run_are_found(given, limit):
    stream = TaskStream.from_dataset(BOTH, num_tasks=3, seed=4, max_eval_samples_per_class=limit)
    test = {
        "test split": TEST,
        "all splits": BOTH,
        "another order of names": renamed(TEST, NAMES[::-1]),
        "integers": TEST.cast_column("label", datasets.Value("int64")),
    }[given]
    made = TaskStream.from_manifest(stream.manifest(), test)
    assert [made.has_test(t) for t in range(3)] == [True] * 3 and not made.has_train(0)
    assert same_test_images(made, stream, range(3)) and made.manifest() == stream.manifest()
    made.verify()


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("shares", [{"test_fraction": 0.4}, {"train_val_split": 0.3}, {"test_fraction": 0.3}])
@pytest.mark.parametrize("as_dict", [False, True])
def test_held_out_images_are_found_in_the_original_training_images(shares, limit, as_dict):
    given = datasets.DatasetDict(train=TRAIN, test=TEST) if "train_val_split" in shares else TRAIN
    stream = TaskStream.from_dataset(given, num_tasks=3, seed=4, max_eval_samples_per_class=limit, **shares)
    for data in (TRAIN, renamed(TRAIN, NAMES[::-1])):
        made = TaskStream.from_manifest(stream.manifest(), datasets.DatasetDict(train=data) if as_dict else data)
        assert same_test_images(made, stream, range(3)) and made.manifest() == stream.manifest()
    held = datasets.concatenate_datasets([TRAIN.select(numbers_of(stream.test(t))) for t in range(3)])
    made = TaskStream.from_manifest(stream.manifest(), held)  # what was held out, kept by itself
    assert same_test_images(made, stream, range(3))


def test_held_out_images_of_appended_tasks_are_found():
    stream, new = TaskStream.empty(seed=6), named(["yak", "gnu"] * 10, first=100)
    stream.append(TRAIN, test_fraction=0.3)
    stream.append(new, max_eval_samples_per_class=1)
    stream.append(make([3, 1] * 5, label_feature=datasets.Value("int8"), first=200), label_names={3: "ape", 1: "hen"})
    manifest = stream.manifest()
    for data, t in ((TRAIN, 0), (new, 1), (make([3, 1] * 5, label_feature=datasets.Value("int8"), first=200), 2)):
        made = TaskStream.from_manifest(manifest, data)
        assert [made.has_test(each) for each in range(3)] == [each == t for each in range(3)]
        assert same_test_images(made, stream, [t]) and made.manifest() == manifest


def test_images_of_a_class_that_came_twice_belong_to_the_task_that_brought_them():
    stream, again = TaskStream.empty(), named(["ant", "bee"] * 10, first=100)
    stream.append(BOTH)
    stream.append(again)
    for data, t in ((BOTH, 0), (TEST, 0), (again, 1)):
        made = TaskStream.from_manifest(stream.manifest(), data)
        assert [made.has_test(each) for each in range(2)] == [each == t for each in range(2)]
        assert same_test_images(made, stream, [t])


def test_tasks_of_whose_classes_there_is_no_image_stay_without():
    stream = TaskStream.from_dataset(BOTH, num_tasks=3, class_order=range(6))
    some = TEST.filter(lambda label: label in (2, 3), input_columns="label")
    made = TaskStream.from_manifest(stream.manifest(), some)
    assert [made.has_test(t) for t in range(3)] == [False, True, False] and made.manifest() == stream.manifest()
    assert TaskStream.from_manifest(stream.manifest(), TEST, num_tasks=2).has_test(1)


@pytest.mark.parametrize(
    "other",
    [
        TEST.select(range(23)),
        make(cycle(24), first=501),
        datasets.concatenate_datasets([TEST, make([0], first=900)]),
        TEST.filter(lambda label: label != 0, input_columns="label"),
        TEST.select(range(23, -1, -1)),
        TRAIN,  # the run held nothing out of it
        datasets.DatasetDict(train=TEST, test=TRAIN),
    ],
)
def test_images_that_are_not_those_of_the_run_are_refused(other):
    stream = TaskStream.from_dataset(BOTH, tasks=[["ant", "cat"], [1, 3, 4, 5]])
    with pytest.raises(
        ValueError, match=r"not have the test images of task \d .*Pass what the run was tested on, or leave"
    ):
        TaskStream.from_manifest(stream.manifest(), other)


@pytest.mark.parametrize("settings", [{"seed": 5}, {"test_fraction": 0.4}])
def test_held_out_images_under_other_settings_are_refused(settings):
    manifest = {**TaskStream.from_dataset(TRAIN, num_tasks=2, seed=4, test_fraction=0.3).manifest(), **settings}
    with pytest.raises(ValueError, match=r"test images of task 0 \(0-based, classes \["):
        TaskStream.from_manifest(manifest, TRAIN)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (named(["gnu", "yak"]), ValueError, r"test_dataset has no image of the classes \['.*leave it out"),
        (TEST.to_iterable_dataset(), TypeError, "test_dataset is a streaming IterableDataset"),
        ([1], TypeError, "got list"),
        ("./nowhere", ValueError, "neither an existing folder nor a Hub id"),
        (datasets.DatasetDict(extra=TEST), ValueError, r"no split 'test' or 'train', only \['extra'\]"),
        (TEST.remove_columns("label"), ValueError, "label_column cannot be inferred"),
    ],
)
def test_bad_test_datasets(other, error, message):
    with pytest.raises(error, match=message):
        TaskStream.from_manifest(TaskStream.from_dataset(BOTH, num_tasks=2).manifest(), other)


def test_test_images_come_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, data in BOTH.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    stream = TaskStream.from_dataset(BOTH, num_tasks=2)
    assert same_test_images(TaskStream.from_manifest(stream.manifest(), tmp_path / "data"), stream, range(2))


# ---- manifests that do not describe a stream ------------------------------------------------------------------------


def change(**keys):
    def edit(manifest):
        manifest.update({key: value(manifest[key]) if callable(value) else value for key, value in keys.items()})

    return edit


def task(t, **keys):
    return lambda manifest: manifest["tasks"][t].update(keys)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(format=2), "format must be 1, got 2"),
        (lambda manifest: manifest.pop("seed"), r"manifest lacks \['seed'\]"),
        (lambda manifest: manifest.pop("tasks"), r"manifest lacks \['tasks'\]"),
        (change(tasks=None), "does not describe a stream"),
        (change(num_tasks=3), "expected tasks with the classes 0 to"),
        (change(num_classes=8), "expected tasks with the classes 0 to"),
        (change(label_names=lambda names: names[:-1]), "label_names=.* are not 7 strings"),
        (change(label_names=[1] * 7), "label_names=.* are not 7 strings"),
        (task(0, classes=[]), "expected tasks with the classes 0 to"),
        (task(0, classes=[0, 0]), "expected tasks with the classes 0 to"),
        (task(0, classes=[7]), "expected tasks with the classes 0 to"),
        (task(3, new_classes=[0, 6]), "each new in one task alone"),
        (task(3, new_classes=[]), "each new in one task alone"),
        (lambda manifest: manifest["tasks"][1].pop("train"), "it lacks 'train'"),
        (task(1, test={"num_images": -1, "sha256": "a"}), r"num_images must be in 0\.\.100000000, got -1"),
        (task(1, test={"num_images": 0, "sha256": "a"}), "0 test images with sha256='a'"),
        (task(1, train={"num_images": 3, "sha256": None}), "3 train images with sha256=None"),
    ],
)
def test_manifests_that_contradict_themselves(edit, message):
    manifest = copy.deepcopy(grown().manifest())
    edit(manifest)
    with pytest.raises(ValueError, match=message):
        TaskStream.from_manifest(manifest)


def test_something_that_is_not_a_manifest():
    with pytest.raises(TypeError, match="got list"):
        TaskStream.from_manifest([])


# ---- comparing the first tasks --------------------------------------------------------------------------------------


def test_streams_that_begin_alike():
    short, long = grown(), grown()
    long.append(named(["yak", "bee"] * 4, first=300))
    short.check_manifest(long.manifest(), tasks=4)
    long.check_manifest(short.manifest(), tasks=4)
    with pytest.raises(ValueError, match="num_tasks: 4 here, 5 in the manifest"):
        short.check_manifest(long.manifest())
    for here, there, where in ((short, long, "here"), (long, short, "there")):
        with pytest.raises(ValueError, match=f"5 tasks cannot be compared: there are 4 {where}"):
            here.check_manifest(there.manifest(), tasks=5)
    with pytest.raises(ValueError, match="tasks must be at least 0"):
        short.check_manifest(long.manifest(), tasks=-1)


@pytest.mark.parametrize(
    ("labels", "first", "arguments", "message"),
    [
        (["gnu", "ant"], 101, {}, r"train images of task 3 \(0-based\), sha256"),
        (["gnu", "bee"], 100, {}, r"classes of task 3 \(0-based\)"),
        (["hen", "ant"], 100, {}, r"label_names\[6\]: 'gnu' here, 'hen' in the manifest"),
        (["gnu", "ant", "ant"], 100, {}, r"train images of task 3 \(0-based\), num_images"),
        (
            ["gnu", "ant"],
            100,
            {"max_eval_samples_per_class": 2},
            r"test images of task 3 .*differ: max_eval_samples_per",
        ),
    ],
)
@pytest.mark.parametrize("tasks", [None, 4])
def test_an_appended_task_that_differs(labels, first, arguments, message, tasks):
    other = TaskStream.from_dataset(BOTH, num_tasks=3)
    other.append(named(labels * 10, first=first), **{"max_eval_samples_per_class": 1, **arguments})
    with pytest.raises(ValueError, match=message):
        grown().check_manifest(other.manifest(), tasks=tasks)
    if "hen" not in labels:  # what names both have must agree, whichever task brought them
        grown().check_manifest(other.manifest(), tasks=3)


def test_training_images_that_are_gone_are_known_by_the_manifest(monkeypatch):
    manifest = grown().manifest()
    stream, hashed = grown(), []
    original = type(stream._parts["train"][0].source).digests
    monkeypatch.setattr(
        "pgp_hf.data.rows.ImageRows.digests",
        lambda self, groups: [hashed.extend(len(group) for group in groups), original(self, groups)][1],
    )
    wrong = copy.deepcopy(manifest)
    wrong["tasks"][3]["test"]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="test images of task 3"):
        stream.check_manifest(wrong, gone=3)
    assert sorted(hashed) == sorted([16] + [stream.num_images("test", t) for t in range(4)])
    hashed.clear()
    assert stream.manifest() == manifest and sorted(hashed) == [20] * 3  # nothing was taken from the wrong manifest
