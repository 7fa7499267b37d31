"""Turn stored images into batches: augmentation that depends on counters alone, cached queries, and the collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from .pixels import LARGE, PixelStore, View, recipe, render, stack
from .stream import ImageItem, TaskImages


class QueriedItem(ImageItem, total=False):
    """An image with what else is known of it.

    Attributes:
        prompt_query: the query `(d,)` that the frozen model computes for it.
        pixels: the image without augmentation, uint8, `(height, width, 3)`, where the collator augments it.
        view: how.
    """

    prompt_query: Tensor
    pixels: Tensor
    view: View


class ImageView(Protocol):
    """Images that are the same each time that they are read."""

    @property
    def view(self) -> str:
        """Return a name for how the content is seen."""

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
        exact: augment each image by itself, as PIL does; otherwise [`ImageCollator`] augments whole batches.

    Attributes:
        queries: `(views, N, d)`, the queries of all images in each of `views`, from which each item gets its own; None
            by default.
        unaugmented: `(N, d)`, the queries of the images as they are, where those of the views are not kept; None by default.
    """

    def __init__(
        self,
        images: TaskImages,
        augmentation: str,
        crop_min_scale: float,
        seed: int,
        task: int,
        crop_views: int | None = None,
        exact: bool = True,
    ) -> None:
        self.images, self.augmentation, self.crop_min_scale = images, augmentation, crop_min_scale
        self.crop_views = crop_views if augmentation == "crop_flip" else None
        self.exact = exact
        self._store: PixelStore | None = None
        self.queries: Tensor | None = None
        self.unaugmented: Tensor | None = None
        self._counters = (seed, task)
        # shared memory, so that persistent workers see a new epoch
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Use the augmentations of this 0-based epoch from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def keep_pixels(self) -> None:
        """Decode each image once, and keep it for the epochs that follow, where they fit; call it before workers start."""
        if not self.exact and len(self) and self._store is None:
            width, height = self.images[0]["image"].size
            self._store = PixelStore.for_images(len(self), (height, width, 3))

    def __getitem__(self, index: int) -> QueriedItem:
        epoch = int(self._epoch)
        item, view = self._seen(index, epoch if self.crop_views is None else epoch % self.crop_views)
        if self.queries is not None:
            item["prompt_query"] = self.queries[view, index]
        return item

    def _seen(self, index: int, epoch: int) -> tuple[QueriedItem, int]:
        """Return an image as an epoch has it, and which of `views` that is."""
        if not self.exact:
            item, flip = self._raw(index, epoch)
        else:
            item = {**self.images[index]}
            box, flip = self._drawn(index, epoch, item["image"].size)
            if box is not None:
                item["image"] = item["image"].crop(box)
            if flip:
                item["image"] = _flipped(item["image"])
        return item, int(flip) if self.crop_views is None else epoch

    def _drawn(self, index: int, epoch: int, size: tuple[int, int]) -> tuple[tuple[int, int, int, int] | None, bool]:
        """Return the crop of an image of this width and height, None for none, and whether it is mirrored then."""
        if self.augmentation == "none":
            return None, False
        rng = np.random.default_rng([*self._counters, epoch, index])
        flip = bool(rng.random() < 0.5)
        crops = self.augmentation == "crop_flip"
        return _random_box(size, self.crop_min_scale, rng) if crops else None, flip

    def _raw(self, index: int, epoch: int) -> tuple[QueriedItem, bool]:
        """Return an image as it is stored, with how it is to be augmented, and whether it is mirrored."""
        pixels = None if self._store is None else self._store.get(index)
        item: QueriedItem
        if pixels is None:
            item = {**self.images[index]}
            pixels = to_pixels(item["image"])
            if self._store is not None:
                self._store.keep(index, pixels)
        else:
            item = {**self.images.described(index)}  # type: ignore[typeddict-item]  # the image is in `pixels`
        height, width, _ = pixels.shape
        box, flip = self._drawn(index, epoch, (width, height))
        item["pixels"], item["view"] = pixels, (*(box or (0, 0, width, height)), flip)
        return item, flip

    def views(self) -> list[ImageView]:
        """Return a dataset for each view that augmentation can produce; none if random crops make them too many."""
        if self.augmentation == "crop_flip":
            return [CroppedImages(self, epoch) for epoch in range(self.crop_views or 0)]
        return [self.images] if self.augmentation == "none" else [self.images, FlippedImages(self.images, self.exact)]

    @property
    def plain_queries(self) -> Tensor | None:
        """Return the queries `(N, d)` of the images without augmentation, where they are known."""
        return self.unaugmented if self.queries is None or self.augmentation == "crop_flip" else self.queries[0]


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
    """Mirror every image horizontally: as PIL does, or, as [`AugmentedImages`] has it, by the collator."""

    def __init__(self, images: TaskImages, exact: bool = True) -> None:
        self.images, self.exact = images, exact
        self.view = f"{images.view} flipped"

    @property
    def sha256(self) -> str | None:
        """Return the hash of the content that is mirrored."""
        return self.images.sha256

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageItem:
        item: QueriedItem = {**self.images[index]}
        if self.exact:
            item["image"] = _flipped(item["image"])
        else:
            item["view"] = (0, 0, *item["image"].size, True)
        return item


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8, `(height, width, 3)`."""
    return torch.from_numpy(np.array(image))


class CroppedImages(Dataset[ImageItem]):
    """Crop every image as one epoch does."""

    def __init__(self, augmented: AugmentedImages, epoch: int) -> None:
        self.augmented, self.epoch = augmented, epoch
        self.view = f"{augmented.images.view} crop {augmented.crop_min_scale} {augmented._counters} {epoch}"

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
        exact: let it process each image; otherwise, whole batches are processed at once, which takes a third of the time
            and differs by rounding, by one grey level at most. Where the processor does more than to resize and to
            normalise, and for large images, it processes them in any case.
        on_device: where images are not processed by themselves, leave `pixels` `(B, 3, h, w)` and `views` `(B, 5)` in
            place of `pixel_values`, for [`finish`] to process them on the model's device.
    """

    def __init__(
        self, processor: Callable[..., Mapping[str, Tensor]], exact: bool = True, on_device: bool = False
    ) -> None:
        self.processor, self.on_device = processor, on_device
        self.recipe = None if exact else recipe(processor)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = {**self._images(items), "labels": torch.tensor([item["label"] for item in items])}
        for name in ("task", "index"):
            if all(isinstance(item.get(name), int) for item in items):  # a column of the user's may have the name
                batch[name] = torch.tensor([item[name] for item in items])
        if all("prompt_query" in item for item in items):
            batch["prompt_query"] = torch.stack([item["prompt_query"] for item in items])
        return batch

    def _images(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.recipe is None:
            return {"pixel_values": self._exact([item["image"] for item in items])}
        pixels = [item["pixels"] if "pixels" in item else to_pixels(item["image"]) for item in items]
        views: list[View] = [
            item["view"] if "view" in item else (0, 0, own.shape[1], own.shape[0], False)
            for item, own in zip(items, pixels, strict=True)
        ]
        shapes = {tuple(own.shape) for own in pixels}
        if self.on_device and len(shapes) == 1:
            return {"pixels": stack(pixels), "views": torch.tensor(views)}
        found = torch.empty(len(items), 3, *self.recipe.size)
        for shape in sorted(shapes):
            own = [i for i, each in enumerate(pixels) if tuple(each.shape) == shape]
            if max(shape) > LARGE:
                found[own] = self._exact([_viewed(pixels[i], views[i]) for i in own])
            else:
                made = render(stack([pixels[i] for i in own]), torch.tensor([views[i] for i in own]), self.recipe)
                if len(shapes) == 1:
                    return {"pixel_values": made}
                found[own] = made
        return {"pixel_values": found}

    def _exact(self, images: Sequence[Image.Image]) -> Tensor:
        return self.processor(list(images), return_tensors="pt")["pixel_values"]

    def finish(self, batch: dict[str, Tensor]) -> None:
        """Process the images of a batch that were left for the device."""
        if self.recipe is not None and "pixels" in batch:
            batch["pixel_values"] = render(batch.pop("pixels"), batch.pop("views"), self.recipe)


def _viewed(pixels: Tensor, view: View) -> Image.Image:
    image = Image.fromarray(pixels.numpy()).crop(view[:4])
    return _flipped(image) if view[4] else image
