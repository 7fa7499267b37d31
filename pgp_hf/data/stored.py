"""Training images of older tasks that a run keeps itself, so that the data set may lose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .stream import TaskImages

Places = Sequence[Sequence[int]]  # 0-based task of each image, and its position within the task


class StoredImage(NamedTuple):
    """A training image that a run keeps.

    Attributes:
        pixels: RGB, uint8, `(H, W, 3)`.
        label: its label id; None in a file of a version that did not keep it.
    """

    pixels: Tensor
    label: int | None = None


Stored = dict[int, dict[int, StoredImage]]
"""Images by 0-based task and position within it."""

LABELS = "labels"  # name of the tensor with task, position and label id of each image, int64, `(N, 3)`


class StoredImages(TaskImages):
    """Read a task's images from those that a run has kept, and none from the data set.

    Args:
        task: 0-based.
        images: those that are kept, by position.
        labels: of all images of the task, where the data set knows them; otherwise those of the kept images are used.
        count: number of images of the task.
    """

    def __init__(
        self, task: int, images: Mapping[int, StoredImage], labels: np.ndarray | None = None, count: int = 0
    ) -> None:
        self.task, self._images = task, images
        if labels is None:
            labels = np.full(count, -1, dtype=np.int64)
            for position, image in images.items():
                if image.label is not None:
                    labels[position] = image.label
        self.labels = labels
        self._rows = np.arange(len(labels))

    def place(self, position: int) -> str:
        """Return where the image at a position within the task comes from, for error messages."""
        return f"image {position} of those that the run has kept"

    def _decoded(self, position: int) -> Image.Image:
        if position not in self._images:
            raise ValueError(
                f"image {position} of task {self.task + 1} is not among the {len(self._images)} that the run has kept of "
                "it: once a task has ended, a method reads what it returns from exemplars()."
            )
        return Image.fromarray(self._images[position].pixels.numpy())


def keep_images(places: Places, images: Callable[[int], TaskImages]) -> Stored:
    """Return training images to keep; `images` returns those of a task."""
    of_task: dict[int, list[int]] = {}
    for task, position in places:
        of_task.setdefault(task, []).append(position)
    stored: Stored = {}
    for task, positions in of_task.items():
        source = images(task)
        stored[task] = {
            position: StoredImage(torch.from_numpy(np.array(source[position]["image"])), int(source.labels[position]))
            for position in positions
        }
    return stored


def to_tensors(stored: Stored) -> dict[str, Tensor]:
    """Return stored images as a file has them, by names such as "1/17": task number and position; and their labels."""
    tensors = {
        _name(task, position): image.pixels for task, kept in stored.items() for position, image in kept.items()
    }
    labels = [
        (task, position, image.label)
        for task, kept in stored.items()
        for position, image in kept.items()
        if image.label is not None
    ]
    return {**tensors, LABELS: torch.tensor(labels, dtype=torch.int64)} if labels else tensors


def from_tensors(tensors: Mapping[str, Tensor], places: Places, counts: Sequence[int]) -> Stored:
    """Return what `to_tensors` was given.

    Args:
        tensors: as a file has them.
        places: of the images that must be among them, and no others.
        counts: number of training images of each finished task.

    Raises:
        ValueError: places outside these tasks; other images, or tensors that are not images; labels of other images.
    """
    pixels = {name: tensor for name, tensor in tensors.items() if name != LABELS}
    expected = {_name(task, position): (task, position) for task, position in places}
    for task, position in expected.values():
        if not (0 <= task < len(counts) and 0 <= position < counts[task]):
            raise ValueError(f"image {position} of task {task + 1} does not exist in the {len(counts)} finished tasks")
    if differ := sorted(expected.keys() ^ pixels.keys()):
        raise ValueError(
            f"it holds {len(pixels)} images, and the method keeps {len(expected)}: {differ[0]!r} is in one alone"
        )
    labels = _read_labels(tensors[LABELS], set(expected.values())) if LABELS in tensors else {}
    stored: Stored = {}
    for name, image in pixels.items():
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.numel():
            raise ValueError(f"{name!r} is {image.dtype} {tuple(image.shape)}: expected uint8 (height, width, 3)")
        task, position = expected[name]
        stored.setdefault(task, {})[position] = StoredImage(image, labels.get((task, position)))
    return stored


def _read_labels(tensor: Tensor, places: set[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Return the label of each image, given as task, position and label."""
    if tensor.dtype != torch.int64 or tensor.ndim != 2 or tensor.shape[1] != 3:
        raise ValueError(f"{LABELS!r} is {tensor.dtype} {tuple(tensor.shape)}: expected int64 (images, 3)")
    labels = {(task, position): label for task, position, label in tensor.tolist()}
    if labels.keys() != places or len(tensor) != len(places):
        raise ValueError(f"{LABELS!r} has {len(tensor)} rows, which are not those of the {len(places)} images")
    if labels and min(labels.values()) < 0:
        raise ValueError(f"{LABELS!r} holds {min(labels.values())}: label ids count from 0")
    return labels


def _name(task: int, position: int) -> str:
    return f"{task + 1}/{position}"
