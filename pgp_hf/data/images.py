"""Turn stored images into batches: augmentation that depends on counters alone, cached queries, and the collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from .stream import ImageItem, TaskImages


class QueriedItem(ImageItem, total=False):
    """An image with the query `(d,)` that the frozen model computes for it, where that is known."""

    prompt_query: Tensor


class ImageView(Protocol):
    """Images that are the same each time that they are read.

    Attributes:
        view: a name for how they are seen.
    """

    view: str

    @property
    def sha256(self) -> str | None:
        """Return the hash of the content; None where that is not known."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageItem: ...


class AugmentedImages(Dataset[QueriedItem]):
    """Augment a task's training images, with randomness that is a function of (seed, task, epoch, index) alone.

    No random number generator is consumed: the order of access, the number of workers and a resumed run do not change
    what an image looks like in an epoch.

    Args:
        images: the task's images.
        augmentation: "none", "flip" (horizontal, p = 0.5) or "crop_flip" (random resized crop as in Inception
            training: area `crop_min_scale` to 1, aspect ratio 3/4 to 4/3; then flip). The image processor resizes.
        crop_min_scale: smallest share of an image's area that a crop keeps.
        seed: of the run.
        task: 0-based.
        crop_views: number of different crops of each image, which later epochs repeat; None for new ones in each epoch.

    Attributes:
        queries: `(views, N, d)`, the queries of all images in each of `views`, from which each item gets its own; None
            by default.
    """

    def __init__(
        self,
        images: TaskImages,
        augmentation: str,
        crop_min_scale: float,
        seed: int,
        task: int,
        crop_views: int | None = None,
    ) -> None:
        self.images, self.augmentation, self.crop_min_scale = images, augmentation, crop_min_scale
        self.crop_views = crop_views if augmentation == "crop_flip" else None
        self.queries: Tensor | None = None
        self._counters = (seed, task)
        # shared memory, so that persistent workers see a new epoch
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Use the augmentations of this 0-based epoch from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> QueriedItem:
        epoch = int(self._epoch)
        item, view = self._seen(index, epoch if self.crop_views is None else epoch % self.crop_views)
        if self.queries is not None:
            item["prompt_query"] = self.queries[view, index]
        return item

    def _seen(self, index: int, epoch: int) -> tuple[QueriedItem, int]:
        """Return an image as an epoch has it, and which of `views` that is."""
        item: QueriedItem = {**self.images[index]}
        flip = False
        if self.augmentation != "none":
            rng = np.random.default_rng([*self._counters, epoch, index])
            flip = bool(rng.random() < 0.5)
            if self.augmentation == "crop_flip":
                item["image"] = item["image"].crop(_random_box(item["image"].size, self.crop_min_scale, rng))
            if flip:
                item["image"] = _flipped(item["image"])
        return item, int(flip) if self.crop_views is None else epoch

    def views(self) -> list[ImageView]:
        """Return a dataset for each view that augmentation can produce; none if random crops make them too many."""
        if self.augmentation == "crop_flip":
            return [CroppedImages(self, epoch) for epoch in range(self.crop_views or 0)]
        return [self.images] if self.augmentation == "none" else [self.images, FlippedImages(self.images)]

    @property
    def plain_queries(self) -> Tensor | None:
        """Return the queries `(N, d)` of the images without augmentation, where they are known."""
        return None if self.queries is None or self.augmentation == "crop_flip" else self.queries[0]


class Exemplars(Dataset[QueriedItem]):
    """Choose training images of several tasks, each augmented as those of its task are.

    Args:
        tasks: by 0-based task.
        places: task and position within it of each image, `(N, 2)`.
    """

    def __init__(self, tasks: Mapping[int, AugmentedImages], places: Sequence[Sequence[int]]) -> None:
        self.tasks, self.places = tasks, [(int(task), int(index)) for task, index in places]

    def set_epoch(self, epoch: int) -> None:
        """Use the augmentations of this 0-based epoch from now on."""
        for images in self.tasks.values():
            images.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> QueriedItem:
        task, position = self.places[index]
        return self.tasks[task][position]


def set_epoch(images: object, epoch: int) -> None:
    """Set the epoch of all augmented images that a dataset is made of."""
    if isinstance(images, AugmentedImages | Exemplars):
        images.set_epoch(epoch)
    elif isinstance(images, ConcatDataset):
        for part in images.datasets:
            set_epoch(part, epoch)
    elif isinstance(images, Subset):
        set_epoch(images.dataset, epoch)


class FlippedImages(Dataset[ImageItem]):
    """Mirror every image horizontally."""

    view = "flipped"

    def __init__(self, images: TaskImages) -> None:
        self.images = images

    @property
    def sha256(self) -> str | None:
        """Return the hash of the content that is mirrored."""
        return self.images.sha256

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageItem:
        item = self.images[index]
        return {**item, "image": _flipped(item["image"])}


class CroppedImages(Dataset[ImageItem]):
    """Crop every image as one epoch does."""

    def __init__(self, augmented: AugmentedImages, epoch: int) -> None:
        self.augmented, self.epoch = augmented, epoch
        self.view = f"crop {augmented.crop_min_scale} {augmented._counters} {epoch}"

    @property
    def sha256(self) -> str | None:
        """Return the hash of the content that is cropped."""
        return self.augmented.images.sha256

    def __len__(self) -> int:
        return len(self.augmented)

    def __getitem__(self, index: int) -> ImageItem:
        return self.augmented._seen(index, self.epoch)[0]


def _flipped(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _random_box(size: tuple[int, int], min_scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the left, upper, right and lower edge of a crop, by rejection; the whole image after ten attempts."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height  # a very elongated image, in which no crop fitted


class CachedQueries(Dataset[QueriedItem]):
    """Pair images with queries `(N, d)` that the frozen model has computed before."""

    def __init__(self, images: TaskImages, queries: Tensor) -> None:
        self.images, self.queries = images, queries

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> QueriedItem:
        return {**self.images[index], "prompt_query": self.queries[index]}


class ImageCollator:
    """Turn items `{"image", "label"[, "task", "index", "prompt_query"]}` into a batch.

    A batch holds `pixel_values` `(B, C, H, W)` and `labels` `(B,)`, and where every item has them, `task` `(B,)`,
    `index` `(B,)` and `prompt_query` `(B, d)`. Entries that only some items have are dropped: if queries are missing,
    the model computes them for the whole batch.

    Args:
        processor: the backbone's image processor.
    """

    def __init__(self, processor: Callable[..., Mapping[str, Tensor]]) -> None:
        self.processor = processor

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = {
            "pixel_values": self.processor([item["image"] for item in items], return_tensors="pt")["pixel_values"],
            "labels": torch.tensor([item["label"] for item in items]),
        }
        for name in ("task", "index"):
            if all(isinstance(item.get(name), int) for item in items):  # a column of the user's may have the name
                batch[name] = torch.tensor([item[name] for item in items])
        if all("prompt_query" in item for item in items):
            batch["prompt_query"] = torch.stack([item["prompt_query"] for item in items])
        return batch
