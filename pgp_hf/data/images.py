"""From stored images to batches: augmentation that depends on counters alone, and the collator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .stream import TaskImages


class AugmentedImages(Dataset):
    """Training images of a task, each augmented by randomness that is a function of (seed, task, epoch, index).

    No random number generator is consumed: the order of access, the number of workers and a resumed run do not change
    what an image looks like in an epoch.

    Args:
        images: the task's images.
        augmentation: "none", "flip" (horizontal, p = 0.5) or "crop_flip" (random resized crop as in Inception
            training: area `crop_min_scale` to 1, aspect ratio 3/4 to 4/3; then flip). The image processor resizes.
        seed: of the run.
        task: 0-based.

    Attributes:
        queries: `(views, N, d)`, one query for each of `views`, which then travel with the images; None by default.
    """

    def __init__(self, images: TaskImages, augmentation: str, crop_min_scale: float, seed: int, task: int) -> None:
        self.images, self.augmentation, self.crop_min_scale = images, augmentation, crop_min_scale
        self.queries: Tensor | None = None
        self._counters = (seed, task)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see changes

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, flip = self.images[index], False
        if self.augmentation != "none":
            rng = np.random.default_rng([*self._counters, int(self._epoch), index])
            flip = bool(rng.random() < 0.5)
            if self.augmentation == "crop_flip":
                item["image"] = item["image"].crop(_random_box(item["image"].size, self.crop_min_scale, rng))
            if flip:
                item["image"] = _flipped(item["image"])
        if self.queries is not None:
            item["prompt_query"] = self.queries[int(flip), index]
        return item

    def views(self) -> list[Dataset]:
        """All views that the images can have, each for all images; none where random crops make them uncountable."""
        return {"none": [self.images], "flip": [self.images, FlippedImages(self.images)]}.get(self.augmentation, [])


class FlippedImages(Dataset):
    """Every image from left to right."""

    def __init__(self, images: TaskImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        return {**item, "image": _flipped(item["image"])}


def _flipped(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _random_box(size: tuple[int, int], min_scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height  # very long images: every crop was too wide or too high


class CachedQueries(Dataset):
    """Images with the queries that the frozen model gave them before, `(N, d)`."""

    def __init__(self, images: Dataset, queries: Tensor) -> None:
        self.images, self.queries = images, queries

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.images[index], "prompt_query": self.queries[index]}


class ImageCollator:
    """Turn items `{"image", "label"[, "task", "index", "prompt_query"]}` into a batch by the backbone's image processor.

    Returns `pixel_values` `(B, C, H, W)` and `labels` `(B,)`; of what every item has, also `task` `(B,)`, `index` `(B,)`
    and `prompt_query` `(B, d)`. What only some have is left out: queries are then computed for the whole batch.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {
            "pixel_values": self.processor([item["image"] for item in items], return_tensors="pt")["pixel_values"],
            "labels": torch.tensor([item["label"] for item in items]),
        }
        for name in ("task", "index"):
            if all(name in item for item in items):
                batch[name] = torch.tensor([item[name] for item in items])
        if all("prompt_query" in item for item in items):
            batch["prompt_query"] = torch.stack([item["prompt_query"] for item in items])
        return batch
