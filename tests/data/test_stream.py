"""Streams: order, splits, row choice, manifests, decoding, and every error before training."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
import sys
import warnings
from collections import Counter

import datasets
import fsspec
import numpy as np
import PIL.Image
import pytest
import torch
from numbered import NAMES, cycle, encode, make, numbers_of, pixel

from pgp_hf.data.scenarios import SCENARIOS
from pgp_hf.data.stream import Task, TaskStream


@pytest.fixture
def splits() -> datasets.DatasetDict:
    return datasets.DatasetDict(train=make(cycle(60)), test=make(cycle(24), first=500))


@pytest.fixture
def decoded(monkeypatch) -> list[dict]:
    """Every value handed to the image decoder, in order."""
    seen: list[dict] = []
    original = datasets.Image.decode_example

    def decode_example(self, value, *args, **kwargs):
        seen.append(value)
        return original(self, value, *args, **kwargs)

    monkeypatch.setattr(datasets.Image, "decode_example", decode_example)
    return seen


# ---- tasks and order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", range(1, 7))
@pytest.mark.parametrize("seed", [None, 0, 3])
def test_tasks_partition_the_classes(splits, num_tasks, seed):
    stream = TaskStream.from_dataset(splits, num_tasks=num_tasks, seed=seed)
    sizes = [len(task.classes) for task in stream.tasks]
    assert len(stream.tasks) == stream.num_tasks == num_tasks and max(sizes) - min(sizes) <= 1
    assert [task.index for task in stream.tasks] == list(range(num_tasks))
    assert [c for task in stream.tasks for c in task.classes] == stream.class_order
    expected = range(6) if seed is None else np.random.default_rng(seed).permutation(6)
    assert stream.class_order == list(expected)
    assert all(type(c) is int for c in stream.class_order)
    assert stream.num_classes == 6 and stream.label_names == NAMES and stream.id2label == dict(enumerate(NAMES))
    for t in range(num_tasks):
        assert stream.seen_classes(t) == stream.class_order[: sum(sizes[: t + 1])]


def test_every_row_belongs_to_exactly_one_task_and_keeps_its_label(splits):
    stream = TaskStream.from_dataset(splits, num_tasks=4, seed=1)
    for split, part, first in (("train", stream.train, 0), ("test", stream.test, 500)):
        rows = []
        for task in stream.tasks:
            images = part(task.index)
            assert set(images.labels.tolist()) <= set(task.classes) and images.labels.dtype == np.int64
            found = [number - first for number in numbers_of(images)]
            assert found == sorted(found)  # row order
            assert [splits[split]["label"][row] for row in found] == images.labels.tolist()
            rows += found
        assert sorted(rows) == list(range(len(splits[split])))


def test_given_class_order_and_frozen_task(splits):
    stream = TaskStream.from_dataset(splits, num_tasks=2, class_order=np.array([5, 3, 1, 0, 2, 4]))
    assert stream.tasks == [Task(0, (5, 3, 1)), Task(1, (0, 2, 4))]
    with pytest.raises(AttributeError):
        stream.tasks[0].index = 1


def test_items(splits):
    images = TaskStream.from_dataset(splits, num_tasks=2).train(1)
    item = images[2]
    assert set(item) == {"image", "label", "task", "index"} and item["image"].mode == "RGB" and item["index"] == 2
    assert type(item["label"]) is int and item["label"] == images.labels[2]
    assert images[-1]["index"] == len(images) - 1 and images[np.int64(3)]["index"] == 3
    assert sum(1 for _ in images) == len(images)  # iteration ends
    for index in (len(images), -len(images) - 1):
        with pytest.raises(IndexError, match=str(index)):
            images[index]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios(splits, scenario):
    stream = TaskStream.from_dataset(splits, num_tasks=2, scenario=scenario)
    assert stream.scenario == scenario == stream.manifest()["scenario"] and scenario in repr(stream)


# ---- no decoding, workers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 4])
def test_joined_it_is_the_stream_of_one_task(splits, decoded, limit):
    settings = {"scenario": "online", "max_train_samples_per_class": limit}
    stream, one = (TaskStream.from_dataset(splits, num_tasks=num_tasks, **settings) for num_tasks in (3, 1))
    joined = stream.joined()
    assert joined.manifest() == one.manifest() != stream.manifest() and stream.num_tasks == 3
    assert joined.tasks == [Task(0, tuple(stream.class_order))] and joined.scenario == "online"
    assert joined.label_names == stream.label_names and joined.num_classes == 6
    for images, parts in ((joined.train(0), stream.train), (joined.test(0), stream.test)):
        assert len(images) == sum(len(parts(t)) for t in range(3))
        assert Counter(images.labels) == sum((Counter(parts(t).labels) for t in range(3)), Counter())
    assert decoded == []
    assert [(item["task"], item["index"]) for item in joined.train(0)] == [(0, i) for i in range(len(joined.train(0)))]
    assert joined.joined().manifest() == joined.manifest()


def test_only_indexing_decodes(splits, decoded):
    stream = TaskStream.from_dataset(splits, num_tasks=3, max_train_samples_per_class=4)
    TaskStream.from_dataset(splits["train"], num_tasks=3)
    assert sum(len(stream.train(t)) + len(stream.test(t).labels) for t in range(3)) == 48
    stream.check_manifest(stream.manifest())
    assert decoded == []
    stream.train(0)[0]
    assert len(decoded) == 1


def test_transforms_and_formats_of_the_dataset_are_left_aside(splits):
    plain = TaskStream.from_dataset(splits, num_tasks=2)
    formatted = datasets.DatasetDict(
        train=splits["train"].with_transform(lambda batch: {"nothing": [0] * len(batch["label"])}),
        test=splits["test"].with_format("torch", columns=["label"]),
    )
    stream = TaskStream.from_dataset(formatted, num_tasks=2)
    stream.check_manifest(plain.manifest())
    assert numbers_of(stream.test(0)) == numbers_of(plain.test(0))


def test_undecoded_image_feature_is_decoded(splits):
    cast = splits.cast_column("image", datasets.Image(decode=False))
    assert TaskStream.from_dataset(cast, num_tasks=2).train(0)[0]["image"].mode == "RGB"


def test_derived_datasets_follow_their_own_rows():
    data = make(cycle(60)).shuffle(seed=5).select(range(10, 50))
    stream = TaskStream.from_dataset(data, num_tasks=1, test_dataset=make(cycle(12)), seed=None)
    assert stream.train(0).labels.tolist() == list(data["label"])
    assert numbers_of(stream.train(0)) == [image.getpixel((0, 0))[0] for image in data["image"]]


def test_pickle_and_worker_processes(splits):
    stream = pickle.loads(pickle.dumps(TaskStream.from_dataset(splits, num_tasks=2)))
    images = stream.train(0)
    here = [(item["label"], item["image"].getpixel((0, 0))) for item in images]
    loader = torch.utils.data.DataLoader(images, batch_size=7, num_workers=2, collate_fn=list)
    assert [(item["label"], item["image"].getpixel((0, 0))) for batch in loader for item in batch] == here


# ---- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "argument", "chosen"),
    [
        (["val", "test", "validation"], None, "test"),
        (["val", "valid", "validation"], None, "validation"),
        (["val", "valid"], None, "valid"),
        (["extra", "val"], None, "val"),
        (["extra", "test"], "extra", "extra"),
    ],
)
def test_choice_of_test_split(names, argument, chosen):
    parts = {name: make(cycle(12), first=100 * (i + 1)) for i, name in enumerate(names)}
    stream = TaskStream.from_dataset(
        datasets.DatasetDict(train=make(cycle(12)), **parts), num_tasks=1, test_split=argument
    )
    assert numbers_of(stream.test(0))[0] == 100 * (names.index(chosen) + 1)
    assert stream.manifest()["test_fraction"] is None


def test_test_dataset_stands_before_the_splits(splits):
    stream = TaskStream.from_dataset(splits, num_tasks=1, test_dataset=make(cycle(12), first=200))
    assert numbers_of(stream.test(0))[0] == 200
    assert numbers_of(TaskStream.from_dataset(splits["train"], num_tasks=1, test_dataset=splits["test"]).test(0))


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.99])
def test_held_out_rows_are_stratified_and_seeded(fraction):
    labels = [0] * 20 + [1] * 10 + [2] * 2
    data = make(labels, label_feature=datasets.ClassLabel(names=NAMES[:3]))

    def build(**kwargs):
        stream = TaskStream.from_dataset(data, num_tasks=1, test_fraction=fraction, **kwargs)
        return stream, numbers_of(stream.train(0)), numbers_of(stream.test(0))

    stream, train, test = build(seed=4)
    assert sorted(train + test) == list(range(32))
    counts = np.bincount(stream.test(0).labels, minlength=3)
    for total, count in zip([20, 10, 2], counts, strict=True):
        assert count == min(max(round(fraction * total), 1), total - 1)
    assert stream.manifest()["test_fraction"] == fraction
    assert build(seed=4)[1:] == (train, test) == build(seed=4, class_order=[2, 0, 1])[1:]
    if fraction == 0.25:
        assert build(seed=5)[2] != test
    assert build(seed=None)[1:] == build(seed=0)[1:]


def test_dataset_dict_without_a_test_split_is_held_out():
    data = datasets.DatasetDict(train=make(cycle(60)), unsupervised=make(cycle(6)))
    stream = TaskStream.from_dataset(data, num_tasks=2)
    assert [len(stream.test(t)) for t in range(2)] == [6, 6] and stream.manifest()["test_fraction"] == 0.2


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_validation_images_take_the_place_of_test_images(splits, share):
    plain = TaskStream.from_dataset(splits, num_tasks=2)

    def build(**kwargs):
        stream = TaskStream.from_dataset(splits, num_tasks=2, train_val_split=share, **kwargs)
        return stream, [[numbers_of(images(t)) for t in range(2)] for images in (stream.train, stream.test)]

    stream, (train, held) = build()
    for t in range(2):
        assert sorted(train[t] + held[t]) == numbers_of(plain.train(t)) and train[t] == sorted(train[t])
        assert np.bincount(stream.test(t).labels)[list(stream.tasks[t].classes)].tolist() == [round(share * 10)] * 3
    assert build()[1] == [train, held] != build(seed=1, class_order=stream.class_order)[1]
    assert stream.manifest()["train_val_split"] == share and stream.manifest()["test_fraction"] is None
    limited = build(max_train_samples_per_class=2, max_eval_samples_per_class=1)[0]
    assert [len(limited.train(0)), len(limited.test(0))] == [6, 3]


def test_no_test_image_is_read_for_validation(splits, decoded):
    broken = splits["test"].cast_column("image", datasets.Image(decode=False))
    broken = broken.map(lambda row: {"image": {"bytes": b"no image", "path": None}}, features=splits["test"].features)
    streams = [
        TaskStream.from_dataset(splits["train"], test_dataset=test, num_tasks=2, train_val_split=0.2)
        for test in (splits["test"], broken)
    ]
    streams[0].check_manifest(streams[1].manifest())
    streams[1].verify(progress=False)
    assert len(decoded) == len(splits["train"])


def test_validation_images_are_held_out_after_test_images():
    data = make(cycle(60))
    plain = TaskStream.from_dataset(data, num_tasks=1, test_fraction=0.3)
    stream = TaskStream.from_dataset(data, num_tasks=1, test_fraction=0.3, train_val_split=0.3)
    train, held = numbers_of(stream.train(0)), numbers_of(stream.test(0))
    assert sorted(train + held) == numbers_of(plain.train(0)) and len(held) == 12
    assert not set(held) & set(numbers_of(plain.test(0)))
    manifest = stream.manifest()
    assert (manifest["test_fraction"], manifest["train_val_split"]) == (0.3, 0.3)


def test_limit_per_class_is_independent_of_order_and_other_classes():
    def rows_of(label, labels, **kwargs):
        data = make(labels)
        stream = TaskStream.from_dataset(
            data, num_tasks=1, test_dataset=data, max_train_samples_per_class=3, max_eval_samples_per_class=2, **kwargs
        )
        found = []
        for images, limit in ((stream.train(0), 3), (stream.test(0), 2)):
            assert all(count == limit for count in Counter(images.labels.tolist()).values())
            numbers = numbers_of(images)
            assert numbers == sorted(numbers)
            found.append([n for n, own in zip(numbers, images.labels.tolist(), strict=True) if own == label])
        return found

    labels = [0, 1, 2, 3, 4, 5] * 10
    base = rows_of(2, labels)
    assert base == rows_of(2, labels, class_order=[5, 4, 3, 2, 1, 0])
    assert base != rows_of(2, labels, seed=1)
    for split, limit, found in ((0, 3, base[0]), (1, 2, base[1])):
        drawn = np.random.default_rng([0, split, 2]).choice(np.arange(2, 60, 6), limit, replace=False)
        assert found == sorted(drawn)
    others = [label if label == 2 else (label + 1 if label == 1 else label) % 6 for label in labels]
    others = [0 if (label == 2 and i % 6 != 2) else label for i, label in enumerate(others)]  # class 1 gone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert base == rows_of(2, others)


def test_limit_above_the_class_size_keeps_all(splits):
    stream = TaskStream.from_dataset(splits, num_tasks=1, max_train_samples_per_class=99)
    assert len(stream.train(0)) == 60


# ---- columns and labels ---------------------------------------------------------------------------------------------


def test_integer_labels_are_mapped_in_sorted_order():
    data = make([70, 10, -5, 10, 70, -5] * 4, label_feature=datasets.Value("int16"))
    stream = TaskStream.from_dataset(data, num_tasks=3, seed=None)
    assert stream.label_names == ["-5", "10", "70"] and stream.manifest()["label_values"] == [-5, 10, 70]
    assert numbers_of(stream.train(2)) == [n for n in numbers_of(stream.train(2)) if n % 6 in (0, 4)]
    assert set(stream.train(2).labels) == {2}


def test_class_label_keeps_ids_and_records_them(splits):
    assert TaskStream.from_dataset(splits, num_tasks=2).manifest()["label_values"] == list(range(6))


def test_columns_are_found_by_feature():
    data = make(cycle(24)).rename_columns({"image": "picture", "label": "kind"})
    stream = TaskStream.from_dataset(data, num_tasks=2)
    assert (stream.manifest()["label_column"], stream.manifest()["image_column"]) == ("kind", "picture")
    integer = make(cycle(24), label_feature=datasets.Value("int64"), other=(datasets.Value("int64"), [0] * 24))
    assert TaskStream.from_dataset(integer, num_tasks=2).manifest()["label_column"] == "label"


def test_ambiguous_columns():
    twice = make(cycle(24), coarse=(datasets.ClassLabel(names=["x", "y"]), [0, 1] * 12))
    with pytest.raises(ValueError, match=r"label_column cannot be inferred.*\['label', 'coarse'\].*Set label_column"):
        TaskStream.from_dataset(twice, num_tasks=2)
    assert TaskStream.from_dataset(twice, num_tasks=2, label_column="coarse").label_names == ["x", "y"]
    mask = make(cycle(12), mask=(datasets.Image(), [{"bytes": pixel(0), "path": None}] * 12))
    with pytest.raises(ValueError, match=r"image_column cannot be inferred.*\['image', 'mask'\]"):
        TaskStream.from_dataset(mask, num_tasks=2)
    assert len(TaskStream.from_dataset(mask, num_tasks=2, image_column="mask").train(0))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda d: d.rename_column("label", "y"), {"label_column": "label"}, r"label_column='label'.*'image', 'y'"),
        (lambda d: d, {"image_column": "img"}, r"image_column='img'.*'image', 'label'"),
        (lambda d: d.remove_columns("label"), {}, r"label_column cannot be inferred.*no ClassLabel.*\['image'\]"),
        (lambda d: d.remove_columns("image"), {}, r"image_column cannot be inferred.*cast_column.*\['label'\]"),
        (lambda d: d, {"image_column": "label"}, r"cast_column\('label', datasets.Image\(\)\)"),
        (lambda d: d, {"label_column": "image"}, r"class_encode_column\('image'\)"),
    ],
)
def test_missing_and_wrong_columns(change, arguments, message):
    with pytest.raises(ValueError, match=message):
        TaskStream.from_dataset(change(make(cycle(24))), num_tasks=2, **arguments)


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        (datasets.Value("string"), ["a", "b"]),
        (datasets.Value("float32"), [0.0, 1.0]),
        (datasets.Value("bool"), [True, False]),
        (datasets.List(datasets.Value("int64")), [[0], [1]]),
    ],
)
def test_labels_that_are_not_integers(feature, values):
    with pytest.raises(ValueError, match=r"label column 'label' of the train split.*class_encode_column\('label'\)"):
        TaskStream.from_dataset(make(values * 4, label_feature=feature), num_tasks=2)


@pytest.mark.parametrize("feature", [datasets.ClassLabel(names=NAMES), datasets.Value("int64")])
def test_unlabelled_rows_are_counted(feature):
    with pytest.raises(ValueError, match="3 of 15 rows of the train split are unlabelled"):
        TaskStream.from_dataset(make([-1, None, -1] + cycle(12), label_feature=feature), num_tasks=2)
    with pytest.raises(ValueError, match="1 of 13 rows of the test split are unlabelled"):
        good = make(cycle(12), label_feature=feature)
        TaskStream.from_dataset(good, num_tasks=2, test_dataset=make([None] + cycle(12), label_feature=feature))


def test_test_labels_must_be_known():
    kind = datasets.Value("int64")
    with pytest.raises(ValueError, match=r"1 labels are in the test split but not in train: \[7\]"):
        test = make([0, 1, 7], label_feature=kind)
        TaskStream.from_dataset(make([0, 1] * 3, label_feature=kind), num_tasks=1, test_dataset=test)
    with pytest.raises(ValueError, match=r"not in train: \['fox'\]"):
        TaskStream.from_dataset(make([0, 1, 2, 3, 4]), num_tasks=1, test_dataset=make(cycle(6)))


def test_both_splits_have_the_columns(splits):
    other = make(cycle(12))
    with pytest.raises(ValueError, match=r"label_column='label' is not a column of the test split"):
        TaskStream.from_dataset(splits["train"], num_tasks=2, test_dataset=other.rename_column("label", "y"))


def test_label_outside_its_class_label():
    raw = make([0, 1, 9] * 4, label_feature=datasets.Value("int64"))
    table = raw.data.table  # relabelling the features checks nothing, as with a parquet file's metadata
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    data = datasets.Dataset(table.replace_schema_metadata(None), info=datasets.DatasetInfo(features=features))
    with pytest.raises(ValueError, match=r"holds \[9\], outside its ClassLabel's 0..5"):
        TaskStream.from_dataset(data, num_tasks=2)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_tasks": 0}, ValueError, "num_tasks must be at least 1, got 0"),
        ({"num_tasks": 7}, ValueError, "num_tasks=7 is more than the 6 classes"),
        ({"num_tasks": 2.0}, TypeError, r"num_tasks must be an integer, got 2.0"),
        ({"num_tasks": True}, TypeError, "num_tasks must be an integer"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": "0"}, TypeError, r"seed must be an integer or None \(label order\)"),
        ({"scenario": "domain"}, ValueError, "'class_incremental', 'task_incremental', 'online'.*'domain'"),
        ({"class_order": [0, 1, 2, 3, 4, 4]}, ValueError, r"duplicates: \[4\], missing: \[5\]"),
        ({"class_order": [0, 1, 2]}, ValueError, r"missing: \[3, 4, 5\]"),
        ({"class_order": [1, 2, 3, 4, 5, 6]}, ValueError, r"class_order must be in 0..5, got 6"),
        ({"class_order": ["ant"] * 6}, TypeError, "class_order must be an integer, got 'ant'"),
        ({"max_train_samples_per_class": 0}, ValueError, "max_train_samples_per_class must be at least 1, got 0"),
        ({"max_eval_samples_per_class": -2}, ValueError, "max_eval_samples_per_class must be at least 1, got -2"),
        ({"test_fraction": 0.0}, ValueError, "test_fraction must lie strictly between 0 and 1.*got 0.0"),
        ({"test_fraction": 1.0}, ValueError, "test_fraction.*got 1.0"),
        ({"train_val_split": 0.0}, ValueError, "train_val_split must lie strictly between 0 and 1.*got 0.0"),
        ({"train_val_split": 1.5}, ValueError, "train_val_split.*got 1.5"),
        ({"test_split": "dev"}, ValueError, r"test_split='dev'.*\['test'\]"),
        ({"test_split": "train"}, ValueError, r"test_split='train'.*\['test'\]"),
        ({"test_dataset": 5}, TypeError, "test_dataset must be a datasets.Dataset, got int"),
        (
            {"test_dataset": datasets.DatasetDict(eval=datasets.Dataset.from_dict({"a": [1]}))},
            TypeError,
            r"test_dataset is a datasets.DatasetDict with the splits \['eval'\]: pass one of them, as test_dataset=ds\[",
        ),
    ],
)
def test_bad_arguments(splits, arguments, error, message):
    with pytest.raises(error, match=message):
        TaskStream.from_dataset(splits, **{"num_tasks": 2, **arguments})


@pytest.mark.parametrize("method", ["train", "test", "seen_classes"])
def test_task_out_of_range(splits, method):
    call = getattr(TaskStream.from_dataset(splits, num_tasks=2), method)
    for t in (2, -1):
        with pytest.raises(ValueError, match=rf"task t \(0-based\) must be in 0..1, got {t}"):
            call(t)
    with pytest.raises(TypeError, match="must be an integer"):
        call("0")


def test_bad_datasets(splits, tmp_path):
    train = splits["train"]
    for stream in (train.to_iterable_dataset(), datasets.IterableDatasetDict(train=train.to_iterable_dataset())):
        with pytest.raises(TypeError, match=r"streaming Iterable.*streaming=True.*from_list"):
            TaskStream.from_dataset(stream, num_tasks=2)
    with pytest.raises(TypeError, match="streaming"):
        TaskStream.from_dataset(train, num_tasks=2, test_dataset=train.to_iterable_dataset())
    with pytest.raises(TypeError, match="got list"):
        TaskStream.from_dataset([1, 2], num_tasks=2)
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        TaskStream.from_dataset(datasets.DatasetDict(test=train), num_tasks=2)
    with pytest.raises(ValueError, match="needs a datasets.DatasetDict"):
        TaskStream.from_dataset(train, num_tasks=2, test_split="test")
    with pytest.raises(ValueError, match="both given"):
        TaskStream.from_dataset(splits, num_tasks=2, test_split="test", test_dataset=train)
    with pytest.raises(ValueError, match="train split has no rows"):
        TaskStream.from_dataset(train.select([]), num_tasks=2)
    with pytest.raises(ValueError, match="test split has no rows"):
        TaskStream.from_dataset(train, num_tasks=2, test_dataset=train.select([]))
    for path in (str(tmp_path / "none"), "./none", "a b/c", tmp_path / "none"):
        with pytest.raises(ValueError, match="neither an existing folder nor a Hub id"):
            TaskStream.from_dataset(path, num_tasks=2)


def test_tasks_and_classes_without_images():
    full = make([0, 1, 2, 3, 4, 5] * 4)
    some_train = full.filter(lambda label: label not in (2, 3), input_columns="label")
    with pytest.raises(ValueError, match=r"task 1 \(0-based, classes \['cat', 'dog'\]\) has no train images"):
        TaskStream.from_dataset(some_train, num_tasks=3, seed=None)
    with pytest.raises(ValueError, match=r"task 1 \(0-based, classes \['cat', 'dog'\]\) has no test images"):
        TaskStream.from_dataset(full, num_tasks=3, seed=None, test_dataset=some_train)
    with pytest.warns(UserWarning, match=r"2 classes have no test images: \['cat', 'dog'\]"):
        stream = TaskStream.from_dataset(full, num_tasks=2, seed=None, test_dataset=some_train)
    assert set(stream.test(0).labels) == {0, 1}


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_folder_of_parquet_files(splits, tmp_path, cache):
    folder = tmp_path / "my-data"
    folder.mkdir()
    for split, data in splits.items():
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    for path in (folder, str(folder), str(folder) + "/"):
        stream = TaskStream.from_dataset(path, num_tasks=2)
        stream.check_manifest(TaskStream.from_dataset(splits, num_tasks=2).manifest())
        assert stream.manifest()["dataset"]["name"] == "my-data"


def test_folder_of_image_files_is_hashed_by_content_not_place(tmp_path, cache):
    def write(folder):
        for i, label in enumerate(cycle(24)):
            (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
            (folder / NAMES[label] / f"{i:02}.png").write_bytes(pixel(i))
        return TaskStream.from_dataset(folder, num_tasks=2)

    here, there = write(tmp_path / "here"), write(tmp_path / "deep" / "there")
    assert here.label_names == NAMES and [len(here.test(t)) for t in range(2)] == [3, 3]
    there.check_manifest(here.manifest())
    assert str(tmp_path) not in json.dumps(here.manifest())
    in_memory = make(sorted(cycle(24)), [pixel(n) for label in range(6) for n in range(24) if cycle(24)[n] == label])
    TaskStream.from_dataset(in_memory, num_tasks=2).check_manifest(here.manifest())
    shutil.rmtree(tmp_path / "here")  # the rows hold paths only
    with pytest.raises(ValueError, match=r"image in row \d+ of the train split is broken: FileNotFoundError"):
        here.verify()


@pytest.mark.parametrize("remote", [False, True])
def test_rows_that_hold_a_path_or_url_are_hashed_by_their_file(tmp_path, remote):
    files = fsspec.filesystem("memory" if remote else "file")
    names = [f"memory://stream/{i}.png" if remote else str(tmp_path / f"{i}.png") for i in range(12)]
    for i, name in enumerate(names):
        files.pipe_file(name, pixel(i))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    data = datasets.Dataset.from_dict({"image": names, "label": cycle(12)}, features=features)
    stream, same = (TaskStream.from_dataset(rows, num_tasks=2) for rows in (data, make(cycle(12))))
    stream.check_manifest(same.manifest())
    assert numbers_of(stream.test(1)) == numbers_of(same.test(1))
    files.rm(names[7])
    with pytest.raises(ValueError, match=r"image in row 7 of the train split is broken: FileNotFoundError"):
        TaskStream.from_dataset(data, num_tasks=2).manifest()


def test_failing_loads_keep_the_reason(tmp_path, cache, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty' \(folder\) could not be loaded: \w+: .*load it yourself"):
        TaskStream.from_dataset(empty, num_tasks=2)

    def load_dataset(path, **kwargs):
        assert "trust_remote_code" not in kwargs
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'me/data' \(no such folder.*ConnectionError: no network"):
        TaskStream.from_dataset("me/data", num_tasks=2)


def test_hub_id(splits, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", {"me/data.v1": splits}.__getitem__)
    assert TaskStream.from_dataset("me/data.v1", num_tasks=2).manifest()["dataset"]["name"] == "me/data.v1"


# ---- manifest -------------------------------------------------------------------------------------------------------


def test_manifest_contents(splits):
    arguments = {"num_tasks": 3, "seed": 2, "max_train_samples_per_class": 4, "scenario": "online"}
    stream = TaskStream.from_dataset(splits, **arguments)
    manifest = json.loads(json.dumps(stream.manifest()))
    assert manifest == stream.manifest()
    tasks = manifest.pop("tasks")
    assert manifest == {
        "format": 1,
        "dataset": {
            "name": None,
            "fingerprint": {"train": splits["train"]._fingerprint, "test": splits["test"]._fingerprint},
        },
        "num_classes": 6,
        "label_column": "label",
        "image_column": "image",
        "label_names": NAMES,
        "label_values": list(range(6)),
        "class_order": stream.class_order,
        "test_fraction": None,
        "max_eval_samples_per_class": None,
        **arguments,
    }
    for task, entry in zip(stream.tasks, tasks, strict=True):
        assert entry["classes"] == list(task.classes)
        for split, images in (("train", stream.train(task.index)), ("test", stream.test(task.index))):
            digest = hashlib.sha256()
            for number, label in zip(numbers_of(images), images.labels, strict=True):
                content = pixel(number)
                digest.update(struct.pack("<qq", label, len(content)) + content)
            assert entry[split] == {"num_images": len(images), "sha256": digest.hexdigest()}


def test_manifest_is_cached_and_a_callers_edits_stay_the_callers(splits, monkeypatch):
    stream = TaskStream.from_dataset(splits, num_tasks=2)
    first = stream.manifest()
    monkeypatch.setattr("pgp_hf.data.rows.ImageRows.digests", None)
    first["class_order"].reverse()
    first["tasks"][0]["train"]["sha256"] = ""
    first["dataset"]["fingerprint"].clear()
    again = stream.manifest()
    assert again["class_order"] == stream.class_order and again["tasks"][0]["train"]["sha256"]
    assert set(again["dataset"]["fingerprint"]) == {"train", "test"}


def test_dataset_name_holds_no_path(splits):
    splits["train"].info.dataset_name = "/home/me/pictures"
    assert TaskStream.from_dataset(splits, num_tasks=2).manifest()["dataset"]["name"] == "pictures"


def test_check_manifest_accepts_equal_content(splits, tmp_path):
    old = json.loads(json.dumps(TaskStream.from_dataset(splits, num_tasks=2, seed=1).manifest()))
    old["dataset"] = {"name": "other", "fingerprint": {"train": "x", "test": "y"}}
    # Another layout of the same rows, and settings that come to the same.
    rows = splits["train"].flatten_indices(cache_file_name=str(tmp_path / "rows.arrow"))
    order = np.random.default_rng(1).permutation(6).tolist()
    TaskStream.from_dataset(
        rows, test_dataset=splits["test"], num_tasks=2, seed=7, class_order=order, max_train_samples_per_class=50
    ).check_manifest(old)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, r"class_order\[\d\].*Settings that differ: seed: 0 here, 1 in the manifest"),
        ({"num_tasks": 3}, r"num_tasks: 2 here, 3 in the manifest"),
        ({"scenario": "online"}, r"scenario: 'class_incremental' here, 'online' in the manifest"),
        (
            {"max_train_samples_per_class": 5},
            r"train images of task 0 \(0-based\), num_images: 30 here, 15 .*differ: max_train_samples_per_class: None",
        ),
        (
            {"train_val_split": 0.2},
            r"train images of task 0 .*num_images: 30 here, 24 .*differ: train_val_split: None here, 0.2 in the manifest",
        ),
    ],
)
def test_check_manifest_names_what_differs(splits, arguments, message):
    old = TaskStream.from_dataset(splits, **{"num_tasks": 2, "seed": 0, **arguments}).manifest()
    with pytest.raises(ValueError, match=message):
        TaskStream.from_dataset(splits, num_tasks=2, seed=0).check_manifest(old)


def test_check_manifest_names_a_validation_split_that_the_earlier_run_did_not_have(splits):
    old = TaskStream.from_dataset(splits, num_tasks=2).manifest()
    assert "train_val_split" not in old
    with pytest.raises(ValueError, match="differ: train_val_split: 0.2 here, None in the manifest"):
        TaskStream.from_dataset(splits, num_tasks=2, train_val_split=0.2).check_manifest(old)


def test_check_manifest_sees_one_changed_image_one_changed_label_and_names(splits):
    stream = TaskStream.from_dataset(splits, num_tasks=2, seed=None)
    labels = cycle(60)
    contents = [pixel(i) for i in range(60)]

    def check(message, labels=labels, contents=contents, test=splits["test"], names=NAMES):
        feature = datasets.ClassLabel(names=names)
        train = make(labels, contents, feature)
        other = TaskStream.from_dataset(train, num_tasks=2, seed=None, test_dataset=test.cast_column("label", feature))
        with pytest.raises(ValueError, match=message):
            stream.check_manifest(other.manifest())

    at = labels.index(4)
    check(r"train images of task 1 \(0-based\), sha256", contents=contents[:at] + [pixel(999)] + contents[at + 1 :])
    check(r"train images of task 1 \(0-based\), sha256", labels=labels[:at] + [5] + labels[at + 1 :])
    check(r"test images of task 1 \(0-based\), num_images", test=splits["test"].select(range(23)))
    check(r"label_names\[5\]: 'fox' here, 'gnu' in the manifest", names=NAMES[:5] + ["gnu"])
    check(r"sha256", contents=contents[::-1], labels=labels[::-1])


def test_check_manifest_refuses_what_is_no_manifest(splits):
    stream = TaskStream.from_dataset(splits, num_tasks=2)
    with pytest.raises(TypeError, match="got list"):
        stream.check_manifest([])
    with pytest.raises(ValueError, match="format must be 1, got 2"):
        stream.check_manifest({**stream.manifest(), "format": 2})
    with pytest.raises(ValueError, match=r"label_values\[0\]: 0 here, 1 in the manifest"):
        stream.check_manifest({**stream.manifest(), "label_values": [1, 2, 3, 4, 5, 6]})
    with pytest.raises(ValueError, match=r"lacks \['class_order', 'tasks'\]"):
        own = stream.manifest()
        stream.check_manifest({key: own[key] for key in own if key not in ("class_order", "tasks")})


# ---- images ---------------------------------------------------------------------------------------------------------


def test_verify_decodes_every_selected_image_once(splits, decoded):
    stream = TaskStream.from_dataset(splits, num_tasks=2, max_train_samples_per_class=3)
    stream.verify()
    expected = sorted(n for t in range(2) for n in numbers_of(stream.train(t)) + numbers_of(stream.test(t)))
    assert len(expected) == 18 + 24
    del decoded[42:]  # those of numbers_of
    assert Counter(value["bytes"] for value in decoded) == Counter(pixel(n) for n in expected)
    stream.verify()
    assert len(decoded) == 42


def test_verify_shows_a_bar_for_many_images_only(splits, monkeypatch, capsys):
    TaskStream.from_dataset(splits, num_tasks=2).verify()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("pgp_hf.data.rows.PROGRESS_FROM", 10)
    TaskStream.from_dataset(splits, num_tasks=2).verify(progress=False)
    assert capsys.readouterr().err == ""
    TaskStream.from_dataset(splits, num_tasks=2).verify()
    assert capsys.readouterr().err == ""  # without a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    TaskStream.from_dataset(splits, num_tasks=2).verify()
    assert "84/84" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda png: b"not an image", "UnidentifiedImageError: cannot identify image file"),
        (lambda png: png[: len(png) // 2], r"\w+: "),
        (lambda png: png[:-30] + bytes(30), r"\w+: "),
    ],
)
def test_broken_images_are_found_before_training(damage, message):
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    contents = [encode(PIL.Image.fromarray(noise ^ i)) for i in range(130)]
    for row in (97, 101, 128):
        contents[row] = damage(contents[row])
    data = make(cycle(130), contents)
    stream = TaskStream.from_dataset(data, num_tasks=2, test_dataset=make(cycle(12)))
    stream.manifest()  # hashing does not mind
    pattern = rf"image in row 97 of the train split is broken: {message}.*3 of 142 images are broken.*re-encode"
    for _ in range(2):  # a failure is not remembered as success
        with pytest.raises(ValueError, match=pattern):
            stream.verify(progress=False)
    with pytest.raises(ValueError, match="image in row 97 of the train split"):
        for t in range(2):
            list(stream.train(t))
    swapped = TaskStream.from_dataset(make(cycle(12)), num_tasks=2, test_dataset=data)
    with pytest.raises(ValueError, match="row 97 of the test split"):
        swapped.verify()
    good = [row for row in range(130) if row not in (97, 101, 128)]
    TaskStream.from_dataset(data.select(good), num_tasks=2).verify()


def test_broken_held_out_image_is_named_by_its_row_in_the_dataset():
    contents = [pixel(i) for i in range(30)]
    held = numbers_of(TaskStream.from_dataset(make(cycle(30)), num_tasks=1).test(0))
    contents[held[-1]] = b"?"
    with pytest.raises(ValueError, match=rf"row {held[-1]} of the train split"):
        TaskStream.from_dataset(make(cycle(30), contents), num_tasks=1).verify()


def test_rows_without_an_image():
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": pixel(0), "path": None}] * 5 + [None], "label": [0, 0, 0, 1, 1, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}),
    )
    stream = TaskStream.from_dataset(data, num_tasks=2)
    for call in (stream.verify, stream.manifest):
        with pytest.raises(ValueError, match=r"row 5 of the train split is broken: ValueError: the row has no image"):
            call()


def test_all_kinds_of_images_become_rgb():
    rgb = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    grey16 = PIL.Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    palette = rgb.convert("P", palette=PIL.Image.Palette.ADAPTIVE, colors=8)
    see_through = palette.copy()
    see_through.info["transparency"] = bytes([0, 128] * 4)
    images = {
        "L": rgb.convert("L"),
        "1": rgb.convert("1"),
        "LA": rgb.convert("LA"),
        "RGBA": rgb.convert("RGBA"),
        "P": palette,
        "P with alpha": see_through,
        "16 bit": grey16,
        "CMYK": rgb.convert("CMYK"),
    }
    contents = [encode(image, "TIFF" if kind == "CMYK" else "PNG") for kind, image in images.items()]
    data = make([0] * 8, contents, datasets.ClassLabel(names=["a"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PIL warns of palettes with transparency
        stream = TaskStream.from_dataset(data, num_tasks=1, test_dataset=data)
        stream.verify()
        got = {kind: stream.train(0)[i]["image"] for i, kind in enumerate(images)}
    assert {image.mode for image in got.values()} == {"RGB"} and {image.size for image in got.values()} == {(8, 8)}
    assert np.array_equal(np.asarray(got["L"])[..., 1], np.asarray(images["L"]))
    assert np.array_equal(np.asarray(got["RGBA"]), np.asarray(rgb))
    assert np.array_equal(np.asarray(got["P"]), np.asarray(palette.convert("RGB")))
    assert np.array_equal(np.asarray(got["P with alpha"]), np.asarray(got["P"]))
    assert np.array_equal(np.asarray(got["16 bit"])[..., 0], np.asarray(grey16) >> 8)


def test_images_without_a_value_range_are_refused():
    content = encode(PIL.Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF")
    data = make([0, 0], [pixel(0), content], datasets.ClassLabel(names=["a"]))
    with pytest.raises(ValueError, match=r"row 1 of the train split is broken.*mode 'F'.*convert it to 8 bits"):
        TaskStream.from_dataset(data, num_tasks=1, test_dataset=data).verify()
