"""Resume: let a trainer take over an earlier run, whose files have been checked."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..data.stream import TaskStream
from ..methods import ContinualMethod, MethodState
from ..models import StreamModel, load_weights
from ..runs.checkpoint import PROGRESS, SETTINGS, step_of
from ..runs.folder import MANIFEST, RESULTS, RunFolder
from ..runs.open import open_run
from ..runs.reading import read_json
from ..runs.revision import read_method
from .agreement import check_agreement
from .arguments import PGPTrainingArguments
from .earlier import EarlierRun, check_method
from .evaluation import Recorded, References
from .learning import Room, check_same_task
from .progress import Progress
from .settings import check_same_settings, print_differing, recorded_settings, run_settings
from .writing import load_image_size


def check_new(args: PGPTrainingArguments, progress: Progress, folder: RunFolder) -> None:
    """Raise ValueError if a new run cannot begin: this trainer has begun one, or the folder holds an earlier one."""
    progress.check_new()
    if args.process_index == 0 and not args.overwrite_output_dir:
        folder.check_unused()


def delete_earlier(args: PGPTrainingArguments, folder: RunFolder) -> None:
    """Delete an earlier run in the folder of a new one, if `overwrite_output_dir` says so."""
    if args.process_index == 0 and args.overwrite_output_dir:
        folder.clear()


def find_run(where: str | Path, **hub: Any) -> RunFolder:
    """Find the run to continue.

    Args:
        where: as `open_run` has it.
        hub: `token` and other options, as for `locate`.

    Raises:
        ValueError: a path that holds no run, or one that lacks a task before another one.
    """
    if step_of(Path(where)) is not None:  # it lacks what the run has measured
        raise _no_run(where)
    source = open_run(where, **hub)
    if source.single:
        return source
    source.check_gaps()
    if source.is_empty():
        raise _no_run(where)
    return source


def _no_run(where: str | Path) -> ValueError:
    """Return the error for a path that holds neither a finished task nor a checkpoint."""
    run = next((path for path in Path(where).absolute().parents if not RunFolder(path).is_empty()), None)
    hint = f" It is inside the run {run}: pass that." if run else ""
    found = (
        "holds neither a finished task nor a checkpoint to go on from" if Path(where).exists() else "does not exist"
    )
    return ValueError(
        f"resume_from_checkpoint={str(where)!r} {found}: expected a "
        f"run's folder, one of its task folders, or 'owner/name@task-3' on the Hub.{hint}"
    )


@dataclass(frozen=True)
class Resumer:
    """Load an earlier run into a trainer, which hands over whatever that changes.

    Attributes:
        model, learner: the whole model, and the `StreamModel` inside it.
        folder: the trainer's own.
        room: what the model has room for, which grows with an open stream.
        predict: predicts the test images of a task.
        blank: what the method remembers before its first task.
    """

    args: PGPTrainingArguments
    stream: TaskStream
    model: PeftModel | PreTrainedModel
    learner: StreamModel
    method: ContinualMethod
    progress: Progress
    folder: RunFolder
    room: Room
    predict: Callable[[int], Recorded]
    blank: MethodState

    def resume(self, where: str | bool) -> tuple[int, Path | None]:
        """Take over a run; return the first task to train, and the checkpoint to enter it by.

        Args:
            where: as `StreamTrainer.train` has it.

        Raises:
            ValueError: a run that does not fit, or that cannot be continued in this trainer or folder.
        """
        source = self._find(where)
        finished, progress = source.finished_tasks(), self.progress
        following = finished or source.first
        checkpoint = source.last_checkpoint(following) if following < self.stream.num_tasks else None
        self._check_shared(source, finished, checkpoint)
        if checkpoint is not None:
            self.check_checkpoint(checkpoint, following)
        elif not finished and where is not True:  # nothing is deleted or begun for a path that holds nothing
            raise _no_run(str(where))
        if not finished and self.args.process_index == 0 and not self._elsewhere(source):
            self.folder.check_top_level()  # where the run has no file yet
        earlier = self._earlier(source)
        if finished:
            self._check_room(source.task(finished - 1), finished + (checkpoint is not None))
            self._check_settings(source.task(finished - 1), following)
            self._take_over(earlier, finished - 1)
        if not finished and progress.interrupted:
            if checkpoint is None:
                raise ValueError(
                    f"this trainer has begun its first task and {source.root} holds no checkpoint of it: make a new model "
                    "and a new trainer."
                )
            self._forget_first_task()
        progress.interrupted = False
        if self.args.process_index == 0:
            self._prepare_folder(earlier, finished)
            # the run may have died before doing so
            self.folder.drop_checkpoints(before=finished)
            if self.args.save_full_weights == "last" and not self.args.push_to_hub:
                self.folder.drop_large(before=finished - 1)
        if not finished and checkpoint is None:
            warnings.warn(f"{source.root} holds no run to resume: starting with the first task.", stacklevel=5)
        return finished or progress.results.first, checkpoint

    def _check_room(self, folder: Path, taken_over: int) -> None:
        """Raise ValueError if this trainer's model has grown for tasks of which nothing can be taken over.

        What it grew by has learned since, and would not begin as in a run that never stopped.

        Args:
            folder: of the last finished task.
            taken_over: number of tasks, with the one that a checkpoint is of.
        """
        if self.room.tasks > max(taken_over, read_json(folder / MANIFEST)["num_tasks"]):
            raise ValueError(
                f"this trainer's model has grown for task {self.room.tasks}, which it has begun, and there is no checkpoint of "
                "it: make a new model and a new trainer."
            )

    def _check_settings(self, folder: Path, following: int) -> None:
        """Raise ValueError if a finished task was trained with other settings; print them where no task is left to train."""
        recorded, now = read_json(folder / RESULTS).get("training"), recorded_settings(self.args)
        if following < self.stream.num_tasks:
            check_same_settings({"training": recorded}, {"training": now}, folder)
        elif self.args.process_index == 0 and isinstance(recorded, dict):
            print_differing(recorded, now)

    def check_checkpoint(self, checkpoint: Path, t: int) -> None:
        """Raise ValueError unless a checkpoint within the 0-based task t is of these images, settings and method."""
        if (path := checkpoint / SETTINGS).exists():  # earlier versions did not write it
            now = run_settings(self.args, self.method, self.learner)
            check_same_settings(read_json(path), now, checkpoint)
        self._check_batch_size(checkpoint)
        check_same_task(self.stream, t, checkpoint, gone=t if self.method.stores_images else 0)
        if (found := read_method(checkpoint)) is not None:
            check_method(self.method, found[1], checkpoint)

    def _check_batch_size(self, checkpoint: Path) -> None:
        """Raise ValueError unless steps go on with as many images as `auto_find_batch_size` has found for them."""
        noted, args = read_json(checkpoint / PROGRESS), self.args
        if "images_per_step" not in noted:  # by an earlier version
            return
        # a `Trainer` that looks for the size begins with that of the checkpoint
        size = noted["batch_size"] if args.auto_find_batch_size else args.per_device_train_batch_size
        was, now = noted["images_per_step"], size * args.gradient_accumulation_steps * args.world_size
        if was != now:
            raise ValueError(
                f"{checkpoint} was trained with {was} images in each step, in batches of {noted['batch_size']} that "
                f"auto_find_batch_size may have found, and now there would be {now}: go on with auto_find_batch_size, "
                "gradient_accumulation_steps and the number of processes as they were."
            )

    def go_on(self, source: RunFolder) -> None:
        """Take over the newest finished task of a run, from which the stream goes on; no file is written yet."""
        self._take_over(self._earlier(source, going_on=True), source.finished_tasks() - 1)

    def enter(self, source: RunFolder, resume: bool) -> None:
        """Make `output_dir` the folder of a run that goes on, with the finished tasks that can be found.

        Args:
            source: of the run.
            resume: whether the folder may hold tasks of this run already.

        Raises:
            ValueError: the folder holds another run, or later tasks; whatever was copied is removed if it cannot be all.
        """
        here, tasks = RunFolder(self.folder.root), source.finished_tasks()
        if not self._elsewhere(source) and not source.single:
            return
        if not here.is_empty() and here.finished_tasks() >= tasks and (resume or self._is_in(source)):
            if not resume and here.finished_tasks() > tasks:
                raise ValueError(
                    f"output_dir={here.root} holds {here.finished_tasks()} tasks, and this run goes on after {tasks}: choose "
                    "another output_dir, which gets a copy of the earlier tasks."
                )
            self._earlier(here, going_on=True).load(tasks - 1)  # checks that it is this run
            return
        if source.root.resolve().is_relative_to(here.root.resolve()):
            raise ValueError(f"output_dir={here.root} holds {source.root}: continue it in another output_dir.")
        if not self.args.overwrite_output_dir:
            if not (resume and here.tasks()):  # else a copy that was interrupted is completed
                here.check_unused()
            elif begun := here.begun():
                raise ValueError(
                    f"output_dir={here.root} holds checkpoints of task-{begun[0] + 1}, and only {len(here.tasks())} of the "
                    f"{tasks} tasks that this run goes on from: it is another run. Choose another output_dir."
                )
        kept = [] if self.args.overwrite_output_dir else here.tasks()  # of a copy that was interrupted
        try:
            self._prepare_folder(self._earlier(source, going_on=True), tasks)
        except BaseException:
            if not kept:
                here.clear()
            raise

    def find(self, t: int) -> tuple[bool, Path | None]:
        """Look in `output_dir` for the 0-based task t; return whether it is finished, and else its last checkpoint.

        A finished one is taken over.
        """
        self.folder.check_gaps()
        finished = t in self.folder.tasks()
        checkpoint = None if finished else self.folder.last_checkpoint(t)
        self._check_shared(self.folder, t + finished, checkpoint)
        if finished:
            self.stream.check_manifest(
                read_json(self.folder.task(t) / MANIFEST), tasks=t + 1
            )  # before the model grows
            self._take_over(self._earlier(self.folder, going_on=True), t)
            return True, None
        if checkpoint is not None:
            self.check_checkpoint(checkpoint, t)
        return False, checkpoint

    def _check_shared(self, source: RunFolder, finished: int, checkpoint: Path | None) -> None:
        """Raise ValueError unless all processes have found the same state of a run."""
        found = f"{finished} finished tasks and {'no checkpoint' if checkpoint is None else checkpoint.name}"
        fix = f"{source.root} must be one folder, shared by all machines."
        check_agreement(self.args, "the run to go on with", found, fix)

    def _earlier(self, source: RunFolder, going_on: bool = False) -> EarlierRun:
        return EarlierRun(source, self.stream, self.model, self.learner, self.method, self.progress.results, going_on)

    def _is_in(self, source: RunFolder) -> bool:
        """Return whether a single revision is one of the tasks in `output_dir`."""
        return source.root.resolve().parent == self.folder.root.resolve()

    def _elsewhere(self, source: RunFolder) -> bool:
        return source.root.resolve() != self.folder.root.resolve()

    def _find(self, where: str | bool) -> RunFolder:
        """Find the run, and check that it can be continued in this folder."""
        with self.args.main_process_first(desc="fetching the run"):  # it may be on the Hub
            source = self._own() if where is True else find_run(str(where), token=self.args.hub_token)
        if self._elsewhere(source):
            if source.root.resolve().is_relative_to(self.folder.root.resolve()):
                raise ValueError(
                    f"output_dir={self.folder.root} holds {source.root}: continue it in another output_dir."
                )
            if not self.args.overwrite_output_dir and self.args.process_index == 0:
                self.folder.check_unused()
        if not self.args.reinit_optimizer and 0 < source.finished_tasks() < self.stream.num_tasks:
            raise ValueError(
                "reinit_optimizer=False carries the optimizer's state from task to task, which finished tasks do "
                "not keep: such a run cannot be resumed exactly. Start anew, or use reinit_optimizer=True."
            )
        return source

    def _own(self) -> RunFolder:
        """Return the run in this folder, which may have begun nothing yet."""
        source = open_run(self.folder.root)
        if not source.single:
            source.check_gaps()
        return source

    def _take_over(self, earlier: EarlierRun, t: int) -> None:
        """Take over the state that the run had when the 0-based task t ended; all of it is checked before."""
        self.room.grow(self.learner, t, self.args.seed)
        loaded = earlier.load(t)
        if loaded.method is not None:
            self.method.load_state(loaded.method)  # the one part that may still refuse
        self.method.begun = True
        if self.method.projection is not None:
            self.method.projection.load_state(*loaded.bases)
        self.progress.results, self.progress.references = loaded.results, References()
        self.progress.stored = loaded.stored

        def record(tensors: dict[str, Tensor], j: int) -> Recorded:
            self._put(tensors, j)
            return self.predict(j)

        lost = earlier.load_references(loaded, self.progress.references, record)
        loaded.results.drift_lacks = sorted({*loaded.results.drift_lacks, *lost})
        self._put(loaded.weights, t)
        load_image_size(self.model, loaded.revision.folder)

    def _put(self, tensors: dict[str, Tensor], t: int) -> None:
        """Give the model what it had when the 0-based task t ended."""
        load_weights(self.model, tensors)
        self.progress.task = t
        self.learner.resume_after(t - self.progress.results.first)

    def _forget_first_task(self) -> None:
        """Reset to before the first task, which this trainer has begun; the checkpoint has the parameters."""
        if self.method.projection is not None:
            self.method.projection.load_state({}, self.method.projection.config.to_dict())
        self.method.load_state(copy.deepcopy(self.blank))
        self.progress.forget()

    def _prepare_folder(self, earlier: EarlierRun, finished: int) -> None:
        """Copy the finished tasks that can be found into this folder."""
        elsewhere = self._elsewhere(earlier.source)
        if elsewhere and self.args.overwrite_output_dir:
            self.folder.clear()
        if finished and (elsewhere or earlier.source.single):
            earlier.copy_to(self.folder, finished, self.progress.references)
        if finished:
            self.folder.complete_copy(finished - 1)  # the run may have died before doing so
