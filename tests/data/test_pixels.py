"""Whole batches of images are processed as the image processor does it, to within a grey level."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from pgp_hf.data.images import AugmentedImages, ImageCollator
from pgp_hf.data.pixels import Buffers, PixelStore, recipe, render
from pgp_hf.training.settings import check_same_settings

LEVEL = 2 / 255  # of a grey level, at a mean and standard deviation of 0.5


def made(height, width, resample=2, **settings):
    return ViTImageProcessorPil(size={"height": height, "width": width}, resample=resample, **settings)


@pytest.mark.parametrize(
    ("size", "target"), [((32, 32), (56, 56)), ((61, 37), (24, 18)), ((40, 90), (50, 20)), ((9, 9), (9, 9))]
)
def test_crops_are_what_the_processor_makes_of_them(size, target):
    """Enlarged and reduced, with antialias, crops of any place and mirrored ones."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, *size, 3)).astype(np.uint8)
    pixels[:4] = pixels[:4].mean((1, 2), keepdims=True) + rng.integers(-3, 4, (4, *size, 3))
    processor, views, expected = made(*target, image_mean=[0.4, 0.5, 0.6], image_std=[0.5, 0.5, 0.5]), [], []
    for image in pixels:
        left, top = rng.integers(0, size[1] // 2), rng.integers(0, size[0] // 2)
        box = (int(left), int(top), int(rng.integers(left + 1, size[1] + 1)), int(rng.integers(top + 1, size[0] + 1)))
        views.append((*box, bool(rng.random() < 0.5)))
        crop = Image.fromarray(image).crop(box)
        expected.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views[-1][4] else crop)
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    found = render(batch, torch.tensor(views), recipe(processor))
    apart = (found - processor(expected, return_tensors="pt")["pixel_values"]).abs() / LEVEL
    assert apart.max() < 1.01 and apart.mean() < 0.3  # PIL decides which axis comes first, and rounds in between


def test_a_processor_that_does_more_is_left_to_do_it():
    assert recipe(tiny.processor()) is not None
    assert recipe(CLIPImageProcessorPil()) is None  # it crops
    assert recipe(made(8, 8, do_resize=False)) is None
    assert recipe(made(8, 8, resample=3)) is None
    assert recipe(lambda images, **kwargs: None) is None


def views(exact, augmentation="crop_flip", keep=True):
    images = AugmentedImages(tiny.stream().train(0), augmentation, 0.2, seed=1, task=0, exact=exact)
    if keep:
        images.keep_pixels()
    return images


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop_flip"])
def test_augmentation_is_the_same_for_any_batches_workers_and_device(augmentation):
    one = ImageCollator(tiny.processor())([*views(True, augmentation)])
    collate = ImageCollator(tiny.processor(), exact=False)
    whole = collate([*views(False, augmentation)])
    assert (one["pixel_values"] - whole["pixel_values"]).abs().max() < 1.01 * LEVEL
    for workers, size in ((0, 3), (2, 5)):
        batches = list(DataLoader(views(False, augmentation), size, collate_fn=collate, num_workers=workers))
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), whole["pixel_values"])
        assert torch.equal(torch.cat([batch["index"] for batch in batches]), one["index"])
    later = ImageCollator(tiny.processor(), exact=False, on_device=True)
    batch = later([*views(False, augmentation)])
    assert batch["pixels"].dtype == torch.uint8 and "pixel_values" not in batch
    later.finish(batch)
    assert torch.equal(batch["pixel_values"], whole["pixel_values"])


def test_images_of_several_sizes_and_large_ones_are_in_one_batch():
    rng = np.random.default_rng(0)
    sizes = [(20, 20), (300, 280), (31, 20), (20, 20)]
    items = [{"image": Image.fromarray(rng.integers(0, 256, (*s, 3)).astype(np.uint8)), "label": 0} for s in sizes]
    found, exact = (ImageCollator(tiny.processor(), each)(items)["pixel_values"] for each in (False, True))
    assert (found - exact).abs().max() < 1.01 * LEVEL
    assert torch.equal(found[1], exact[1])


def test_an_image_is_decoded_once(monkeypatch):
    images = views(False)
    first = [image["pixels"].clone() for image in images]
    monkeypatch.setattr(images.images, "_decoded", None)
    images.set_epoch(1)
    again = [image["pixels"] for image in images]
    assert all(map(torch.equal, first, again)) and [item["index"] for item in images] == list(range(len(images)))
    assert PixelStore.for_images(10**6, (224, 224, 3)) is None
    assert PixelStore.for_images(2, (4, 4, 3)) is not None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert PixelStore.for_images(2, (4, 4, 3)) is None  # a full disk would end the process


def test_memory_is_used_again_once_nobody_refers_to_it():
    buffers, device = Buffers(), torch.device("cpu")
    batch = buffers.take((4, 2), device)
    place, part = batch.data_ptr(), batch[1:, 0]
    del batch
    assert buffers.take((4, 2), device).data_ptr() != place  # a view of it is in use
    del part
    numbers = buffers.take((4, 2), device).numpy()
    assert numbers.ctypes.data == place
    assert buffers.take((4, 2), device).data_ptr() != place
    del numbers
    buffers.take((4, 2), device).share_memory_()  # with a process that may be reading it
    assert not buffers.take((4, 2), device).is_shared()


def test_autocast_leaves_grey_levels_alone():
    collate, images = ImageCollator(tiny.processor(), exact=False), views(False)
    with torch.autocast("cpu", torch.bfloat16):
        half = collate([*images])
    assert torch.equal(half["pixel_values"], collate([*images])["pixel_values"])


@pytest.mark.usefixtures("without_figures")
def test_the_way_is_recorded_and_kept(tmp_path):
    settings = {"num_train_epochs": 1, "augmentation": "crop_flip"}
    runs = [
        tiny.trainer(tmp_path / str(i), exact_images=i == 0, process_on_device=i == 2, **settings) for i in range(3)
    ]
    for run in runs:
        run.train_task(0)
    exact, batched, device = (run.results.to_dict() for run in runs)
    assert exact["training"]["exact_images"] is True and batched["training"]["exact_images"] is False
    assert tiny.same_results(batched, device)
    weights = [run.stream_model.trainable() for run in runs]
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])
    again = tiny.trainer(tmp_path / "1", **settings)
    with pytest.raises(ValueError, match="exact_images: True, was False"):
        again.train(resume_from_checkpoint=True)


def test_files_without_the_setting_name_the_exact_way(tmp_path):
    recorded, now = {"training": {"seed": 3}}, {"training": {"seed": 3, "exact_images": False}}
    with pytest.raises(ValueError, match="exact_images: False, was True"):
        check_same_settings(recorded, now, tmp_path)
    check_same_settings(recorded, {"training": {"seed": 3, "exact_images": True}}, tmp_path)
