"""Streams whose tasks see the world differently."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tiny
from PIL import Image

from pgp_hf import TaskStream, load_pretrained
from pgp_hf.cli.settings import digests
from pgp_hf.data.shifts import RENDERINGS, SHIFTS, Shift


def pixels(stream: TaskStream, split: str, t: int) -> np.ndarray:
    images = getattr(stream, split)(t)
    return np.stack([np.asarray(images[index]["image"]) for index in range(len(images))])


def picture(side: int = 20) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (side, side + 4, 3)).astype(np.uint8))


@pytest.mark.parametrize("name", RENDERINGS)
def test_a_rendering_is_a_function_of_the_image(name):
    before = np.asarray(image := picture()).copy()
    first, again = (np.asarray(RENDERINGS[name](image)) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(np.asarray(image), before)  # the image itself stays
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[-1] == 3
    assert np.array_equal(first, before) == (name == "as they are")


def test_every_rendering_differs_from_every_other():
    shown = {name: np.asarray(render(picture())).tobytes() for name, render in RENDERINGS.items()}
    assert len(set(shown.values())) == len(RENDERINGS) == 10


@pytest.mark.parametrize("side", [8, 33])
def test_blur_scales_with_the_image(side):
    flat = Image.new("RGB", (side, side), (9, 90, 200))
    assert np.array_equal(np.asarray(RENDERINGS["blurred"](flat)), np.asarray(flat))
    varied = picture(side)
    assert np.asarray(RENDERINGS["blurred"](varied)).std() < np.asarray(varied).std()


def test_training_and_test_images_of_a_task_share_its_rendering():
    plain, shifted = tiny.stream(), tiny.stream(shift="renderings")
    names = shifted.manifest()["renderings"]
    assert len(set(names)) == len(names) == shifted.num_tasks
    for t, name in enumerate(names):
        for split in ("train", "test"):
            images = getattr(plain, split)(t)
            expected = [np.asarray(RENDERINGS[name](images[i]["image"])) for i in range(len(images))]
            assert np.array_equal(pixels(shifted, split, t), np.stack(expected))


def test_a_shift_changes_neither_class_order_nor_rows():
    plain, shifted = tiny.stream(), tiny.stream(shift="renderings")
    assert plain.class_order == shifted.class_order
    assert plain.manifest()["tasks"] == shifted.manifest()["tasks"]
    assert "shift" not in plain.manifest() and "renderings" not in plain.manifest()


def test_the_seed_draws_the_renderings():
    drawn = [Shift.draw("renderings", 10, seed).tasks for seed in range(4)]
    assert Shift.draw("renderings", 10, 0).tasks == drawn[0]
    assert all(sorted(names) == sorted(RENDERINGS) for names in drawn)
    assert len({tuple(names) for names in drawn}) == 4
    long = Shift.draw("renderings", 23, 0).tasks
    assert long[:10] == drawn[0] and len(set(long[10:20])) == 10 and len(long) == 23


def test_joined_images_keep_their_renderings():
    shifted = tiny.stream(shift="renderings")
    apart = np.concatenate([pixels(shifted, "train", t) for t in range(shifted.num_tasks)])
    together = pixels(shifted.joined(), "train", 0)
    assert sorted(image.tobytes() for image in apart) == sorted(image.tobytes() for image in together)


def test_images_can_be_sent_to_worker_processes():
    images = tiny.stream(shift="renderings").train(1)
    sent = pickle.loads(pickle.dumps(images))
    assert all(
        np.array_equal(np.asarray(sent[i]["image"]), np.asarray(images[i]["image"])) for i in range(len(images))
    )


def test_test_images_found_by_a_manifest_are_rendered():
    data = tiny.data()
    shifted = TaskStream.from_dataset(data, num_tasks=3, shift="renderings")
    again = TaskStream.from_manifest(shifted.manifest(), data)
    for t in range(3):
        assert np.array_equal(pixels(again, "test", t), pixels(shifted, "test", t))
    two = TaskStream.from_manifest(shifted.manifest(), data, num_tasks=2)
    two.append(data["train"].select(range(4)))
    assert np.array_equal(pixels(two, "test", 1), pixels(shifted, "test", 1))
    shown = {np.asarray(image.convert("RGB")).tobytes() for image in data["train"]["image"]}
    assert all(image.tobytes() in shown for image in pixels(two, "train", 2))  # what is appended is as it is


def test_another_shift_is_another_stream():
    plain, shifted = tiny.stream(), tiny.stream(shift="renderings")
    with pytest.raises(ValueError, match=r"shift: None here, 'renderings' in the manifest"):
        plain.check_manifest(shifted.manifest())
    with pytest.raises(ValueError, match=r"shift: 'renderings' here, None in the manifest"):
        shifted.check_manifest(plain.manifest())
    shifted.check_manifest(tiny.stream(shift="renderings").manifest())
    backbone = tiny.backbone()
    assert digests(plain, backbone)["stream"] != digests(shifted, backbone)["stream"]
    other = {**shifted.manifest(), "renderings": shifted.manifest()["renderings"][::-1]}
    with pytest.raises(ValueError, match=r"renderings\[0\]"):
        shifted.check_manifest(other)


@pytest.mark.parametrize("shift", ["blur", "", 3, True])
def test_an_unknown_shift(shift):
    with pytest.raises(
        ValueError, match=r"shift must be one of \['renderings'\], or None for images as they are, got"
    ):
        tiny.stream(shift=shift)


@pytest.mark.parametrize(("names", "shown"), [(["sepia", "grey", "grey"], "sepia"), (None, "None"), ("grey", "grey")])
def test_a_manifest_with_unknown_renderings(names, shown):
    manifest = {**tiny.stream(shift="renderings").manifest(), "renderings": names}
    with pytest.raises(ValueError, match=shown):
        TaskStream.from_manifest(manifest)
    assert list(SHIFTS) == ["renderings"]


def test_a_run_on_a_shifted_stream(tmp_path, without_figures):
    stream = tiny.stream(shift="renderings")
    trainer = tiny.trainer(tmp_path / "run", stream=stream)
    trainer.train()
    clf = load_pretrained(tmp_path / "run", backbone=tiny.backbone())
    shown = [stream.test(1)[i]["image"] for i in range(len(stream.test(1)))]
    right = [
        answer[0]["label"] == stream.label_names[label]
        for answer, label in zip(clf.predict(shown), stream.test(1).labels, strict=True)
    ]
    assert 100 * np.mean(right) == pytest.approx(trainer.results.matrix[-1][1])
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"each task's images in a rendering of their own: {', '.join(stream.manifest()['renderings'])}" in card
