"""Predictions of many images: folders, datasets, generators, workers, a bar, and how fast."""

from __future__ import annotations

import time

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.utils.data import Subset
from transformers import AutoImageProcessor, ViTForImageClassification

from pgp_hf import L2PConfig, embedded, load_pretrained
from pgp_hf.inference import image_files

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def clf(tmp_path_factory, without_figures):
    return load_pretrained(tiny.finished_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def rows():
    return tiny.data()["test"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("photos")
    for i, row in enumerate(rows):
        (root / f"{i % 3}").mkdir(exist_ok=True)
        row["image"].save(root / f"{i % 3}" / f"{i:02}.png")
    (root / "notes.txt").write_text("no image")
    return root


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert [x["label"] for x in a] == [y["label"] for y in b]
        assert [x["score"] for x in a] == pytest.approx([y["score"] for y in b], abs=1e-6)


def test_a_folder_is_its_image_files(clf, folder):
    files = image_files(folder)
    assert len(files) == 24 and files == sorted(files)
    same(clf.predict(folder, top_k=2), clf.predict(files, top_k=2))
    same(clf.predict(str(folder)), clf(files))


def test_a_dataset_in_every_form_it_has(clf, rows):
    expected = clf.predict([row["image"] for row in rows], top_k=3)
    stream = tiny.stream()
    for given in (
        rows,
        rows.rename_column("image", "photo"),
        rows.cast_column("image", datasets.Image(decode=False)),
        rows.to_iterable_dataset(),
        (row["image"] for row in rows),
        Subset(rows, range(len(rows))),
        np.stack([np.asarray(row["image"]) for row in rows]),
    ):
        same(clf.predict(given, top_k=3, batch_size=7), expected)
    same(clf.predict(stream.test(1)), [one[:1] for one in clf.predict([stream.test(1)[i] for i in range(8)])])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(clf, folder, rows, workers):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    same(clf.predict(folder, batch_size=5, num_workers=workers), clf.predict(folder))
    same(clf.predict(rows, batch_size=5, num_workers=workers), clf.predict(rows))
    assert torch.equal(before, torch.get_rng_state())


def test_predictions_come_as_they_are_made(clf, rows):
    taken = []

    def images():
        for row in rows:
            taken.append(row)
            yield row["image"]

    found = clf.classify(images(), batch_size=4)
    assert not taken
    next(found)
    assert len(taken) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_and_the_others_go_on(clf, folder, tmp_path, workers):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    files = [*image_files(folder)[:5], tmp_path / "broken.png", *image_files(folder)[5:8]]
    found = list(clf.stream(files, batch_size=3, num_workers=workers))
    failed = [i for i, result in enumerate(found) if isinstance(result, Exception)]
    assert failed == [5] and "broken.png cannot be read as an image" in str(found[5])
    same([result.labels for i, result in enumerate(found) if i != 5], clf.predict(image_files(folder)[:8]))
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        clf.predict(files, num_workers=workers)
    assert all(isinstance(result, ValueError) for result in clf.stream(files[5:6]))  # a batch without any


@pytest.mark.slow
def test_a_damaged_row_of_a_dataset_is_named(clf, rows):
    broken = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    broken[2]["image"] = {"bytes": b"no image", "path": None}
    damaged = datasets.Dataset.from_list(broken).cast_column("image", datasets.Image())
    found = list(clf.stream(damaged))
    assert "image 2 cannot be read" in str(found[2]) and sum(isinstance(one, Exception) for one in found) == 1


def test_a_bar_on_stderr_alone_and_only_where_asked_for(clf, rows, capsys, monkeypatch):
    clf.predict(rows, progress=True, batch_size=8)
    out, err = capsys.readouterr()
    assert out == "" and "24/24" in err
    clf.predict((row for row in rows), progress=True)
    assert "24img" in capsys.readouterr().err  # of an unknown number
    clf.predict(rows)
    clf.predict(rows, progress=None)  # this is no terminal
    assert capsys.readouterr() == ("", "")


def test_what_is_refused(clf, rows, tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        clf.predict(tmp_path)
    with pytest.raises(ValueError, match="num_workers=-1 is out of range"):
        clf.predict(rows, num_workers=-1)
    with pytest.raises(ValueError, match="num_workers=2 needs images that can be indexed, and a generator"):
        clf.predict((row for row in rows), num_workers=2)
    with pytest.raises(TypeError, match="or a folder"):
        clf.predict(7)


@pytest.mark.slow
def test_as_fast_as_a_bare_loop(tmp_path):
    """CPU time, since other processes run at the same time; the best of several rounds."""
    name = embedded.vit_path()  # of a realistic size: reading an image is less work than looking at it
    base = ViTForImageClassification.from_pretrained(name, num_labels=6)
    processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    model = tiny.model(L2PConfig(pool_size=5, prompt_length=5, top_k=2), base)
    tiny.trainer(tmp_path / "run", model=model, processing_class=processor, num_train_epochs=1).train()
    clf = load_pretrained(tmp_path / "run")
    rng = np.random.default_rng(0)
    for i in range(600):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(tmp_path / f"{i:03}.png")
    files = sorted(tmp_path.glob("*.png"))

    @torch.no_grad()
    def bare():
        found = []
        for start in range(0, len(files), 32):
            images = [Image.open(file).convert("RGB") for file in files[start : start + 32]]
            pixels = clf.processor(images, return_tensors="pt")["pixel_values"]
            found += clf.model(pixel_values=pixels).logits.softmax(-1).max(-1).values.tolist()
        return found

    def seconds(run):
        began = time.process_time()
        run()
        return time.process_time() - began

    loop, ours = zip(*[(seconds(bare), seconds(lambda: clf.predict(files))) for _ in range(6)], strict=True)
    assert min(loop) >= 0.95 * min(ours)
