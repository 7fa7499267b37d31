"""Describe the tasks of a stream, and give access to their images."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import datasets
import numpy as np
import PIL.Image
import torch

from .manifest import SPLITS
from .rows import ImageRows, verify_images


@dataclass(frozen=True)
class Task:
    """A task of a stream.

    Args:
        index: the task's 0-based place in the stream.
        classes: label ids of its images, in stream order.
        new_classes: those that no earlier task has; all of them by default.
    """

    index: int
    classes: tuple[int, ...]
    new_classes: tuple[int, ...] = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        if self.new_classes is None:
            object.__setattr__(self, "new_classes", self.classes)  # the class is frozen


class ImageItem(TypedDict):
    """An RGB image with its label id, its task's 0-based place in the stream, and its position within the task."""

    image: PIL.Image.Image
    label: int
    task: int
    index: int


class TaskImages(torch.utils.data.Dataset[ImageItem]):
    """Give map-style access to one task's rows of one split, as `ImageItem`s.

    Can be pickled and forked, so DataLoader workers can share it.

    Attributes:
        task: 0-based.
        labels: mapped label ids, int64, `(len,)`; read without decoding anything.
    """

    _part: Part | None = None

    def __init__(self, source: ImageRows, rows: np.ndarray, task: int, part: Part | None = None) -> None:
        self._source = source
        self._rows = rows
        self._part = part
        self.task = task
        self.labels: np.ndarray = source.labels[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ImageItem:
        """Return item `index`; the image is decoded here.

        Raises:
            IndexError: `index` is out of range.
            ValueError: the image does not decode; the message names its split and row.
        """
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        position %= len(self)
        return {"image": self._decoded(position), **self.described(position)}  # type: ignore[typeddict-item]  # keys are not literal

    def described(self, position: int) -> dict[str, int]:
        """Return what an item holds besides its image."""
        return {"label": int(self.labels[position]), "task": self.task, "index": position}

    @property
    def view(self) -> str:
        """Return "plain", with the renderings in which a shift shows these images, which their hash does not tell."""
        known = {} if self._part is None else self._source.renderings
        shown = {label: known[label] for label in sorted(set(self.labels.tolist()) & known.keys())}
        return f"plain {shown}" if shown else "plain"

    @property
    def sha256(self) -> str | None:
        """Return the hash of their content in this order, as the manifest has it; None for images without one."""
        # a hash is over the rows in ascending order
        if self._part is None or (np.diff(self._rows) <= 0).any():
            return None
        hash_parts([self._part])
        return self._part.sha256

    def place(self, position: int) -> str:
        """Return where the image at a position within the task comes from, for error messages."""
        return f"the image in row {self._rows[position]} of the {self._source.split} split"

    def _decoded(self, position: int) -> PIL.Image.Image:
        return self._source.decode(int(self._rows[position]))

    def dataset(self, label_names: Sequence[str]) -> datasets.Dataset:
        """Return the images as a dataset with the columns `image` and `label`, as another stream takes them.

        Args:
            label_names: the stream's, by label id.
        """
        return self._source.dataset(self._rows.tolist(), label_names)


@dataclass(eq=False)  # arrays
class Part:
    """The images of one task in one split, or what a manifest says of images that are absent.

    Args:
        source: of the images; None if they are absent.
        rows: their row numbers in the source.
        num_images: number of images, present or absent.
        sha256: their hash, once it is known; None as well where there is no image.
        verified: whether all of them have been decoded.
    """

    source: ImageRows | None
    rows: np.ndarray = field(repr=False)
    num_images: int
    sha256: str | None = None
    verified: bool = False

    @classmethod
    def of(cls, source: ImageRows, rows: np.ndarray) -> Part:
        """Return a part whose images are here."""
        return cls(source, rows, len(rows))

    @classmethod
    def absent(cls, num_images: int, sha256: str | None) -> Part:
        """Return a part whose images are not here, or that never had any."""
        return cls(None, np.arange(0), num_images, sha256)

    @property
    def present(self) -> bool:
        """Return True if there are images, and they are here."""
        return self.source is not None and self.num_images > 0

    def entry(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return {"num_images": self.num_images, "sha256": self.sha256}


Parts = dict[str, list[Part]]  # by split, for each task
Group = tuple[ImageRows, list[Part]]


def by_source(parts: Iterable[Part]) -> list[Group]:
    """Return the parts that are present, grouped by their source."""
    groups: dict[int, Group] = {}
    for part in parts:
        if part.present and part.source is not None:
            groups.setdefault(id(part.source), (part.source, []))[1].append(part)
    return list(groups.values())


def hash_parts(parts: Iterable[Part]) -> None:
    """Fill in the hashes that are not known yet, see `ImageRows.digests`."""
    for source, unknown in by_source(part for part in parts if part.sha256 is None):
        for part, sha256 in zip(unknown, source.digests([part.rows for part in unknown]), strict=True):
            part.sha256 = sha256


def verify_parts(splits: Iterable[Iterable[Part]], progress: bool) -> None:
    """Decode the images of parts that have not been verified yet, see `verify_images`."""
    groups = [group for parts in splits for group in by_source(part for part in parts if not part.verified)]
    chosen = [(source, sorted(row for part in own for row in part.rows.tolist())) for source, own in groups]
    if chosen:
        verify_images(chosen, progress)
    for _, own in groups:
        for part in own:
            part.verified = True


def read_entries(entries: Sequence[Mapping[str, Any]]) -> tuple[list[Task], Parts, list[dict[str, Any]]]:
    """Return the tasks in a manifest, their images, all absent, and what else the manifest says of each task."""
    tasks = [
        Task(t, tuple(entry["classes"]), tuple(entry.get("new_classes", entry["classes"])))
        for t, entry in enumerate(entries)
    ]
    parts = {
        split: [Part.absent(entry[split]["num_images"], entry[split]["sha256"]) for entry in entries]
        for split in SPLITS
    }
    known = {"classes", "new_classes", *SPLITS}
    return tasks, parts, [{key: value for key, value in entry.items() if key not in known} for entry in entries]


def write_entries(tasks: Sequence[Task], parts: Parts, notes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tasks as a manifest has them, from what [`read_entries`] returns; compute hashes that are not known."""
    for split in SPLITS:
        hash_parts(parts[split])
    entries = []
    for task, note in zip(tasks, notes, strict=True):
        new = {} if task.new_classes == task.classes else {"new_classes": list(task.new_classes)}
        images = {split: parts[split][task.index].entry() for split in SPLITS}
        entries.append({"classes": list(task.classes), **new, **images, **note})
    return entries
