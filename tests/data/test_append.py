"""Streams that begin with nothing, or go on after they were known: tasks appended and withdrawn."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import datasets
import numpy as np
import pytest
import torch
from numbered import NAMES, cycle, make, numbers_of, pixel

from pgp_hf.data.stream import Task, TaskStream


def named(labels: list[str], first: int = 0, names: list[str] | None = None) -> datasets.Dataset:
    """A dataset of one image for each of `labels`, whose ClassLabel may name more classes."""
    names = names or sorted(set(labels))
    return make([names.index(label) for label in labels], label_feature=datasets.ClassLabel(names=names), first=first)


def state(stream: TaskStream) -> bytes:
    """All that a stream holds, besides the hashes that it has computed."""
    manifest = stream.manifest()
    return pickle.dumps((manifest, vars(stream), stream.is_open, stream.id2label, stream.class_order))


@pytest.fixture
def stream() -> TaskStream:
    """Two appended tasks: dog and cat; cat again, and the new ant."""
    made = TaskStream.empty(seed=3)
    made.append(named(["dog", "cat"] * 10))
    made.append(named(["cat", "ant"] * 10, first=100))
    return made


# ---- streams that begin with nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "online"])
def test_an_empty_stream(scenario):
    empty = TaskStream.empty(scenario, seed=2)
    assert (empty.num_tasks, empty.num_classes, empty.tasks, empty.label_names, empty.class_order) == (
        0,
        0,
        [],
        [],
        [],
    )
    assert empty.is_open and empty.id2label == {} and empty.scenario == scenario and scenario in repr(empty)
    assert empty.manifest() == {
        "format": 1,
        "dataset": {"name": None, "fingerprint": {"train": None, "test": None}},
        "scenario": scenario,
        "seed": 2,
        "num_tasks": 0,
        "num_classes": 0,
        "label_column": None,
        "image_column": None,
        "label_names": [],
        "label_values": [],
        "class_order": [],
        "test_fraction": None,
        "max_train_samples_per_class": None,
        "max_eval_samples_per_class": None,
        "tasks": [],
    }
    assert TaskStream.from_manifest(empty.manifest()).manifest() == empty.manifest()
    empty.verify()
    empty.check_manifest(empty.manifest(), gone=3)
    for call in (empty.train, empty.test, empty.has_train, empty.has_test, empty.seen_classes):
        with pytest.raises(ValueError, match="no task 0: the stream is empty; append one"):
            call(0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scenario": "domain"}, ValueError, "scenario must be one of"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": "0"}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_beginnings(arguments, error, message):
    with pytest.raises(error, match=message):
        TaskStream.empty(**arguments)


def test_classes_get_ids_as_they_come(stream):
    assert stream.label_names == ["cat", "dog", "ant"] and stream.num_classes == 3 and stream.is_open
    assert stream.tasks == [Task(0, (0, 1)), Task(1, (0, 2), (2,))] and stream.num_tasks == 2
    assert stream.class_order == [0, 1, 2] and stream.id2label == {0: "cat", 1: "dog", 2: "ant"}
    assert stream.seen_classes(0) == [0, 1] and stream.seen_classes(1) == [0, 1, 2]
    assert stream.allowed_classes(0, 0) == [0, 1] and stream.allowed_classes(1, 0) == [0, 1, 2]
    task = stream.append(named(["dog", "cat"] * 4, first=300))
    assert task == Task(2, (0, 1), ()) == stream.tasks[2] and stream.class_order == [0, 1, 2]
    single = stream.append(named(["gnu"] * 3, first=400))
    assert single == Task(3, (3,)) and stream.label_names[3] == "gnu" and stream.seen_classes(3) == [0, 1, 2, 3]


def test_classes_of_a_task_come_in_stream_order():
    stream = TaskStream.from_dataset(make(cycle(60)), num_tasks=2, class_order=[5, 3, 1, 0, 2, 4])
    assert stream.append(make(cycle(12), first=100)).classes == (5, 3, 1, 0, 2, 4)
    added = stream.append(named(["yak", "fox", "bee", "hen"] * 2, first=200))
    assert added.classes == (5, 1, 6, 7) and added.new_classes == (6, 7) and stream.label_names[6:] == ["hen", "yak"]


def test_the_task_of_a_test_image_given_its_classes_compete():
    stream = TaskStream.empty("task_incremental")
    stream.append(named(["dog", "cat"] * 3))
    stream.append(named(["cat", "ant"] * 3))
    assert stream.allowed_classes(1, 1) == [0, 2] and stream.allowed_classes(1, 0) == [0, 1]


def test_images_keep_their_labels(stream):
    for t, first, names in ((0, 0, ["dog", "cat"]), (1, 100, ["cat", "ant"])):
        rows = {}
        for images in (stream.train(t), stream.test(t)):
            assert images.task == t and images[0]["task"] == t
            rows |= dict(zip(numbers_of(images), images.labels.tolist(), strict=True))
        assert sorted(rows) == list(range(first, first + 20))
        assert all(stream.label_names[label] == names[(row - first) % 2] for row, label in rows.items())
        assert stream.num_images("train", t) == 16 and stream.num_images("test", t) == len(stream.test(t)) == 4
    with pytest.raises(ValueError, match="split must be one of.*'val'"):
        stream.num_images("val", 0)


def test_workers_can_read_appended_images(stream):
    images = pickle.loads(pickle.dumps(stream)).train(1)
    loader = torch.utils.data.DataLoader(images, batch_size=5, num_workers=2, collate_fn=list)
    assert [item["label"] for batch in loader for item in batch] == images.labels.tolist()


# ---- rows and manifests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["held out", "split", "dataset"])
def test_a_first_appended_task_has_the_images_of_a_stream_known_in_advance(test):
    train, own = make(cycle(60)), make(cycle(24), first=500)
    limits = {"max_train_samples_per_class": 5, "max_eval_samples_per_class": 1}
    given = {
        "held out": (train, {"test_fraction": 0.3}),
        "split": (datasets.DatasetDict(train=train, test=own), {}),
        "dataset": (train, {"test_dataset": own}),
    }[test]
    known = TaskStream.from_dataset(given[0], num_tasks=1, seed=4, **given[1], **limits).manifest()
    stream = TaskStream.empty(seed=4)
    stream.append(given[0], **given[1], **limits)
    manifest = stream.manifest()
    assert all(manifest["tasks"][0][split] == known["tasks"][0][split] for split in ("train", "test"))
    settings = ("dataset", "label_column", "image_column", "label_values", "test_fraction", *limits)
    assert manifest["tasks"][0]["source"] == {key: known[key] for key in settings}
    assert manifest["label_names"] == known["label_names"] == NAMES


def test_tasks_appended_one_by_one_have_the_hashes_of_a_stream_known_in_advance():
    data = make(cycle(60))
    known = TaskStream.from_dataset(data, num_tasks=3, seed=None)
    stream = TaskStream.empty(seed=None)
    for task in known.tasks:
        rows = [i for i, label in enumerate(cycle(60)) if label in task.classes]
        stream.append(data.select(rows))
    for here, there in zip(stream.manifest()["tasks"], known.manifest()["tasks"], strict=True):
        assert {key: here[key] for key in there} == there
    assert stream.class_order == known.class_order and stream.label_names == known.label_names


def test_append_to_a_stream_known_in_advance_leaves_its_tasks_as_they_were():
    stream = TaskStream.from_dataset(make(cycle(60)), num_tasks=2, seed=1)
    before = stream.manifest()
    stream.append(named(["gnu", "bee"] * 5, first=100))
    assert stream.is_open and stream.label_names == [*NAMES, "gnu"] and stream.tasks[2].new_classes == (6,)
    after = stream.manifest()
    assert after["tasks"][:2] == before["tasks"] and after["class_order"] == [*before["class_order"], 6]
    assert (after["num_tasks"], after["num_classes"], after["label_names"]) == (3, 7, stream.label_names)
    changed = {"num_tasks", "num_classes", "label_names", "class_order", "tasks"}
    assert {key: after[key] for key in after if key not in changed} == {
        key: before[key] for key in before if key not in changed
    }
    entry = after["tasks"][2]
    assert (entry["classes"], entry["new_classes"]) == ([stream.tasks[2].classes[0], 6], [6])
    assert entry["source"]["label_values"] == [0, 1]
    assert json.loads(json.dumps(after)) == after


def test_new_classes_are_written_only_where_they_differ(stream):
    tasks = stream.manifest()["tasks"]
    assert "new_classes" not in tasks[0] and tasks[1]["new_classes"] == [2]
    stream.append(named(["dog"] * 4))
    assert stream.manifest()["tasks"][2]["new_classes"] == []


def test_values_are_recorded_in_the_order_of_the_classes():
    stream = TaskStream.empty()
    stream.append(named(["dog", "cat"] * 4))
    stream.append(named(["ape", "dog", "cat"] * 4, names=["yak", "ape", "cat", "dog"]))
    last = stream.manifest()["tasks"][1]
    assert [stream.label_names[c] for c in last["classes"]] == ["cat", "dog", "ape"]
    assert last["source"]["label_values"] == [2, 3, 1]


def test_held_out_rows_are_drawn_by_seed_and_label_id():
    data = named(["cat"] * 20)

    def held(seed, *before):
        stream = TaskStream.empty(seed=seed)
        for names in before:
            stream.append(named(names))
        stream.append(data)
        return numbers_of(stream.test(stream.num_tasks - 1))

    first = np.random.default_rng([3, 2, 0]).choice(np.arange(20), 4, replace=False)
    third = np.random.default_rng([3, 2, 2]).choice(np.arange(20), 4, replace=False)
    assert held(3) == sorted(first) == held(3, ["cat"] * 5) and held(3, ["ant", "bee"]) == sorted(third)
    assert held(None) == held(0) != held(3)


def test_hashes_are_computed_once_for_each_task(stream, monkeypatch):
    hashed = []
    original = type(stream._parts["train"][0].source).digests
    monkeypatch.setattr(
        "pgp_hf.data.rows.ImageRows.digests",
        lambda self, groups: [hashed.extend(len(g) for g in groups), original(self, groups)][1],
    )
    stream.manifest()
    assert sorted(hashed) == [4, 4, 16, 16]
    stream.append(named(["gnu"] * 5))
    stream.manifest()
    assert sorted(hashed) == [1, 4, 4, 4, 16, 16]


def test_a_class_of_one_image_has_no_test_image():
    stream = TaskStream.empty()
    stream.append(named(["cat", *["dog"] * 5]))
    assert set(stream.test(0).labels) == {1}
    stream.append(named(["gnu"]))
    assert not stream.has_test(1) and stream.has_train(1) and stream.num_images("test", 1) == 0
    with pytest.raises(ValueError, match=r"task 1 \(0-based\) has no test images"):
        stream.test(1)
    manifest = stream.manifest()
    assert manifest["tasks"][1]["test"] == {"num_images": 0, "sha256": None}
    stream.verify()
    stream.check_manifest(manifest)
    assert TaskStream.from_manifest(manifest).manifest() == manifest
    tested = stream.append(named(["yak"]), test_dataset=named(["yak"] * 2, first=30))
    assert stream.num_images("test", tested.index) == 2


def test_verify_decodes_what_is_new(stream, monkeypatch):
    stream.verify()
    seen = []
    original = datasets.Image.decode_example
    monkeypatch.setattr(
        datasets.Image,
        "decode_example",
        lambda self, value, *a, **k: [seen.append(1), original(self, value, *a, **k)][1],
    )
    stream.append(named(["gnu"] * 5, first=200))
    stream.verify()
    assert len(seen) == 5
    stream.append(make([0] * 3, [pixel(1), b"broken", pixel(2)], datasets.ClassLabel(names=["yak"])))
    with pytest.raises(ValueError, match=r"image in row \d of the train split is broken.*\(1 of 3 images"):
        stream.verify()


def test_only_streams_known_in_advance_can_be_joined(stream):
    with pytest.raises(ValueError, match="a stream without an end cannot be learned as one task"):
        stream.joined()


# ---- names ----------------------------------------------------------------------------------------------------------


def test_only_classes_with_training_images_count():
    stream = TaskStream.empty()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = stream.append(named(["dog", "bee"] * 4, names=NAMES))
    assert task.classes == (0, 1) and stream.label_names == ["bee", "dog"]


@pytest.mark.parametrize("given", [["owl", "pig", "rat"], {10: "rat", 2: "pig", 0: "owl", 99: "yak"}])
def test_integers_mean_what_label_names_say(given):
    values = [0, 1, 2] if isinstance(given, list) else [0, 2, 10]
    stream = TaskStream.empty()
    stream.append(named(["rat"] * 4))
    task = stream.append(make(values * 5, label_feature=datasets.Value("int64")), label_names=given)
    assert stream.label_names == ["rat", "owl", "pig"] and task == Task(1, (0, 1, 2), (1, 2))
    rows = dict(zip(numbers_of(stream.train(1)), stream.train(1).labels.tolist(), strict=True))
    assert all(["owl", "pig", "rat"][row % 3] == stream.label_names[label] for row, label in rows.items())
    assert stream.manifest()["tasks"][1]["source"]["label_values"] == [values[2], *values[:2]]


@pytest.mark.parametrize("given", [["chat", "chien"], {0: "chat", 1: "chien"}])
def test_label_names_rename_the_classes_of_a_class_label(given):
    stream = TaskStream.empty()
    stream.append(named(["cat", "dog"] * 4), label_names=given)
    assert stream.label_names == ["chat", "chien"]
    stream.append(named(["cat", "dog"] * 4, first=30), label_names={1: "chien"})
    assert stream.tasks[1] == Task(1, (1, 2), (2,)) and stream.label_names[2] == "cat"


@pytest.mark.parametrize(
    ("known", "new", "pair"),
    [
        (["cat"], ["Cat"], "'Cat' differs from 'cat'"),
        (["polar bear"], ["polarbear"], "'polarbear' differs from 'polar bear'"),
        (["cat"], [" cat "], "' cat ' differs from 'cat'"),
        (["cat"], ["Dog", "dog"], "'dog' differs from 'Dog'"),
        # as archives made on a Mac have it
        (["caf\u00e9"], ["cafe\u0301"], r"'cafe\\u0301' differs from 'caf\\xe9'"),
    ],
)
def test_names_that_look_alike_are_warned_of(known, new, pair):
    stream = TaskStream.empty()
    stream.append(named(known * 3))
    with pytest.warns(UserWarning, match=f"new class {pair} only in (case or blanks|the Unicode form)") as caught:
        stream.append(named(new * 3))
    assert len(caught) == 1 and caught[0].filename == __file__ and stream.label_names == [*known, *new]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream.append(named([*known, *new] * 2))  # all of them are known now
        stream.append(named(["catfish", "cat_", "c-at"] * 2))


# ---- errors leave the stream as it was ------------------------------------------------------------------------------

INTEGER = make([0, 7] * 4, label_feature=datasets.Value("int64"))
PLAIN = named(["gnu", "yak"] * 4)


@pytest.mark.parametrize(
    ("dataset", "arguments", "error", "message"),
    [
        (PLAIN.select([]), {}, ValueError, "the train split has no rows"),
        (PLAIN, {"test_dataset": PLAIN.select([])}, ValueError, "the test split has no rows"),
        (PLAIN, {"test_dataset": named(["emu"])}, ValueError, r"in the test split but not in train: \['emu'\]"),
        (
            named(["gnu"] * 3, names=["gnu", "yak"]),
            {"test_dataset": PLAIN},
            ValueError,
            r"1 labels are in the test split but not in train: \['yak'\]",
        ),
        (INTEGER, {}, ValueError, r"'label' holds integers \[0, 7\], and classes are matched by name.*label_names"),
        (INTEGER, {"label_names": ["gnu"]}, ValueError, r"label_names has no name for \[7\] in 'label'"),
        (INTEGER, {"label_names": {0: "gnu"}}, ValueError, r"label_names has no name for \[7\]"),
        (INTEGER, {"label_names": {0: "gnu", 7: "gnu"}}, ValueError, r"\['gnu'\] name more than one class"),
        (INTEGER, {"label_names": {0: "gnu", 7: 7}}, TypeError, r"label_names must be strings, got \[7\]"),
        (INTEGER, {"label_names": {0: "gnu", 7: " "}}, ValueError, "without a name"),
        (INTEGER, {"label_names": "gnu"}, TypeError, "label_names must be a list of names or a dict.*got str"),
        (PLAIN, {"label_names": ["gnu"]}, ValueError, "label_names has 1 names, and 'label' has 2 classes"),
        (PLAIN, {"label_names": {5: "owl"}}, ValueError, r"label_names names \[5\]; 'label' has the values 0..1"),
        (PLAIN, {"label_names": {0: "yak"}}, ValueError, r"\['yak'\] name more than one class"),
        (PLAIN, {"test_fraction": 1.0}, ValueError, "test_fraction must lie strictly between 0 and 1"),
        (PLAIN, {"max_train_samples_per_class": 0}, ValueError, "max_train_samples_per_class must be at least 1"),
        (PLAIN, {"max_eval_samples_per_class": 0}, ValueError, "max_eval_samples_per_class must be at least 1"),
        (PLAIN, {"label_column": "kind"}, ValueError, "label_column='kind' is not a column"),
        (PLAIN, {"image_column": "kind"}, ValueError, "image_column='kind' is not a column"),
        (PLAIN, {"test_split": "test"}, ValueError, "needs a datasets.DatasetDict"),
        (PLAIN.to_iterable_dataset(), {}, TypeError, "streaming"),
        ([1, 2], {}, TypeError, "got list"),
        ("./nowhere", {}, ValueError, "neither an existing folder nor a Hub id"),
        (make([-1, 0, 1], label_feature=datasets.ClassLabel(names=NAMES)), {}, ValueError, "1 of 3 rows.*unlabelled"),
    ],
)
def test_an_append_that_fails_leaves_the_stream_as_it_was(stream, dataset, arguments, error, message):
    before, attributes = state(stream), {name: copy.copy(value) for name, value in vars(stream).items()}
    with pytest.raises(error, match=message):
        stream.append(dataset, **arguments)
    assert state(stream) == before and vars(stream) == attributes


def test_a_warning_that_is_an_error_leaves_the_stream_as_it_was(stream):
    before = state(stream)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="'DOG' differs from 'dog'"):
        warnings.simplefilter("error")
        stream.append(named(["DOG"] * 4))
    assert state(stream) == before


# ---- withdraw -------------------------------------------------------------------------------------------------------


def test_what_was_appended_can_be_withdrawn(stream):
    before = state(stream)
    stream.append(named(["gnu", "dog"] * 4, first=200))
    names = stream.label_names
    stream.append(named(["dog"] * 4, first=300))
    stream.withdraw()
    assert stream.label_names == names and stream.num_tasks == 3
    stream.withdraw()
    assert state(stream) == before
    assert stream.append(named(["gnu", "owl"] * 4)).new_classes == (3, 4)


def test_withdraw_ends_where_appending_began():
    stream = TaskStream.from_dataset(make(cycle(24)), num_tasks=2)
    before = state(stream)
    stream.append(named(["gnu"] * 3))
    stream.withdraw()
    assert state(stream) == before and not stream.is_open and stream.joined().num_tasks == 1
    for ended in (stream, TaskStream.empty(), TaskStream.from_manifest(stream.manifest())):
        with pytest.raises(ValueError, match="no task to withdraw"):
            ended.withdraw()
    assert state(stream) == before


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write numbered images to paths in a folder, and return the folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, *paths):
        for i, path in enumerate(paths):
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(pixel(i))
        return tmp_path / name

    return write


def test_a_folder_with_a_subfolder_for_each_class(write):
    stream = TaskStream.empty()
    stream.append(write("photos", *(f"{name}/{i}.png" for name in ("dog", "cat") for i in range(5))))
    assert stream.label_names == ["cat", "dog"] and numbers_of(stream.train(0)) + numbers_of(stream.test(0))
    assert (
        stream.num_images("train", 0) == 8 and stream.manifest()["tasks"][0]["source"]["dataset"]["name"] == "photos"
    )
    stream.append(str(write("more", *(f"gnu/{i}.png" for i in range(5)))))
    assert stream.tasks[1] == Task(1, (2,)) and stream.label_names[2] == "gnu" and stream.num_images("test", 1) == 1


def test_a_folder_with_splits_of_one_class(write):
    folder = write("photos", "train/gnu/0.png", "train/gnu/1.png", "test/gnu/2.png")
    stream = TaskStream.empty()
    stream.append(folder)
    assert (
        stream.label_names == ["gnu"] and numbers_of(stream.train(0)) == [0, 1] and numbers_of(stream.test(0)) == [2]
    )
    assert TaskStream.from_dataset(folder, num_tasks=1).label_names == ["gnu"]


@pytest.mark.parametrize("paths", [["0.png", "1.png"], ["train/0.png", "train/1.png"]])
def test_a_folder_of_images_without_classes(write, paths):
    with pytest.raises(ValueError, match="label_column cannot be inferred"):
        TaskStream.empty().append(write("photos", *paths))
