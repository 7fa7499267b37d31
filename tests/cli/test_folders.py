"""Images of local folders."""

from __future__ import annotations

import datasets
import pytest
from PIL import Image

from pgp_hf.cli.folders import image_files, labelled_images

PHOTOS = ("a/2.png", "a-c/1.png", "a/10.png", "B/x.jpg", "a b/y.PNG", "a/1-2.png", "a/1.png")


@pytest.fixture
def photos(tmp_path):
    for i, name in enumerate(PHOTOS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / ".hidden" / "1.png")
    return tmp_path


def test_rows_come_as_datasets_has_them(photos):
    images = labelled_images(str(photos), "--train_dir")
    other = datasets.load_dataset("imagefolder", data_files={"train": f"{photos}/**"}, cache_dir=photos / ".cache")
    names = other["train"].features["label"].names
    assert images["label"] == [names[label] for label in other["train"]["label"]]
    assert [one.tobytes() for one in images["image"]] == [one.tobytes() for one in other["train"]["image"]]
    assert images.info.dataset_name == photos.name


def test_a_single_class_is_enough(photos):
    images = labelled_images(str(photos / "a" / ".."), "--train_dir")
    assert len(set(images["label"])) == 4
    for name in ("a-c", "B", "a b"):
        for file in (photos / name).iterdir():
            file.unlink()
    assert set(labelled_images(str(photos), "--train_dir")["label"]) == {"a"}


def test_layouts_that_are_refused(photos, tmp_path):
    with pytest.raises(
        ValueError, match=r"--train_dir .*nowhere is not a folder here: expected one subfolder per class"
    ):
        labelled_images(str(photos / "nowhere"), "--train_dir")
    with pytest.raises(ValueError, match=r"--test_dir: .*1-2\.png is not in the subfolder of a class: expected"):
        labelled_images(str(photos / "a"), "--test_dir")
    (photos / "B" / "deep").mkdir()
    Image.new("RGB", (4, 4)).save(photos / "B" / "deep" / "1.png")
    with pytest.raises(ValueError, match=r"B/deep/1\.png is not in the subfolder of a class"):
        labelled_images(str(photos), "--train_dir")
    empty = tmp_path / ".empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no images: expected"):
        labelled_images(str(empty), "--train_dir")


def test_image_files_are_those_of_all_subfolders(photos):
    found = image_files(photos)
    assert found == sorted(found) and len(found) == len(PHOTOS) + 1
