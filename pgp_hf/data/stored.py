"""Training images of older tasks that a run keeps itself, so that the data set may lose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .stream import TaskImages

Places = Sequence[Sequence[int]]  # 0-based task of each image, and its position within the task
Stored = dict[int, dict[int, Tensor]]
"""Pixels by 0-based task and position within it: RGB, uint8, `(H, W, 3)`."""


class StoredImages(TaskImages):
    """Read a task's images from those that a run has kept, and none from the data set; labels are the stream's.

    Args:
        images: the task's.
        pixels: of those that are kept, by position.
    """

    def __init__(self, images: TaskImages, pixels: Mapping[int, Tensor]) -> None:
        super().__init__(images._source, images._rows, images.task)
        self._pixels = pixels

    def _decoded(self, position: int) -> Image.Image:
        if position not in self._pixels:
            raise ValueError(
                f"image {position} of task {self.task + 1} is not among the {len(self._pixels)} that the run has kept of "
                "it: once a task has ended, a method reads what it returns from exemplars()."
            )
        return Image.fromarray(self._pixels[position].numpy())


def keep_images(places: Places, images: Callable[[int], TaskImages]) -> Stored:
    """Return the pixels of training images; `images` returns those of a task."""
    stored: Stored = {}
    for task, position in places:
        stored.setdefault(task, {})[position] = torch.empty(0)
    for task, pixels in stored.items():
        source = images(task)
        for position in pixels:
            pixels[position] = torch.from_numpy(np.array(source[position]["image"]))
    return stored


def to_tensors(stored: Stored) -> dict[str, Tensor]:
    """Return stored images as a file has them, by names such as "1/17": task number and position within the task."""
    return {_name(task, position): pixels for task, kept in stored.items() for position, pixels in kept.items()}


def from_tensors(tensors: Mapping[str, Tensor], places: Places, counts: Sequence[int]) -> Stored:
    """Return what `to_tensors` was given.

    Args:
        tensors: as a file has them.
        places: of the images that must be among them, and no others.
        counts: number of training images of each finished task.

    Raises:
        ValueError: places outside these tasks; other images, or tensors that are not images.
    """
    expected = {_name(task, position): (task, position) for task, position in places}
    for task, position in expected.values():
        if not (0 <= task < len(counts) and 0 <= position < counts[task]):
            raise ValueError(f"image {position} of task {task + 1} does not exist in the {len(counts)} finished tasks")
    if differ := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(
            f"it holds {len(tensors)} images, and the method keeps {len(expected)}: {differ[0]!r} is in one alone"
        )
    stored: Stored = {}
    for name, pixels in tensors.items():
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.numel():
            raise ValueError(f"{name!r} is {pixels.dtype} {tuple(pixels.shape)}: expected uint8 (height, width, 3)")
        task, position = expected[name]
        stored.setdefault(task, {})[position] = pixels
    return stored


def _name(task: int, position: int) -> str:
    return f"{task + 1}/{position}"
