"""A folder is read under any name: the images are those inside it, whatever lies beside it, or its name is refused."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from numbered import NAMES, cycle, make, pixel

from pgp_hf.cli.arguments import DataArguments
from pgp_hf.cli.folders import image_files, labelled_images
from pgp_hf.cli.learn import LearnArguments
from pgp_hf.data import local
from pgp_hf.data.stream import TaskStream

# names, each with another that the first means as a pattern, a variable, a home or a reader of datasets
RELATIVE = {"~": "other", "~root": "other", "imagefolder": "other", "parquet": "other"}  # not as an absolute path
TAKEN = {
    "data[1]": "data1",
    "data[!0]": "data1",
    "data[0-9]": "data5",
    "data[[]1]": "data[1]",
    "a*b": "aXb",
    "a?b": "aXb",
    "**": "other",
    "c]d": "cd",
    "{a,b}": "a",
    "a#b%20c": "a",
    **RELATIVE,
}
LAYOUTS = [
    *((name, "splits") for name in TAKEN),
    *((name, layout) for name in ("data[1]", "parquet") for layout in ("one", "parquet")),
]
REFUSED = {"e::f": "e", "m$HOME": "m", "m${HOME}": "m"}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HOME", "X")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working directory, to make folders in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, layout: str, first: int, per_class: int = 2) -> None:
    """Write images that their colours number from `first`."""
    labels = sorted(cycle(6 * per_class))
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden" / "1.png").write_bytes(pixel(99))
    if layout == "parquet":
        (folder / "notes.txt").write_text("not a table")
        for split, at in (("train", first), ("test", first + 100)):
            make(labels, first=at).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        return
    (folder / "notes.txt").write_text("not an image")
    for split, at in {"splits": {"train": 0, "test": 100}, "one": {"": 0}}[layout].items():
        for i, label in enumerate(labels):
            file = folder / split / NAMES[label] / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(pixel(first + at + i))


def content(stream: TaskStream) -> dict:
    """What identifies the images, in order."""
    return {name: value for name, value in stream.manifest().items() if name != "dataset"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Callable[[str], dict]:
    """What identifies the images of a layout, from a folder of a plain name."""
    root = tmp_path_factory.mktemp("plain")

    @functools.cache
    def read(layout: str) -> dict:
        write(root / layout, layout, first=0)
        return content(TaskStream.from_dataset(root / layout, num_tasks=2))

    return read


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_any_name_of_a_folder_is_taken_literally(place, plain, name, layout):
    write(place / name, layout, first=0)
    write(place / TAKEN[name], layout, first=200, per_class=3)
    path = name if name in RELATIVE else place / name
    stream = TaskStream.from_dataset(path, num_tasks=2)
    assert content(stream) == plain(layout) and stream.manifest()["dataset"]["name"] == name
    if layout == "parquet":
        given = DataArguments(dataset_name=str(path), num_tasks=2).load(0)
        assert given.manifest()["tasks"] == plain(layout)["tasks"]


@pytest.mark.parametrize("name", ["data[1]", "a*b", "a?b", "~root", "imagefolder"])
def test_the_folders_of_the_command_line_are_taken_literally(place, plain, name):
    for folder, first, per_class in ((name, 0, 2), (TAKEN[name], 200, 3)):
        write(place / folder, "splits", first, per_class)
    given = DataArguments(train_dir=f"{name}/train", validation_dir=f"{name}/test", num_tasks=2).load(0)
    assert given.manifest()["tasks"] == plain("splits")["tasks"]
    train, test, _ = LearnArguments(train_dir=f"{name}/train", test_dir=f"{name}/test").new_images()
    learned = TaskStream.from_dataset(train, test_dataset=test, num_tasks=2)
    assert learned.manifest()["tasks"] == plain("splits")["tasks"]
    assert [file.name for file in image_files(place / name / "train")] == [f"{i:02}.png" for i in range(12)]


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_datasets_would_resolve_are_refused(place, name):
    write(place / name, "splits", first=0)
    write(place / os.path.expandvars(REFUSED[name] + name.partition("m")[2]), "splits", first=200)
    write(place / "plain", "splits", first=0)
    for call in (
        lambda: TaskStream.from_dataset(place / name, num_tasks=2),
        lambda: DataArguments(train_dir=str(place / name / "train"), num_tasks=2).load(0),
    ):
        with pytest.raises(ValueError, match=r"would be taken for .*: rename it"):
            call()
    # a file inside is no better; and where images are opened here, any name will do
    shutil.move(place / name / "train" / "ant", place / "plain" / "train" / name)
    for call in (
        lambda: TaskStream.from_dataset(place / "plain", num_tasks=2),
        lambda: DataArguments(train_dir=str(place / "plain" / "train"), num_tasks=2).load(0),
    ):
        with pytest.raises(ValueError, match=r"would be taken for .*: rename it"):
            call()
    images = labelled_images([str(place / "plain" / "train")], "--train_dir")
    assert TaskStream.from_dataset(images, num_tasks=7).label_names == sorted([*NAMES, name])
    TaskStream.from_dataset(images, num_tasks=7).manifest()


def test_a_link_to_such_a_folder(tmp_path):
    write(tmp_path / "data[1]", "splits", first=0)
    write(tmp_path / "data1", "splits", first=200)
    (tmp_path / "link").symlink_to("data[1]")
    here, there = (TaskStream.from_dataset(tmp_path / name, num_tasks=2) for name in ("link", "data[1]"))
    assert content(here) == content(there)


def test_a_single_class(tmp_path):
    for name, first in (("data[1]", 0), ("data1", 200)):
        (tmp_path / name / "owl").mkdir(parents=True)
        for i in range(4):
            (tmp_path / name / "owl" / f"{i}.png").write_bytes(pixel(first + i))
    stream = TaskStream.from_dataset(tmp_path / "data[1]", num_tasks=1)
    assert stream.label_names == ["owl"] and len(stream.train(0)) == 3
    (tmp_path / "plain").mkdir()
    shutil.copytree(tmp_path / "data[1]" / "owl", tmp_path / "plain" / "owl")
    assert content(stream) == content(TaskStream.from_dataset(tmp_path / "plain", num_tasks=1))


def test_a_card_that_chooses_files_is_not_passed_over(tmp_path):
    write(tmp_path / "data[1]", "parquet", first=0)
    card = tmp_path / "data[1]" / "README.md"
    card.write_text("---\nconfigs:\n- config_name: default\n  data_files: data/test-*\n---\n")
    with pytest.raises(ValueError, match=r"README\.md that chooses files by patterns, and '\['.*rename the folder"):
        TaskStream.from_dataset(tmp_path / "data[1]", num_tasks=2)
    card.write_text("---\nlicense: mit\n---\n")
    assert len(TaskStream.from_dataset(tmp_path / "data[1]", num_tasks=1).train(0)) == 12


def test_what_save_to_disk_has_written_is_not_read_as_tables(tmp_path):
    rows = make(sorted(cycle(12)))
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "one[1]")
    for name, mark in (("splits", "dataset_dict"), ("splits/train", "state"), ("one[1]", "state")):
        with pytest.raises(
            ValueError, match=rf"{mark}\.json shows: use datasets\.load_from_disk and pass the dataset"
        ):
            TaskStream.from_dataset(tmp_path / name, num_tasks=2)
    saved = datasets.load_from_disk(tmp_path / "splits")  # as the message says
    assert len(TaskStream.from_dataset(saved, num_tasks=1).train(0)) == 12


@pytest.mark.parametrize("name", ["imagefolder", "parquet", "csv", "json"])
def test_a_reader_of_datasets_is_not_a_dataset(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "splits", first=0)  # which it would read
    assert local.is_reader(name) and not local.is_reader("cifar100")
    with pytest.raises(ValueError, match=rf"'{name}' is neither an existing folder nor a Hub id"):
        TaskStream.from_dataset(name, num_tasks=2)
    with pytest.raises(ValueError, match=rf"'{name}' is neither an existing folder nor a Hub id"):
        DataArguments(dataset_name=name, dataset_revision="v1", num_tasks=2).load(0)


@pytest.mark.parametrize("option", ["train_dir", "validation_dir"])
def test_a_folder_without_images(option, tmp_path):
    write(tmp_path / "data", "splits", first=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    folders = {"train_dir": str(tmp_path / "data" / "train"), "validation_dir": str(tmp_path / "data" / "test")}
    folders[option] = str(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty holds no images: expected one subfolder per class"):
        DataArguments(**folders, num_tasks=2).load(0)


def test_a_class_that_is_a_link_is_not_left_out_without_a_word(tmp_path):
    write(tmp_path / "data", "splits", first=0)
    train = tmp_path / "data" / "train"
    elsewhere = shutil.move(next(folder for folder in sorted(train.iterdir())), tmp_path / "elsewhere")
    (tmp_path / "notes").mkdir()
    (train / "notes").symlink_to(tmp_path / "notes")  # without images: nothing is lost
    (train / "owl").symlink_to(elsewhere)
    for call in (
        lambda: TaskStream.from_dataset(tmp_path / "data", num_tasks=2),
        lambda: DataArguments(train_dir=str(train), validation_dir=str(tmp_path / "data/test"), num_tasks=2).load(0),
        lambda: labelled_images([str(train)], "--train_dir"),
    ):
        with pytest.raises(ValueError, match="train/owl is a link to a folder of images, which is not followed: put"):
            call()


def images(root: Path, *names: str) -> Path:
    """A folder with images of these names."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(pixel(i))
    return root


def test_test_images_of_a_class_called_train_are_not_trained_on(tmp_path):
    root = images(tmp_path / "cifar", "train/apple/1.png", "train/train/2.png", "test/apple/3.png", "test/train/4.png")
    with pytest.raises(
        ValueError, match=r"test/train/4\.png would be in the splits 'train' and 'test', .*--train_dir"
    ):
        TaskStream.from_dataset(root, num_tasks=1)
    folders = {"train_dir": str(root / "train"), "validation_dir": str(root / "test")}
    stream = DataArguments(**folders, num_tasks=1).load(0)  # as the message says
    assert stream.label_names == ["apple", "train"] and stream.manifest()["dataset"]["name"] == "cifar"
    assert (stream.train(0).labels.tolist(), stream.test(0).labels.tolist()) == ([0, 1], [0, 1])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("train/3.png", r"bus/2\.png would be left out: the path of .*train/3\.png has a word for the split 'train'"),
        ("__none__/3.png", r"3\.png would be left out: .*names begin with '__', such as '__none__'; rename it"),
        ("car/3.QOI", r"3\.QOI would be left out: datasets does not read \.qoi files; convert it, or remove it"),
        ("new\nline/3.png", r"new\\nline/3\.png' would be left out: .*rename it"),
    ],
)
def test_no_image_is_left_out_without_a_word(name, reason, tmp_path):
    root = images(tmp_path / "photos", "car/1.png", "bus/2.png", name)
    with pytest.raises(ValueError, match=reason):
        TaskStream.from_dataset(root, num_tasks=1)


def test_what_lies_elsewhere_or_is_hidden_may_be_left_out(tmp_path):
    hidden = ("._1.png", "__MACOSX/._1.png", ".ipynb_checkpoints/1.png")
    root = images(tmp_path / "data", *(f"{split}/{name}/1.png" for split in ("train", "test") for name in NAMES))
    images(root, *(f"train/{NAMES[0]}/{name}" for name in hidden), "extra/1.png", "more/ant/1.png", "preview.png")
    (root / "train" / NAMES[0] / "broken.png").symlink_to("nowhere")
    stream = TaskStream.from_dataset(root, num_tasks=1)
    assert (len(stream.train(0)), len(stream.test(0))) == (len(NAMES), len(NAMES))


def test_folders_of_one_name_are_not_one_class(tmp_path):
    root = images(tmp_path / "tiny", *(f"{name}/images/{i}.png" for name in ("cat", "dog") for i in range(2)))
    with pytest.raises(
        ValueError, match=r"cat/images and .*dog/images would be one class, 'images': expected one sub"
    ):
        TaskStream.empty().append(root)


def test_what_cannot_be_read_is_told_with_its_reason(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("a,b\n1\n1,2,3,4\n")
    with pytest.raises(ValueError, match=r"could not be loaded: ParserError: .*Expected 2 fields in line 3, saw 4"):
        TaskStream.from_dataset(tmp_path / "data", num_tasks=1)


def test_metadata_in_place_of_labels_is_named(tmp_path):
    root = images(tmp_path / "pets", "cat/1.png", "dog/2.png")
    (root / "metadata.csv").write_text("file_name,breed\ncat/1.png,siam\ndog/2.png,boxer\n")
    with pytest.raises(ValueError, match=r"pets/metadata\.csv takes the place of the folders' names as labels: name"):
        DataArguments(train_dir=str(root), num_tasks=1).load(0)
    found = DataArguments(train_dir=str(root), label_column_name="breed", num_tasks=1)  # as the message says
    assert found.source()["train"].unique("breed") == ["siam", "boxer"]


@pytest.mark.parametrize("option", ["train_dir", "validation_dir"])
def test_a_pattern_is_not_a_folder(option, tmp_path):
    write(tmp_path / "data1", "splits", first=0)
    folders = {"train_dir": str(tmp_path / "data1" / "train"), "validation_dir": str(tmp_path / "data1" / "test")}
    folders[option] = folders[option].replace("data1", "data[1]")
    with pytest.raises(ValueError, match=rf"--{option} .*data\[1\].* is not a folder here"):
        DataArguments(**folders, num_tasks=2).load(0)
    with pytest.raises(ValueError, match="neither an existing folder nor a Hub id"):
        TaskStream.from_dataset(tmp_path / "data[1]", num_tasks=2)
