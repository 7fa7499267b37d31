"""Read images batch by batch, in worker processes where asked for, up to the pixels that a model takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor

from .images import ImageLike, Images, is_indexed, to_image


class Batch(NamedTuple):
    """Images that were read together.

    Attributes:
        pixels: of those that could be read, `(B, 3, H, W)`; None without any.
        errors: for each image None, or why it could not be read.
    """

    pixels: Tensor | None
    errors: list[Exception | None]


class _Opened(Dataset[Any]):
    """Open images when they are asked for; one that fails is its error."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> PIL.Image.Image | Exception:
        try:
            item = self.images[index]
        except Exception as error:  # a dataset's decoder raises any type on damaged bytes
            return ValueError(f"image {index} cannot be read ({type(error).__name__}: {error}).")
        return _opened(item)


def _opened(image: ImageLike) -> PIL.Image.Image | Exception:
    try:
        return to_image(image)
    except (TypeError, ValueError) as error:
        return error


class _Processed:
    """Turn opened images into a batch; a class, so that it can be sent to worker processes."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor

    def __call__(self, opened: Sequence[PIL.Image.Image | Exception]) -> Batch:
        images = [image for image in opened if not isinstance(image, Exception)]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"] if images else None
        return Batch(pixels, [image if isinstance(image, Exception) else None for image in opened])


def read_batches(
    images: Images, processor: BaseImageProcessor, batch_size: int, num_workers: int = 0
) -> Iterator[Batch]:
    """Yield images in their order, batch by batch.

    Args:
        images: several, as [`several`] returns them; only what can be indexed is read in workers.
        processor: of the backbone.
        batch_size: number of images in a batch.
        num_workers: number of processes that read ahead; 0 to read in this one.

    Raises:
        ValueError: workers for images that come one by one.
    """
    processed = _Processed(processor)
    if is_indexed(images):
        # of its own, since the loader draws a seed
        generator = torch.Generator()
        yield from DataLoader(
            _Opened(images), batch_size, collate_fn=processed, num_workers=num_workers, generator=generator
        )
        return
    if num_workers:
        raise ValueError(
            f"num_workers={num_workers} needs images that can be indexed, and a {type(images).__name__} gives them one by "
            "one: pass a folder, a list or a dataset, or num_workers=0."
        )
    rest = iter(images)
    while chunk := [_opened(image) for image in islice(rest, batch_size)]:
        yield processed(chunk)
