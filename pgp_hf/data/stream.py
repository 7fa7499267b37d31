"""Divide the classes of a `datasets.Dataset` into tasks that are learned one after another.

Rows are chosen through the label column, so building a stream or asking for a task decodes no image; images are
decoded when a `TaskImages` is indexed. A manifest of class order and content hashes identifies a stream, so that a
resumed or repeated run can prove that it sees the same data.
"""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import datasets
import numpy as np
import PIL.Image
import torch

from . import source as source_data
from .rows import ImageRows, verify_images
from .scenarios import SCENARIOS
from .source import check_int, check_optional_int, shorten

MANIFEST_FORMAT = 1
# besides the tasks' contents, these must agree for two streams to be the same ...
_SAME = ("scenario", "num_tasks", "num_classes", "label_names", "label_values", "class_order")
# ... and these settings are named as the likely cause when something does not
_CAUSES = (
    "seed",
    "label_column",
    "image_column",
    "test_fraction",
    "train_val_split",
    "max_train_samples_per_class",
    "max_eval_samples_per_class",
)

_OPTIONAL = ("train_val_split",)  # written only where it is given


@dataclass(frozen=True)
class Task:
    """A task of a stream.

    Args:
        index: the task's 0-based place in the stream.
        classes: its label ids (0..num_classes-1), in stream order.
    """

    index: int
    classes: tuple[int, ...]


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

    def __init__(self, source: ImageRows, rows: np.ndarray, task: int) -> None:
        self._source = source
        self._rows = rows
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
        image = self._decoded(position)
        return {"image": image, "label": int(self.labels[position]), "task": self.task, "index": position}

    def _decoded(self, position: int) -> PIL.Image.Image:
        return self._source.decode(int(self._rows[position]))


class TaskStream:
    """Divide a dataset into a sequence of tasks. Build one with `TaskStream.from_dataset`.

    Attributes:
        scenario: the name of its scenario, a key of `pgp_hf.data.scenarios.SCENARIOS`.
        num_tasks: number of tasks.
        num_classes: number of classes in the dataset.
        seed: the seed that it was built with; None for classes in label order.
        class_order: all label ids, in the order in which they arrive.
        label_names: the name of each label id.
        id2label: the same as a dict, as transformers' configurations expect it.
        tasks: the `Task` objects, in order.
    """

    def __init__(
        self,
        train: tuple[ImageRows, list[np.ndarray]],
        test: tuple[ImageRows, list[np.ndarray]],
        tasks: list[Task],
        label_names: list[str],
        settings: dict[str, Any],
    ) -> None:
        self._splits = {"train": train, "test": test}
        self._settings = settings  # the manifest without its tasks
        self._digests: dict[str, list[str]] | None = None
        self._verified = False
        self.tasks = tasks
        self.label_names = label_names
        self.id2label = dict(enumerate(label_names))
        self.class_order: list[int] = [label for task in tasks for label in task.classes]
        self.scenario: str = settings["scenario"]
        self.seed: int | None = settings["seed"]
        self.num_tasks = len(tasks)
        self.num_classes = len(label_names)

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset | datasets.DatasetDict | str | os.PathLike[str],
        *,
        num_tasks: int,
        label_column: str | None = None,
        image_column: str | None = None,
        scenario: str = "class_incremental",
        seed: int | None = 0,
        class_order: Sequence[int] | None = None,
        test_dataset: datasets.Dataset | None = None,
        test_split: str | None = None,
        test_fraction: float = 0.2,
        train_val_split: float | None = None,
        max_train_samples_per_class: int | None = None,
        max_eval_samples_per_class: int | None = None,
    ) -> TaskStream:
        """Divide a dataset into `num_tasks` tasks with (nearly) the same number of classes.

        Args:
            dataset: a `Dataset`; a `DatasetDict` with a split `"train"`; a local folder of parquet or image files; or
                a Hub id. Formats and transforms set on it are not applied.
            num_tasks: number of tasks, 1..number of classes; their sizes differ by one class at most.
            label_column: a ClassLabel or integer column. Default: the only ClassLabel column, else the one named
                `label`, `labels` or `fine_label`. Distinct integers are sorted and mapped to ids 0..C-1.
            image_column: a `datasets.Image` column. Default: the only one.
            scenario: `"class_incremental"`, `"task_incremental"` (the task of each test image is given) or `"online"`
                (class-incremental, with one epoch for each task).
            seed: draws the class order, the held-out rows and the rows kept of each class. With None, classes come in
                label order, and rows are drawn as with 0.
            class_order: label ids in stream order, instead of a drawn order.
            test_dataset: test rows, with the columns of the train rows.
            test_split: name of the test split of a `DatasetDict`. Default: the first of `test`, `validation`,
                `valid`, `val`.
            test_fraction: share of each class held out as test rows when there are none.
            train_val_split: share of each class's training rows held out as validation rows, which then take the place
                of the test rows: those are left out, and none of their images is read.
            max_train_samples_per_class: number of training images kept of each class at most, drawn by the seed.
            max_eval_samples_per_class: the same for test images.

        Raises:
            TypeError: a streaming dataset or an argument of the wrong type.
            ValueError: any other problem with the dataset or an argument; the message has the fix.
        """
        if scenario not in SCENARIOS:
            raise ValueError(f"scenario must be one of {shorten(SCENARIOS)}, got {scenario!r}")
        seed = check_optional_int("seed", seed, 0, none="label order")
        num_tasks = check_int("num_tasks", num_tasks, 1)
        limits = {
            name: check_optional_int(name, value, 1, none="all")
            for name, value in (
                ("max_train_samples_per_class", max_train_samples_per_class),
                ("max_eval_samples_per_class", max_eval_samples_per_class),
            )
        }
        for argument, share in (("test_fraction", test_fraction), ("train_val_split", train_val_split)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{argument} must lie strictly between 0 and 1, got {share}")

        train, test, name = source_data.resolve_splits(dataset, test_dataset, test_split)
        held_out = (test_fraction if test is None else None, train_val_split)
        test = test if train_val_split is None else None
        label_column, image_column = source_data.resolve_columns(train, label_column, image_column)
        for split, data in (("train", train), ("test", test)):
            if data is not None:
                source_data.check_columns(split, data, label_column, image_column)
        labels, test_labels, label_names, label_values = source_data.map_labels(train, test, label_column)
        if num_tasks > len(label_names):
            raise ValueError(f"num_tasks={num_tasks} is more than the {len(label_names)} classes of {label_column!r}")

        order = _class_order(class_order, seed, len(label_names))
        tasks = [Task(t, tuple(part.tolist())) for t, part in enumerate(np.array_split(order, num_tasks))]
        rows, test_rows = source_data.choose_rows(labels, test_labels, held_out, seed or 0, *limits.values())
        images = test_images = ImageRows("train", train, image_column, labels)  # held-out rows keep their row numbers
        if test is not None and test_labels is not None:
            test_images = ImageRows("test", test, image_column, test_labels)

        def cut(split: str, images: ImageRows, rows: np.ndarray) -> tuple[ImageRows, list[np.ndarray]]:
            classes = [task.classes for task in tasks]
            return images, source_data.cut(split, rows, images.labels, classes, label_names)

        settings = {
            "format": MANIFEST_FORMAT,
            "dataset": {
                "name": name,
                "fingerprint": {
                    "train": train._fingerprint,
                    "test": (train if test is None else test)._fingerprint,
                },
            },
            "scenario": scenario,
            "seed": seed,
            "num_tasks": num_tasks,
            "num_classes": len(label_names),
            "label_column": label_column,
            "image_column": image_column,
            "label_names": label_names,
            "label_values": label_values,
            "class_order": order.tolist(),
            "test_fraction": None if held_out[0] is None else float(held_out[0]),
            **({} if train_val_split is None else {"train_val_split": float(train_val_split)}),
            **limits,
        }
        return cls(cut("train", images, rows), cut("test", test_images, test_rows), tasks, label_names, settings)

    def __repr__(self) -> str:
        return f"TaskStream({self.scenario}: {self.num_classes} classes in {self.num_tasks} tasks, seed={self.seed})"

    def train(self, t: int) -> TaskImages:
        """Return the training images of task `t` (0-based)."""
        return self._images("train", t)

    def has_test(self, t: int) -> bool:
        """Return whether the test images of task t are here."""
        return True

    def test(self, t: int) -> TaskImages:
        """Return the test images of task `t` (0-based)."""
        return self._images("test", t)

    def seen_classes(self, t: int) -> list[int]:
        """Return the label ids of tasks 0..t, in stream order."""
        return [label for task in self.tasks[: self._index(t) + 1] for label in task.classes]

    def allowed_classes(self, after: int, task: int) -> list[int]:
        """Return the label ids that may win for an image of task `task` once tasks 0..`after` are learned.

        In the task-incremental scenario these are the task's own classes, in the others all classes seen so far.
        """
        classes = [own.classes for own in self.tasks]
        return SCENARIOS[self.scenario].allowed_classes(classes, self._index(after), self._index(task))

    def joined(self) -> TaskStream:
        """Return the same images as a stream of one task, with all classes in stream order; no image is decoded.

        Images come in the order of the dataset's rows, as in a stream that is built with `num_tasks=1`.
        """
        train, test = (
            (source, [np.sort(np.concatenate(rows))])
            for source, rows in (self._splits[key] for key in ("train", "test"))
        )
        settings = {**self._settings, "num_tasks": 1}
        return TaskStream(train, test, [Task(0, tuple(self.class_order))], self.label_names, settings)

    def manifest(self) -> dict[str, Any]:
        """Return the settings, the class order and the content hashes that identify this stream, ready for JSON.

        There is a hash for each task and split, `sha256`, over the label ids and the encoded image bytes in row order
        (see `ImageRows.digests`), but not over paths; nothing is decoded, and the hashes are computed once. `dataset`
        (name, fingerprints) is for information only.

        Raises:
            ValueError: an image file that cannot be read.
        """
        if self._digests is None:
            self._digests = self._hashes()
        tasks = []
        for task in self.tasks:
            entry: dict[str, Any] = {"classes": list(task.classes)}
            for split, (_, rows) in self._splits.items():
                entry[split] = {"num_images": len(rows[task.index]), "sha256": self._digests[split][task.index]}
            tasks.append(entry)
        return {**_copy(self._settings), "tasks": tasks}

    def _hashes(self, known: Sequence[str] = ()) -> dict[str, list[str]]:
        """Hash the images of each split and task; `known` are the hashes of the first tasks' training images."""
        given = {"train": list(known), "test": []}
        return {
            split: given[split] + source.digests(rows[len(given[split]) :])
            for split, (source, rows) in self._splits.items()
        }

    def verify(self, progress: bool = True, gone: int = 0) -> None:
        """Decode every selected image, to find broken ones before hours of training; do nothing after a first success.

        Args:
            progress: show a progress bar when there are many images.
            gone: number of first tasks whose training images are left out, since they may be gone.

        Raises:
            ValueError: images that do not decode; the message names split and row of the first one, and says how many
                there are.
        """
        if not self._verified:
            chosen = []
            for split, (source, rows) in self._splits.items():
                kept = rows[gone:] if split == "train" else rows
                chosen.append((source, sorted(row for part in kept for row in part.tolist())))
            verify_images(chosen, progress)
            self._verified = not gone

    def check_manifest(self, manifest: Mapping[str, Any], gone: int = 0) -> None:
        """Compare this stream with the manifest of an earlier run.

        Neither the dataset's name and fingerprints are compared nor settings that do not affect data and order.

        Args:
            manifest: of the earlier run.
            gone: number of first tasks whose training images may be gone: their hashes are taken from the manifest if
                they have not been computed yet.

        Raises:
            TypeError: `manifest` is not a mapping.
            ValueError: data or order that differ (the message says where, and which settings may be the cause), or a
                `manifest` that is not in this format.
        """
        if not isinstance(manifest, Mapping):
            raise TypeError(f"manifest must be a dict as from TaskStream.manifest(), got {type(manifest).__name__}")
        if manifest.get("format") != MANIFEST_FORMAT:
            raise ValueError(f"manifest format must be {MANIFEST_FORMAT}, got {manifest.get('format')!r}")
        before = self._digests
        if gone and before is None:
            self._digests = self._hashes(_train_hashes(manifest, gone))
        try:
            self._compare(manifest)
        except ValueError:
            self._digests = before
            raise

    def _compare(self, manifest: Mapping[str, Any]) -> None:
        own = self.manifest()
        lacking = [key for key in own if key not in manifest and key not in _OPTIONAL]
        if lacking:
            raise ValueError(f"manifest lacks {shorten(lacking)}; pass one written by TaskStream.manifest()")
        differences = [_difference(key, own[key], manifest[key]) for key in _SAME if own[key] != manifest[key]]
        for t, (here, there) in enumerate(zip(own["tasks"], manifest["tasks"], strict=False)):
            if here["classes"] == there.get("classes"):
                for split in ("train", "test"):
                    if here[split] != there.get(split):
                        what = f"{split} images of task {t} (0-based)"
                        differences.append(_difference(what, here[split], there.get(split)))
        if differences:
            pairs = {key: (own.get(key), manifest.get(key)) for key in _CAUSES}
            causes = [_difference(key, here, there) for key, (here, there) in pairs.items() if here != there]
            hint = f" Settings that differ: {'; '.join(causes)}." if causes else ""
            shown = differences[:4] + [f"{len(differences) - 4} more differences"] * (len(differences) > 4)
            raise ValueError(
                f"this stream is not the one in the manifest: {'; '.join(shown)}.{hint} "
                f"Build it from the same data with the same arguments, or start a new run in another folder"
            )

    def _index(self, t: int) -> int:
        return check_int("task t (0-based)", t, 0, self.num_tasks - 1)

    def _images(self, split: str, t: int) -> TaskImages:
        source, rows = self._splits[split]
        index = self._index(t)
        return TaskImages(source, rows[index], index)


def _class_order(given: Sequence[int] | None, seed: int | None, num_classes: int) -> np.ndarray:
    """Return the label ids in stream order: as given, drawn with `seed`, or in label order when `seed` is None."""
    if given is None:
        return np.arange(num_classes) if seed is None else np.random.default_rng(seed).permutation(num_classes)
    order = [check_int("an element of class_order", label, 0, num_classes - 1) for label in given]
    duplicates = sorted(label for label, count in Counter(order).items() if count > 1)
    missing = sorted(set(range(num_classes)) - set(order))
    if duplicates or missing:
        raise ValueError(
            f"class_order must be a permutation of the label ids 0..{num_classes - 1}; "
            f"duplicates: {shorten(duplicates)}, missing: {shorten(missing)}"
        )
    return np.array(order)


def _train_hashes(manifest: Mapping[str, Any], tasks: int) -> list[str]:
    """Return the hashes of the first tasks' training images."""
    try:
        return [str(task["train"]["sha256"]) for task in manifest["tasks"][:tasks]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            "manifest lacks the hashes of training images; pass one written by TaskStream.manifest()"
        ) from error


def _difference(what: str, here: Any, there: Any) -> str:
    """Describe how two values differ; of two sequences, the first place where they do."""
    if isinstance(here, dict) and isinstance(there, Mapping):
        key = "num_images" if here["num_images"] != there.get("num_images") else "sha256"
        return _difference(f"{what}, {key}", here[key], there.get(key))
    if isinstance(here, list) and isinstance(there, list):
        if len(here) != len(there):
            return _difference(f"{what}, length", len(here), len(there))
        at = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
        return _difference(f"{what}[{at}]", here[at], there[at])
    return f"{what}: {here!r} here, {there!r} in the manifest"


def _copy(value: Any) -> Any:
    """Copy nested dicts and lists, so that a caller's edits stay the caller's."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value
