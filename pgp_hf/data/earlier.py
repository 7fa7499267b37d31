"""Find the test images of an earlier run's tasks, of which only the manifest is known."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from . import source as source_data
from .checking import shorten
from .rows import ImageRows
from .shifts import Shift
from .tasks import Part


class Place(NamedTuple):
    """A split in which the test images may be.

    Args:
        split: its name.
        data: its rows.
        label_column, image_column: names of the columns.
        labels: the label column as stored.
        tested: whether the test images may be the split itself.
        held_out: whether they may be held out of it, as they were in the run.
    """

    split: str
    data: datasets.Dataset
    label_column: str
    image_column: str
    labels: np.ndarray
    tested: bool
    held_out: bool


class Expected(NamedTuple):
    """What a manifest says of a task's test images.

    Args:
        classes: label ids.
        names: name of each of the classes.
        num_images: number of images.
        sha256: their hash.
        values: by each value in the label column of the dataset that they came from, the label id.
        settings: of that dataset.
        seed: of the stream.
    """

    classes: list[int]
    names: list[str]
    num_images: int
    sha256: str | None
    values: Mapping[int, int]
    settings: Mapping[str, Any]
    seed: int

    @classmethod
    def of(cls, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> Expected:
        """Read the entry of a task."""
        classes, source = entry["classes"], entry.get("source")
        settings = manifest if source is None else source
        ids = range(len(manifest["label_values"])) if source is None else classes
        return cls(
            classes=classes,
            names=[manifest["label_names"][label] for label in classes],
            num_images=entry["test"]["num_images"],
            sha256=entry["test"]["sha256"],
            values={
                value: label for value, label in zip(settings["label_values"], ids, strict=True) if label in classes
            },
            settings=settings,
            seed=manifest["seed"] or 0,
        )

    @property
    def shares(self) -> list[float | None]:
        """Shares of each class that were held out of the training rows: test rows, then validation rows."""
        return [self.settings.get("test_fraction"), self.settings.get("train_val_split")]

    def may_be_in(self, place: Place) -> bool:
        """Return True if a split may hold the images."""
        return self.num_images > 0 and (place.tested or any(self.shares))

    def label_ids(self, place: Place) -> np.ndarray:
        """Return the label id of each row; -1 for other classes."""
        feature, ids = place.data.features[place.label_column], self.values
        if isinstance(feature, datasets.ClassLabel):
            known = dict(zip(self.names, self.classes, strict=True))
            ids = {value: known.get(name, -1) for value, name in enumerate(feature.names)}
        found, inverse = np.unique(place.labels, return_inverse=True)
        return np.array([ids.get(value, -1) for value in found.tolist()])[inverse]

    def find(self, place: Place, labels: np.ndarray) -> Part | None:
        """Return the images, if they are in this split; `labels` are its label ids."""
        source = ImageRows(place.split, place.data, place.image_column, labels)
        limit = self.settings.get("max_eval_samples_per_class")
        selections = []
        if place.tested:
            selections.append(source_data.choose_rows(labels, labels, (), self.seed, None, limit)[1])
        if place.held_out and any(self.shares):
            selections.append(source_data.choose_rows(labels, None, self.shares, self.seed, None, limit)[1])
        for rows in selections:
            if len(rows) == self.num_images and source.digests([rows])[0] == self.sha256:
                return Part(source, rows, self.num_images, self.sha256)
        return None


def find_test_images(
    dataset: Any, manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> list[Part | None]:
    """Return the test images of each task, as the run saw them; None where the dataset has none of its classes.

    Args:
        dataset: test images, or training images from which the run's test images were held out: a `Dataset`, a
            `DatasetDict`, a folder or a Hub id.
        manifest: of the run, without its tasks.
        entries: the tasks in the manifest.

    Raises:
        TypeError: something that is not a dataset.
        ValueError: images that are not those of the run, or are of none of its classes.
    """
    tasks = [Expected.of(entry, manifest) for entry in entries]
    places = _places(dataset, [manifest, *(entry.get("source", {}) for entry in entries)])
    labels = [[task.label_ids(place) for place in places] for task in tasks]
    if tasks and not any((own >= 0).any() for of_task in labels for own in of_task):
        names = dict.fromkeys(name for task in tasks for name in task.names)
        raise ValueError(
            f"test_dataset has no image of the classes {shorten(names)}: pass test images of these tasks, or leave it out"
        )
    free = [np.ones(len(place.labels), dtype=bool) for place in places]
    found: list[Part | None] = []
    for task, of_task in zip(tasks, labels, strict=True):
        there = [(place, own) for place, own in zip(places, of_task, strict=True) if task.may_be_in(place)]
        found.append(next(filter(None, (task.find(place, own) for place, own in there)), None))
        if found[-1] is not None:
            for unclaimed, own in zip(free, of_task, strict=True):
                unclaimed &= own < 0
    for t, (task, of_task) in enumerate(zip(tasks, labels, strict=True)):
        # images of a class that came more than once belong to the task that they were found for
        left = [
            int((own >= 0)[unclaimed].sum())
            for place, own, unclaimed in zip(places, of_task, free, strict=True)
            if task.may_be_in(place)
        ]
        if found[t] is None and any(left):
            raise ValueError(
                f"test_dataset does not have the test images of task {t} (0-based, classes {shorten(task.names)}) that the "
                f"manifest describes: {task.num_images} images whose hash is {str(task.sha256)[:12]}...; it has "
                f"{sum(left)} images of these classes. Pass what the run was tested on, or leave test_dataset out"
            )
    if (shift := Shift.read(manifest)) is not None:
        shown = shift.by_class([entry["classes"] for entry in entries])
        for part in found[: len(shift.tasks)]:  # tasks that were appended are as they are
            if part is not None and part.source is not None:
                part.source.renderings = shown
    return found


def _places(dataset: Any, sources: Sequence[Mapping[str, Any]]) -> list[Place]:
    """Return the splits of a dataset in which the test images may be, with the columns that the run used."""
    if isinstance(dataset, str | os.PathLike):
        dataset = source_data.load(dataset)[0]
    if isinstance(dataset, datasets.DatasetDict):
        test = next((split for split in source_data.EVAL_SPLITS if split in dataset), None)
        splits = {split: dataset[split] for split in (test, "train") if split is not None and split in dataset}
        if not splits:
            raise ValueError(f"test_dataset has no split 'test' or 'train', only {shorten(dataset)}; pass one of them")
    else:
        test, splits = None, {"test": source_data.map_style("test_dataset", dataset)}
    places = []
    for split, data in splits.items():
        columns = [
            next((source[key] for source in sources if source.get(key) in data.features), None)
            for key in ("label_column", "image_column")
        ]
        label, image = source_data.resolve_columns(data, *columns)
        source_data.check_columns(split, data, label, image)
        values = source_data.read_labels(split, data, label)
        places.append(Place(split, data, label, image, values, split == test or test is None, split != test))
    return places
