"""Classes of two splits are the same where their names are, whatever their order; nothing is matched by position."""

from __future__ import annotations

import itertools

import datasets
import pytest
from numbered import NAMES, cycle, make

from pgp_hf.cli.arguments import DataArguments, string_labels_as_classes
from pgp_hf.data.stream import TaskStream

TRAIN, TEST = make(cycle(60)), make(cycle(24), first=500)
INTEGER = datasets.Value("int64")


def relabelled(data: datasets.Dataset, feature, value) -> datasets.Dataset:
    """The same images, with the `value` of each one's name in a label column of another kind."""
    labels = [value(NAMES[label]) for label in data["label"]]
    return data.remove_columns("label").add_column("label", labels, feature=feature)


def ordered(data: datasets.Dataset, names: list[str]) -> datasets.Dataset:
    return relabelled(data, datasets.ClassLabel(names=names), names.index)


def strings(data: datasets.Dataset) -> datasets.Dataset:
    return relabelled(data, datasets.Value("string"), str)


def content(stream: TaskStream) -> dict:
    """What a manifest says, but for what is for information only."""
    return {name: value for name, value in stream.manifest().items() if name != "dataset"}


ORDERS = [NAMES[::-1], *map(list, itertools.islice(itertools.permutations(NAMES), 1, 720, 103)), [*NAMES[3:], *NAMES]]


@pytest.mark.parametrize("names", [list(dict.fromkeys([*order, "gnu"])) for order in ORDERS])
def test_an_order_of_its_own_changes_nothing(names):
    expected = content(TaskStream.from_dataset(TRAIN, test_dataset=TEST, num_tasks=3))
    assert content(TaskStream.from_dataset(TRAIN, test_dataset=ordered(TEST, names), num_tasks=3)) == expected
    splits = datasets.DatasetDict(train=TRAIN, validation=ordered(TEST, names))
    assert content(TaskStream.from_dataset(splits, num_tasks=3)) == expected


def test_each_test_image_keeps_its_name():
    stream = TaskStream.from_dataset(TRAIN, test_dataset=ordered(TEST, NAMES[::-1]), num_tasks=1, seed=None)
    images = stream.test(0)
    named = [stream.label_names[images[i]["label"]] for i in range(len(images))]
    assert named == [NAMES[label] for label in TEST["label"]]


@pytest.mark.parametrize(
    ("train", "test", "told"),
    [
        ("caf\u00e9", "cafe\u0301", r"'cafe\\u0301' differs from 'caf\\xe9' only in the Unicode form of its letters"),
        ("Owl", "owl", "'owl' differs from 'Owl' only in case or blanks"),
    ],
)
def test_a_class_that_is_called_almost_the_same_in_the_test_split(train, test, told):
    one, other = (make([0] * 4).cast_column("label", datasets.ClassLabel(names=[name])) for name in (train, test))
    with pytest.raises(ValueError, match=rf"1 labels are in the test split but not in train: .* \({told}\); remove"):
        TaskStream.from_dataset(one, test_dataset=other, num_tasks=1)


def test_a_test_split_may_name_fewer_classes():
    few = ordered(TEST.filter(lambda label: NAMES[label] in "bee fox", input_columns="label"), ["fox", "bee"])
    stream = TaskStream.from_dataset(TRAIN, test_dataset=few, tasks=[NAMES])
    assert {NAMES[label] for label in stream.test(0).labels} == {"bee", "fox"} and len(stream.test(0)) == len(few)


def test_appended_and_listed_classes_are_matched_by_name_too():
    one, other = TaskStream.empty(), TaskStream.empty()
    one.append(TRAIN, TEST)
    other.append(TRAIN, ordered(TEST, NAMES[::-1]))
    assert one.manifest()["tasks"][0]["test"] == other.manifest()["tasks"][0]["test"]
    renamed = {0: "Ameise"}  # by value in the training images
    one.append(TRAIN, TEST, label_names=renamed)
    other.append(TRAIN, ordered(TEST, NAMES[::-1]), label_names=renamed)
    assert one.manifest()["tasks"][1]["test"] == other.manifest()["tasks"][1]["test"]
    tasks = [["fox", "ant"], ["cat"]]
    listed = [TaskStream.from_dataset(TRAIN, test_dataset=t, tasks=tasks) for t in (TEST, ordered(TEST, NAMES[::-1]))]
    assert content(listed[0]) == content(listed[1])


def test_names_that_no_training_image_has_are_named():
    with pytest.raises(ValueError, match=r"2 labels are in the test split but not in train: \['gnu', 'yak'\]"):
        names = ["gnu", "yak", *NAMES[2:]]
        test = make(cycle(12), label_feature=datasets.ClassLabel(names=names))
        TaskStream.from_dataset(TRAIN, test_dataset=test, num_tasks=2)


@pytest.mark.parametrize("lacks", ["train", "test"])
def test_integers_are_not_matched_with_names(lacks):
    def numbers(data):
        return relabelled(data, INTEGER, NAMES.index)

    train, test = (numbers(TRAIN), TEST) if lacks == "train" else (TRAIN, numbers(TEST))
    with pytest.raises(
        ValueError, match=rf"integers alone in the {lacks} split.*{lacks}\.cast_column.*names=\["
    ) as found:
        TaskStream.from_dataset(train, test_dataset=test, num_tasks=2)
    assert ".features[" not in str(found.value)  # whose order may be another


@pytest.mark.parametrize("texts", [(True, True), (True, False), (False, True)])
def test_the_command_line_names_classes_of_strings(texts):
    splits = [TRAIN, ordered(TEST, NAMES[::-1])]
    train, test = (
        strings(own) if text else data for own, data, text in zip((TRAIN, TEST), splits, texts, strict=True)
    )
    train, test = string_labels_as_classes(train, test, "label")
    stream = TaskStream.from_dataset(train, test_dataset=test, num_tasks=1, seed=None)
    assert [stream.label_names[label] for label in stream.test(0).labels] == [NAMES[label] for label in TEST["label"]]


def test_the_command_line_reads_splits_in_orders_of_their_own(monkeypatch):
    splits = datasets.DatasetDict(train=TRAIN, test=ordered(TEST, NAMES[::-1]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)
    stream = DataArguments(dataset_name="me/birds", num_tasks=3).load(0)
    assert content(stream) == content(
        TaskStream.from_dataset(TRAIN, test_dataset=TEST, num_tasks=3, label_column="label", image_column="image")
    )
