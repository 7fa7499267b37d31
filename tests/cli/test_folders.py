"""Images of local folders."""

from __future__ import annotations

import shutil
import sys

import datasets
import pytest
from PIL import Image

from pgp_hf.cli.folders import image_files, labelled_images
from pgp_hf.data.local import load_image_folders

PHOTOS = ("a/2.png", "a-c/1.png", "a/10.png", "B/x.jpg", "a b/y.PNG", "a/1-2.png", "a/1.png")


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for i, name in enumerate(PHOTOS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(root / name)
    (root / "a" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    Image.new("RGB", (4, 4)).save(root / ".hidden" / "1.png")
    return root


def pixels(images):
    return [one.tobytes() for one in images["image"]]


def test_rows_come_as_datasets_has_them(photos, tmp_path):
    images = labelled_images([str(photos)], "--train_dir")
    other = datasets.load_dataset("imagefolder", data_files=f"{photos}/**", cache_dir=tmp_path / "cache")["train"]
    assert images.features == other.features
    assert images["label"] == other["label"] and pixels(images) == pixels(other)
    assert images.info.dataset_name == "photos"


def test_a_single_class_is_enough(photos):
    for name in ("a-c", "B", "a b"):
        shutil.rmtree(photos / name)
    images = labelled_images([str(photos)], "--train_dir")
    assert images.features["label"].names == ["a"] and len(images) == 4


def test_several_folders_and_further_classes(photos, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(photos / "a", more / "c")
    images = labelled_images([str(more), str(photos)], "--train_dir", names=["b", "a"])
    assert images.features["label"].names == ["B", "a", "a b", "a-c", "b", "c"]
    alone = labelled_images([str(photos)], "--train_dir")
    names = [[data.features["label"].names[label] for label in data["label"]] for data in (images, alone)]
    assert names[0] == ["c"] * 4 + names[1] and pixels(images)[4:] == pixels(alone)
    assert images.info.dataset_name == "more and photos"


def test_layouts_that_are_refused(photos, tmp_path):
    def refused(folder, match):
        with pytest.raises(ValueError, match=match):
            labelled_images([str(photos), str(folder)], "--test_dir")

    refused(tmp_path / "nowhere", r"--test_dir .*nowhere is not a folder here: expected one subfolder per class")
    refused(photos / "a", r"--test_dir: .*1-2\.png is not in the subfolder of a class: expected .*/a/CLASS/IMAGE")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    refused(tmp_path / "empty", r"--test_dir .*empty holds no images: expected")
    shutil.copytree(photos / "a", photos / "B" / "deep")
    refused(photos, r"B/deep/1-2\.png is not in the subfolder of a class")
    (photos / "B" / "deep").rename(tmp_path / "deep")
    shutil.copytree(photos / "a", photos / "__none__")
    refused(photos, r"photos/__none__ cannot be a class, since its name begins with '__': rename it")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all names of files are Unicode")
def test_names_that_are_not_utf8(photos):
    shutil.copytree(photos / "a", photos / "\udcff")
    with pytest.raises(ValueError, match=r"the path '.*\\udcff/1-2.png' is not UTF-8"):
        labelled_images([str(photos)], "--train_dir")
    with pytest.raises(ValueError, match=r"the path '.*\\udcff/.*' is not UTF-8"):
        load_image_folders({"train": str(photos)})


def test_image_files_are_those_of_all_subfolders(photos):
    found = image_files(photos)
    assert found == sorted(found) and len(found) == len(PHOTOS) + 1
