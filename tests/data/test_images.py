"""Augmentation by counters, and the collator."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from pgp_hf.data.images import AugmentedImages, CachedQueries, ImageCollator, _random_box


def pixels(view, epoch):
    view.set_epoch(epoch)
    return [np.asarray(view[i]["image"]) for i in range(len(view))]


@pytest.fixture(scope="module")
def images():
    return tiny.stream().train(0)


@pytest.mark.parametrize("kind", ["none", "flip", "crop_flip"])
def test_views_depend_on_seed_task_epoch_and_index_alone(images, kind):
    first = AugmentedImages(images, kind, 0.2, seed=1, task=0)
    expected = pixels(first, 0)
    np.random.seed(0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    again = AugmentedImages(images, kind, 0.2, seed=1, task=0)
    again.set_epoch(0)
    backwards = [np.asarray(again[i]["image"]) for i in reversed(range(len(again)))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(expected, backwards, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    others = [
        pixels(first, 1),
        pixels(AugmentedImages(images, kind, 0.2, seed=2, task=0), 0),
        pixels(AugmentedImages(images, kind, 0.2, seed=1, task=1), 0),
    ]
    for other in others:
        same = [np.array_equal(a, b) for a, b in zip(expected, other, strict=True)]
        assert all(same) if kind == "none" else not all(same)


def test_flip_turns_about_half_of_the_images(images):
    plain = pixels(AugmentedImages(images, "none", 1.0, 0, 0), 0)
    flipped, epochs = 0, 30
    view = AugmentedImages(images, "flip", 1.0, 0, 0)
    for epoch in range(epochs):
        for a, b in zip(plain, pixels(view, epoch), strict=True):
            assert np.array_equal(a, b) or np.array_equal(a[:, ::-1], b)
            flipped += not np.array_equal(a, b)
    assert 0.4 < flipped / (epochs * len(plain)) < 0.6


@pytest.mark.parametrize("size", [(32, 32), (500, 300), (9, 60), (200, 3)])
@pytest.mark.parametrize("smallest", [0.05, 0.5, 1.0])
def test_crops_lie_inside_and_keep_area_and_ratio(size, smallest):
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = _random_box(size, smallest, rng)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if (left, top, right, bottom) != (0, 0, *size) and min(size) > 20:
            width, height = right - left, bottom - top
            assert width * height / (size[0] * size[1]) > 0.85 * smallest
            assert 0.6 < width / height < 1.6


def test_collator_is_the_image_processor(images):
    processor = tiny.processor()
    batch = ImageCollator(processor)([images[i] for i in (0, 5, 3)])
    expected = processor([images[i]["image"] for i in (0, 5, 3)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == images.labels[[0, 5, 3]].tolist()
    assert "prompt_query" not in batch


def test_cached_queries_travel_with_their_images(images):
    queries = torch.randn(len(images), 7)
    view = CachedQueries(images, queries)
    batch = ImageCollator(tiny.processor())([view[i] for i in (4, 1)])
    assert torch.equal(batch["prompt_query"], queries[[4, 1]])
    assert len(view) == len(images)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_queries_of_some_images_are_left_out(images, order):
    """Whichever item comes first; what all items have stays."""
    some = CachedQueries(images, torch.randn(len(images), 7))
    items = [(images, some)[which][position] for which, position in zip(order, (4, 1), strict=True)]
    batch = ImageCollator(tiny.processor())(items)
    assert "prompt_query" not in batch
    assert batch["task"].tolist() == [0, 0] and batch["index"].tolist() == [4, 1]
    assert batch["labels"].tolist() == images.labels[[4, 1]].tolist()


def test_images_of_two_tasks_keep_their_own_task_and_index():
    stream = tiny.stream()
    first, second = stream.train(0), stream.train(2)
    queries = torch.randn(2, len(first), 7)
    items = [CachedQueries(first, queries[0])[5], CachedQueries(second, queries[1])[3], first[-1]]
    batch = ImageCollator(tiny.processor())(items[:2])
    assert batch["task"].tolist() == [0, 2] and batch["index"].tolist() == [5, 3]
    assert batch["task"].dtype == batch["index"].dtype == torch.int64
    assert torch.equal(batch["prompt_query"], queries[[0, 1], [5, 3]])
    assert batch["labels"].tolist() == [first.labels[5], second.labels[3]]
    assert ImageCollator(tiny.processor())(items)["index"].tolist() == [5, 3, len(first) - 1]


@pytest.mark.parametrize("lacking", ["task", "index"])
def test_what_an_item_lacks_is_left_out_of_its_batch(images, lacking):
    items = [images[0], {name: value for name, value in images[1].items() if name != lacking}]
    assert set(ImageCollator(tiny.processor())(items)) == {"pixel_values", "labels", "task", "index"} - {lacking}


@pytest.mark.parametrize("kind", ["none", "flip", "crop_flip"])
def test_augmented_and_flipped_images_keep_task_and_index(kind):
    images = tiny.stream().train(1)
    view = AugmentedImages(images, kind, 0.2, seed=0, task=1)
    for one in (view, *view.views()):
        assert [(one[i]["task"], one[i]["index"]) for i in range(3)] == [(1, 0), (1, 1), (1, 2)]


def test_each_view_travels_with_its_own_query(images):
    view = AugmentedImages(images, "flip", 1.0, 0, 0)
    plain, flipped = view.views()
    view.queries = torch.stack([torch.zeros(len(images), 2), torch.ones(len(images), 2)])
    seen = set()
    for epoch in range(4):
        view.set_epoch(epoch)
        for i in range(len(images)):
            item = view[i]
            turned = int(item["prompt_query"][0])
            assert np.array_equal(item["image"], (flipped if turned else plain)[i]["image"])
            seen.add(turned)
    assert seen == {0, 1} and len(flipped) == len(images)


@pytest.mark.parametrize(("kind", "views"), [("none", 1), ("flip", 2), ("crop_flip", 0)])
def test_views_are_counted(images, kind, views):
    assert len(AugmentedImages(images, kind, 0.2, 0, 0).views()) == views
