"""Take up a finished run to learn on, and make room in its model for classes that nobody foresaw."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.stored import Stored
from ..data.stream import Task, TaskStream
from ..inference.opening import floating_dtype, open_model
from ..methods import ContinualMethod, ProjectedPrompts, create
from ..models import StreamModel, open_head, stream_model
from ..runs.checks import origin_on_hub
from ..runs.folder import MANIFEST, PROCESSOR, RunFolder
from ..runs.open import open_finished
from ..runs.reading import read_json
from ..runs.revision import Revision

if TYPE_CHECKING:
    from .arguments import PGPTrainingArguments


@dataclass
class Room:
    """The room that a model has for classes and tasks; it grows with an open stream.

    Attributes:
        stream: the tasks.
        tasks: number of tasks that there is room for: all of those that were known when the trainer was made.
    """

    stream: TaskStream
    tasks: int

    @classmethod
    def of(cls, model: PeftModel | PreTrainedModel, stream: TaskStream) -> tuple[PeftModel | PreTrainedModel, Room]:
        """Return the model to train, and the room in it.

        A stream that began with nothing takes any head, or none, and replaces it by one without classes.

        Raises:
            TypeError: something else than a stream.
        """
        if not isinstance(stream, TaskStream):
            raise TypeError(f"stream is a {type(stream).__name__}: pass a pgp_hf.TaskStream.")
        if not stream.is_open:
            return model, cls(stream, stream.num_tasks)
        if stream.begins_empty:
            return open_head(model), cls(stream, 0)
        names = stream_model(model).class_names
        known = stream.num_tasks
        if names is not None and len(names) != stream.num_classes:  # it fits the tasks before those that were appended
            known = next((t for t in range(known) if stream.classes_after(t) > len(names)), known)
        return model, cls(stream, known)

    @property
    def classes(self) -> int:
        """Return the number of classes that there is room for."""
        return self.stream.classes_after(self.tasks - 1) if self.tasks else 0

    def counted(self, t: int) -> int:
        """Return how many tasks a run lists once the 0-based task t has been learned."""
        return max(self.tasks, t + 1)

    def grow(self, model: StreamModel, t: int, seed: int) -> None:
        """Make room for the tasks up to the 0-based task t; what there is stays as it is.

        Raises:
            ValueError: a model that cannot grow.
        """
        if t < self.tasks:
            return
        names, known = self.stream.label_names[: self.stream.classes_after(t)], len(model.class_names or ())
        if len(names) > known:
            model.add_classes(names[known:], seed)
        for task in range(self.tasks, t + 1):
            model.add_task(task, self.stream.tasks[task].classes, seed)
            self.tasks = task + 1


class Opened(NamedTuple):
    """A finished run, ready to go on.

    Attributes:
        model: as trainable as it was.
        source: where the files of its tasks are.
    """

    model: PeftModel | PreTrainedModel
    method: ContinualMethod
    processor: BaseImageProcessor
    stream: TaskStream
    source: RunFolder


def open_for_learning(
    run_or_repo: str | os.PathLike[str],
    revision: str | None,
    test_dataset: Any,
    backbone: str | os.PathLike[str] | PreTrainedModel | None,
    processor: Any,
    hub: dict[str, Any],
    dtype: torch.dtype | str | None = None,
) -> Opened:
    """Open a revision to go on from it; for the arguments see `StreamTrainer.from_pretrained`.

    Raises:
        ValueError: no such revision, files that do not fit together, or another backbone.
    """
    dtype = floating_dtype(dtype)  # before anything is read
    source = open_finished(os.fspath(run_or_repo), revision, **hub)
    tasks = source.finished_tasks()
    found = Revision.read(source.task(tasks - 1), f"task-{tasks}")
    if found.manifest is None or found.learned != tasks:
        raise ValueError(
            f"{run_or_repo} has learned {found.tasks} tasks as one, which takes the images of all of them: make a new run "
            "with all tasks."
        )
    method = saved_method(found)
    if processor is not None:
        check_same_size(processor, found)
    local = Path(run_or_repo).is_dir()
    stream = TaskStream.from_manifest(found.manifest, test_dataset, num_tasks=tasks)
    # last, since it changes a backbone that was passed
    model, processor = open_model(found, backbone, processor, local, hub, trainable=True, dtype=dtype)
    return Opened(model, method, processor, stream, source)


def check_same_size(processor: Any, found: Revision) -> None:
    """Raise ValueError if an image processor makes images of another size than the run was trained on."""
    path = found.folder / PROCESSOR
    saved = read_json(path) if path.exists() else {}
    own = processor.to_dict() if hasattr(processor, "to_dict") else {}
    for name in ("size", "crop_size"):
        if saved.get(name) is not None and name in own and dict(own[name] or {}) != saved[name]:
            raise ValueError(
                f"processing_class has {name}={dict(own[name] or {})}, the run was trained with {saved[name]}: prompts and "
                "statistics belong to that size. Leave processing_class out, or pass one of the same size."
            )


def origin(source: RunFolder, run_or_repo: str | os.PathLike[str], revision: str | None) -> dict[str, Any]:
    """Return what `results.json` says of the revision that a run goes on from."""
    tasks = source.finished_tasks()
    on_hub = not Path(run_or_repo).is_dir()
    return {
        "repo": str(run_or_repo) if on_hub else None,
        "revision": f"task-{tasks}",
        "commit": source.root.name if on_hub else None,  # the Hub's cache calls folders by it
        "tasks": tasks,
    }


def with_origin(origin: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Return an origin with its own, `before`; of folders that a run went through one after another, the newest alone.

    Otherwise a run that learns each task in a new folder nests them without end.
    """
    if origin["repo"] is None:
        before = origin_on_hub({"continues": before})
    return origin | ({"continues": before} if before else {})


def saved_method(found: Revision) -> ContinualMethod:
    """Return a new instance of the method of a revision, with its settings.

    Raises:
        ValueError: a method that is not registered here.
    """
    saved = found.method()
    if saved is None:  # a run from before methods had files
        return ProjectedPrompts(found.projection_config())
    try:
        return create(saved[1]["name"], **saved[1]["settings"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{found.folder} was trained by the method {saved[1]['name']!r}, which cannot be made here ({error})."
        ) from error


# ---- before a task trains --------------------------------------------------------------------------------------------


def check_next(
    stream: TaskStream, trained: TaskStream, learned: int, args: PGPTrainingArguments, interrupted: bool
) -> None:
    """Raise ValueError unless a trainer can learn one more task now.

    Args:
        stream: all tasks.
        trained: what is trained on.
        learned: number of tasks learned so far.
        interrupted: whether a task has begun and not ended.
    """
    if interrupted:
        raise ValueError(
            f"task {learned + 1} has begun and not ended: make the trainer again (from_pretrained), and go on by "
            "learn(..., resume_from_checkpoint=True)."
        )
    if trained is not stream:
        raise ValueError("a method that learns all tasks as one cannot learn on: make a new run with all tasks.")
    if learned < stream.num_tasks:
        raise ValueError(
            f"{stream.num_tasks - learned} tasks of the stream are not learned yet: train() them before more are added."
        )
    if not args.reinit_optimizer:
        raise ValueError(
            "reinit_optimizer=False carries the optimizer's state from task to task, and the parameters of a model that "
            "grows are new ones: leave it True."
        )


def check_task(stream: TaskStream, task: Task, method: ContinualMethod, stored: Stored, model: StreamModel) -> None:
    """Raise ValueError for a task that the method cannot learn, such as without images that are not here.

    Warn about a single class.

    Args:
        stored: images of older tasks that the run has kept.
        model: whose head may learn nothing from a single class.
    """
    needed = sorted({place[0] for place in method.exemplars()})
    gone = [t for t in needed if not stream.has_train(t)]
    if lacking := [t for t in gone if t not in stored]:
        raise ValueError(
            f"method {method.name!r} trains on images of task {lacking[0] + 1} again, which are not here: a run with "
            "memory_stores='images' keeps its own and can learn on without the data set. With it, make a trainer with "
            "the run's own stream, train(resume_from_checkpoint=True), and learn there."
        )
    if lacking := [t for t in gone if any(image.label is None for image in stored[t].values())]:
        raise ValueError(
            f"the stored images of task {lacking[0] + 1} are of a version that did not keep their labels: make a trainer "
            "with the run's own stream, train(resume_from_checkpoint=True), and learn there."
        )
    method.training_stream(stream)
    alone = len(task.classes) == 1 and len(stream.seen_classes(task.index)) == 1
    if alone and model.settings().get("head") != "statistics":
        warnings.warn(
            f"task {task.index + 1} has a single class and there is no other to tell it from: a linear head learns nothing "
            "from it. Begin with two classes or more, or use head='statistics'.",
            stacklevel=3,
        )


def check_same_task(stream: TaskStream, t: int, checkpoint: Path, gone: int) -> None:
    """Raise ValueError if a checkpoint within the 0-based task t belongs to other images or tasks than the stream's.

    Args:
        gone: number of first tasks whose training images may be gone.
    """
    path = checkpoint / MANIFEST
    if path.exists():  # earlier versions did not write it
        stream.check_manifest(read_json(path), gone=gone, tasks=t + 1 if stream.is_open else None)
