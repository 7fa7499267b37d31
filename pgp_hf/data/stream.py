"""Divide the classes of a `datasets.Dataset` into tasks that are learned one after another, or append tasks as they come.

Rows are chosen through the label column, so building a stream or asking for a task decodes no image; images are
decoded when a `TaskImages` is indexed. A manifest of class order and content hashes identifies a stream, so that a
resumed or repeated run can prove that it sees the same data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import numpy as np

from . import source as source_data
from .checking import check_int, check_optional_int, check_share, shorten
from .classes import Division, LabelNames, Labels, check_names, rename, warn_of_similar
from .earlier import find_test_images
from .manifest import SPLITS, check_complete, check_form, compare, copied, first_tasks, new_settings, train_hashes
from .markup import tasks_table
from .scenarios import SCENARIOS, check_scenario
from .shifts import Shift, check_shift
from .tasks import ImageItem, Part, Parts, Task, TaskImages, by_source, read_entries, verify_parts, write_entries

__all__ = ["ImageItem", "Task", "TaskImages", "TaskStream"]

Data: TypeAlias = datasets.Dataset | datasets.DatasetDict | str | os.PathLike[str]


class TaskStream:
    """A sequence of tasks, each with classes and their images.

    `TaskStream.from_dataset` divides the classes of a dataset that is known in advance. A stream without an end begins
    with `TaskStream.empty`, or with the tasks of an earlier run by `TaskStream.from_manifest`, and `append` adds tasks as
    their images arrive; classes are then known by their names.

    Attributes:
        scenario: the name of its scenario, a key of `pgp_hf.data.scenarios.SCENARIOS`.
        seed: the seed that it was built with; None for classes in label order.
        tasks: the `Task` objects, in order.
        label_names: the name of each label id. In a stream that goes on after the first tasks of an earlier run, the
            names of the classes that those tasks lack keep their ids.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        tasks: Sequence[Task],
        parts: Parts,
        label_names: Sequence[str],
        notes: Sequence[Mapping[str, Any]] | None = None,
        begun_open: bool = False,
    ) -> None:
        self._settings = settings  # the manifest without its tasks
        self._parts = parts  # by split, for each task
        self._notes = [{} for _ in tasks] if notes is None else list(notes)  # what else a manifest says of each task
        self._begun_open = begun_open
        self._names_before: list[int] = []  # number of label names before each task that was appended here
        self.scenario: str = settings["scenario"]
        self.seed: int | None = settings["seed"]
        self.tasks = list(tasks)
        self.label_names = list(label_names)

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks."""
        return len(self.tasks)

    @property
    def num_classes(self) -> int:
        """Return the number of label ids."""
        return len(self.label_names)

    @property
    def id2label(self) -> dict[int, str]:
        """Return the name of each label id, as transformers' configurations expect it."""
        return dict(enumerate(self.label_names))

    @property
    def class_order(self) -> list[int]:
        """Return the label ids of all tasks, in the order in which they arrive."""
        return [label for task in self.tasks for label in task.new_classes]

    @property
    def is_open(self) -> bool:
        """Return True for a stream without an end: one that began with `empty` or `from_manifest`, or was appended to."""
        return self._begun_open or bool(self._names_before)

    @property
    def begins_empty(self) -> bool:
        """Return True for a stream that began with `empty`, whatever was appended since."""
        return self._begun_open and len(self._names_before) == self.num_tasks and not self.classes_after(-1)

    def classes_after(self, t: int) -> int:
        """Return the number of label ids once task t (0-based) was there: all of them, but those appended later."""
        before = [*self._names_before, self.num_classes]
        return before[max(t + 1 - (self.num_tasks - len(self._names_before)), 0)]

    @classmethod
    def from_dataset(
        cls,
        dataset: Data,
        *,
        num_tasks: int | None = None,
        tasks: Labels | None = None,
        init_classes: int | None = None,
        increment: int | None = None,
        label_column: str | None = None,
        image_column: str | None = None,
        scenario: str = "class_incremental",
        shift: str | None = None,
        seed: int | None = 0,
        class_order: Sequence[int] | None = None,
        test_dataset: datasets.Dataset | None = None,
        test_split: str | None = None,
        test_fraction: float = 0.2,
        train_val_split: float | None = None,
        max_train_samples_per_class: int | None = None,
        max_eval_samples_per_class: int | None = None,
    ) -> TaskStream:
        """Divide the classes of a dataset into tasks: by `num_tasks`, by `tasks`, or by `increment`.

        Args:
            dataset: a `Dataset`; a `DatasetDict` with a split `"train"`; a local folder of parquet or image files; or
                a Hub id. Formats and transforms set on it are not applied.
            num_tasks: number of tasks, 1..number of classes; their sizes differ by one class at most.
            tasks: the classes of each task, for example `[["cat", "dog"], [3]]`, by name or by their value in the label
                column. Classes that are not listed are left out, and the others are numbered 0..C-1 in label order.
            init_classes: number of classes of the first task; `increment` by default.
            increment: number of classes of each further task; the last one may have fewer.
            label_column: a ClassLabel or integer column. Default: the only ClassLabel column, else the one named
                `label`, `labels` or `fine_label`. Distinct integers are sorted and mapped to ids 0..C-1.
            image_column: a `datasets.Image` column. Default: the only one.
            scenario: `"class_incremental"`, `"task_incremental"` (the task of each test image is given) or `"online"`
                (class-incremental, with one epoch for each task).
            shift: `"renderings"` shows each task's images, training and test alike, in a rendering of its own, drawn by
                the seed (see `pgp_hf.data.shifts.RENDERINGS`). Tasks that are appended are as they are.
            seed: draws the class order, the held-out rows, the rows kept of each class and the renderings. With None,
                classes come in label order, and everything else is drawn as with 0.
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
        check_scenario(scenario)
        check_shift(shift)
        seed = check_optional_int("seed", seed, 0, none="label order")
        division = Division(num_tasks, tasks, init_classes, increment, class_order)
        division.check()
        limits = source_data.check_limits(max_train_samples_per_class, max_eval_samples_per_class)
        shares = check_share("test_fraction", test_fraction), check_share("train_val_split", train_val_split)

        data = source_data.read_dataset(
            dataset, test_dataset, test_split, label_column, image_column, use_test=train_val_split is None
        )
        held_out = (None if data.has_test else shares[0], shares[1])
        divided, kept = division.divide(data.names, data.values, data.label_column, seed)
        if len(kept) < len(data.names):
            ids = {position: label for label, position in enumerate(kept)}
            data = data.relabelled(ids, [data.names[position] for position in kept])
        images, drawn = data.images(), Shift.draw(shift, len(divided), seed or 0)
        if drawn is not None:
            for source in images:
                source.renderings = drawn.by_class(divided)
        rows = source_data.choose_rows(data.labels, data.test_labels, held_out, seed or 0, *limits.values())
        parts = {}
        for split, source, chosen in zip(SPLITS, images, rows, strict=True):
            of_task = source_data.cut(split, chosen, source.labels, divided, data.names)
            parts[split] = [Part.of(source, own) for own in of_task]
        settings = new_settings(scenario, seed, data.described(held_out[0], limits), shares[1])
        settings |= {} if drawn is None else drawn.described()
        return cls(settings, [Task(t, own) for t, own in enumerate(divided)], parts, data.names)

    @classmethod
    def empty(cls, scenario: str = "class_incremental", seed: int | None = 0) -> TaskStream:
        """Begin a stream without any task, to which `append` adds some.

        Args:
            scenario: see `from_dataset`.
            seed: draws the held-out rows and the rows kept of each class.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value.
        """
        check_scenario(scenario)
        settings = new_settings(scenario, check_optional_int("seed", seed, 0, none="label order"), source={})
        return cls(settings, [], {split: [] for split in SPLITS}, [], begun_open=True)

    @classmethod
    def from_manifest(
        cls, manifest: Mapping[str, Any], test_dataset: Data | None = None, *, num_tasks: int | None = None
    ) -> TaskStream:
        """Make the stream of an earlier run, whose images are not here, to go on from it by `append`.

        Args:
            manifest: of the earlier run, its `stream.json`.
            test_dataset: test images of its tasks, matched by class name: what the run was tested on, or the training
                images from which that was held out; of a `DatasetDict` or a folder, the test split if it has one. A task
                of whose classes there is no image stays without test images.
            num_tasks: number of first tasks to keep; all by default. The names of all classes stay known.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a manifest that is incomplete or contradicts itself; test images that are not those of the run.
        """
        check_complete(manifest)
        settings: dict[str, Any] = copied(manifest)
        if num_tasks is not None:
            settings = first_tasks(settings, check_int("num_tasks", num_tasks, 0, len(settings["tasks"])))
        entries = settings.pop("tasks")
        tasks, parts, notes = read_entries(entries)
        if test_dataset is not None:
            found = find_test_images(test_dataset, settings, entries)
            parts["test"] = [there or absent for there, absent in zip(found, parts["test"], strict=True)]
        return cls(settings, tasks, parts, settings["label_names"], notes, begun_open=True)

    def append(
        self,
        dataset: Data,
        test_dataset: datasets.Dataset | None = None,
        *,
        label_column: str | None = None,
        image_column: str | None = None,
        label_names: LabelNames | None = None,
        test_split: str | None = None,
        test_fraction: float = 0.2,
        max_train_samples_per_class: int | None = None,
        max_eval_samples_per_class: int | None = None,
    ) -> Task:
        """Add a task with all classes of a dataset that have training images, known ones and new ones.

        Classes are matched by name: a known name keeps its label id, and new names get the next ones in label order. On
        an error the stream is as it was.

        Args:
            dataset, label_column, image_column, test_dataset, test_split, test_fraction, max_train_samples_per_class,
                max_eval_samples_per_class: see `from_dataset`. A class of a single image has no test image unless
                `test_dataset` or a split has one, and a task may have none at all.
            label_names: the names of the classes, in the order of their values in the label column, or by value: needed
                if that column holds integers alone; renames the classes of a ClassLabel.

        Returns:
            The new task.

        Raises:
            TypeError: a streaming dataset or an argument of the wrong type.
            ValueError: any other problem with the dataset or an argument; the message has the fix.
        """
        limits = source_data.check_limits(max_train_samples_per_class, max_eval_samples_per_class)
        share = check_share("test_fraction", test_fraction)
        data = source_data.read_dataset(dataset, test_dataset, test_split, label_column, image_column)
        own_names = rename(data.names, data.values, label_names, data.label_column, data.named)
        check_names(own_names)
        present = {own_names[position]: position for position in np.unique(data.labels).tolist()}
        new = [name for name in present if name not in self.label_names]
        warn_of_similar(self.label_names, new)

        names, order = [*self.label_names, *new], self.class_order
        found = {label: present[name] for label, name in enumerate(names) if name in present}
        added = tuple(label for label in found if label not in order)
        task = Task(self.num_tasks, (*(label for label in order if label in found), *added), added)
        data = data.relabelled({found[label]: label for label in task.classes}, names)
        held_out = (None if data.has_test else share, None)
        rows = source_data.choose_rows(data.labels, data.test_labels, held_out, self.seed or 0, *limits.values())
        parts = {split: Part.of(own, chosen) for split, own, chosen in zip(SPLITS, data.images(), rows, strict=True)}
        note = {"source": data.described(held_out[0], limits)}

        self._names_before = [*self._names_before, self.num_classes]
        self._parts = {split: [*self._parts[split], parts[split]] for split in SPLITS}
        self._notes = [*self._notes, note]
        self.tasks, self.label_names = [*self.tasks, task], names
        return task

    def withdraw(self) -> None:
        """Remove the task that was appended last, with the class names that came with it.

        Raises:
            ValueError: no task has been appended here.
        """
        if not self._names_before:
            raise ValueError("there is no task to withdraw: only those that were appended to this stream can be")
        *self._names_before, names = self._names_before
        self._parts = {split: self._parts[split][:-1] for split in SPLITS}
        self.tasks, self._notes, self.label_names = self.tasks[:-1], self._notes[:-1], self.label_names[:names]

    def __repr__(self) -> str:
        return f"TaskStream({self.scenario}: {self.num_classes} classes in {self.num_tasks} tasks, seed={self.seed})"

    def _repr_html_(self) -> str:
        counts = [[self.num_images(split, t) for split in SPLITS] for t in range(self.num_tasks)]
        return tasks_table(repr(self), [[self.label_names[c] for c in task.classes] for task in self.tasks], counts)

    def train(self, t: int) -> TaskImages:
        """Return the training images of task `t` (0-based); raise ValueError if they are not here."""
        return self._images("train", t)

    def test(self, t: int) -> TaskImages:
        """Return the test images of task `t` (0-based); raise ValueError if they are not here, or there are none."""
        return self._images("test", t)

    def has_train(self, t: int) -> bool:
        """Return True if the training images of task `t` (0-based) are here."""
        return self._parts["train"][self._index(t)].present

    def has_test(self, t: int) -> bool:
        """Return True if there are test images of task `t` (0-based), and they are here."""
        return self._parts["test"][self._index(t)].present

    def has_validation(self, t: int) -> bool:
        """Return True if the test images of task `t` (0-based) are here and were held out of its training images to choose by."""
        held_out = self._settings.get("train_val_split") is not None and "source" not in self._notes[self._index(t)]
        return held_out and self.has_test(t)

    def num_images(self, split: str, t: int) -> int:
        """Return the number of images of task `t` (0-based), here or not.

        Args:
            split: "train" or "test".
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {shorten(SPLITS)}, got {split!r}")
        return self._parts[split][self._index(t)].num_images

    def seen_classes(self, t: int) -> list[int]:
        """Return the label ids of tasks 0..t, in stream order, each once."""
        return [label for task in self.tasks[: self._index(t) + 1] for label in task.new_classes]

    def allowed_classes(self, after: int, task: int) -> list[int]:
        """Return the label ids that may win for an image of task `task` once tasks 0..`after` are learned.

        In the task-incremental scenario these are the task's own classes, in the others all classes seen so far.
        """
        classes = [own.classes for own in self.tasks]
        return SCENARIOS[self.scenario].allowed_classes(classes, self._index(after), self._index(task))

    def joined(self) -> TaskStream:
        """Return the same images as a stream of one task, with all classes in stream order; no image is decoded.

        Images come in the order of the dataset's rows, as in a stream that is built with `num_tasks=1`.

        Raises:
            ValueError: a stream without an end.
        """
        if self.is_open:
            raise ValueError(
                "a stream without an end cannot be learned as one task: its later tasks are unknown, and the images of "
                "earlier ones may be gone. Build it by TaskStream.from_dataset"
            )
        parts: Parts = {split: [] for split in SPLITS}
        for split in SPLITS:
            for source, own in by_source(self._parts[split]):
                parts[split].append(Part.of(source, np.sort(np.concatenate([part.rows for part in own]))))
        return TaskStream(self._settings, [Task(0, tuple(self.class_order))], parts, self.label_names)

    def manifest(self, num_tasks: int | None = None) -> dict[str, Any]:
        """Return the settings, the class order and the content hashes that identify this stream, ready for JSON.

        There is a hash for each task and split, `sha256`, over the label ids and the encoded image bytes in row order
        (see `ImageRows.digests`), but not over paths; nothing is decoded, and the hashes are computed once. `dataset`
        (name, fingerprints) is for information only. A task that was appended has a `source` of its own, with the
        settings of its dataset, and `new_classes` where known classes have come again.

        Args:
            num_tasks: number of first tasks, as the stream was before later ones were appended; all by default.

        Raises:
            ValueError: an image file that cannot be read.
        """
        tasks = write_entries(self.tasks, self._parts, copied(self._notes))
        own = {"num_tasks": self.num_tasks, "num_classes": self.num_classes, "label_names": self.label_names}
        content = {**copied({**self._settings, **own, "class_order": self.class_order}), "tasks": tasks}
        if num_tasks is None or num_tasks == self.num_tasks:
            return content
        names = self.label_names[: self.classes_after(num_tasks - 1)]
        return first_tasks({**content, "num_classes": len(names), "label_names": names}, num_tasks)

    def verify(self, progress: bool = True, gone: int = 0) -> None:
        """Decode every selected image, to find broken ones before hours of training; each only until a first success.

        Args:
            progress: show a progress bar when there are many images.
            gone: number of first tasks whose training images are left out, since they may be gone.

        Raises:
            ValueError: images that do not decode; the message names split and row of the first one, and says how many
                there are.
        """
        here = [self._parts[split][gone if split == "train" else 0 :] for split in SPLITS]
        verify_parts(here, progress)

    def check_manifest(self, manifest: Mapping[str, Any], gone: int = 0, tasks: int | None = None) -> None:
        """Compare this stream with the manifest of an earlier run.

        Neither the dataset's name and fingerprints are compared nor settings that do not affect data and order.

        Args:
            manifest: of the earlier run.
            gone: number of first tasks whose training images may be gone: their hashes are taken from the manifest if
                they have not been computed yet.
            tasks: number of first tasks to compare, for a stream without an end; all by default.

        Raises:
            TypeError: `manifest` is not a mapping.
            ValueError: data or order that differ (the message says where, and which settings may be the cause), or a
                `manifest` that is not in this format.
        """
        check_form(manifest)
        taken = []
        if gone:
            for part, sha256 in zip(self._parts["train"], train_hashes(manifest, gone), strict=False):
                if part.sha256 is None:
                    part.sha256 = sha256
                    taken.append(part)
        try:
            compare(self.manifest(), manifest, None if tasks is None else check_int("tasks", tasks, 0))
        except (TypeError, ValueError):
            for part in taken:
                part.sha256 = None
            raise

    def _index(self, t: int) -> int:
        if not self.tasks:
            raise ValueError(f"there is no task {t!r}: the stream is empty; append one first")
        return check_int("task t (0-based)", t, 0, self.num_tasks - 1)

    def _images(self, split: str, t: int) -> TaskImages:
        index = self._index(t)
        part = self._parts[split][index]
        if part.source is None:
            raise ValueError(
                f"the {part.num_images} {split} images of task {index} (0-based) are not here: the stream knows them by "
                "their manifest alone"
                + ("; pass test_dataset to TaskStream.from_manifest for test images" if split == "test" else "")
            )
        if not part.num_images:
            raise ValueError(f"task {index} (0-based) has no {split} images")
        return TaskImages(part.source, part.rows, index, part)
