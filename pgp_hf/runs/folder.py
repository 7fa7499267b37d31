"""Lay out the files of a run, which are written whole or not at all.

output_dir/  the last finished task's files (large ones as hard links), and
  task-1/ ... task-T/   the same files as they were when each task ended
  features/task-1.safetensors ...   head inputs and pool entries of each task's test images when it ended
  checkpoints/task-t/checkpoint-N/  checkpoints of the task in training, removed when it ends; see `runs.checkpoint`
  continued.json        in a run continued from a single revision, or one that learns all tasks as one, the last: the
                        number of tasks that are not here
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from .atomic import replacing, write_json
from .checkpoint import check_checkpoint, checkpoints
from .reading import read_json

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL = "config.json", "model.safetensors"  # in place of an adapter's, where a whole model has learned
PROCESSOR = "preprocessor_config.json"
BASES, DESCRIPTION = "projection.safetensors", "projection.json"
METHOD_STATE, METHOD = "method.safetensors", "method.json"
EXEMPLARS = "exemplars.safetensors"  # images, where the method keeps some and the run stores them
MANIFEST, RESULTS = "stream.json", "results.json"
DIGESTS = "digests.json"  # of all other files of a task, written last
FEATURES, CHECKPOINTS, CONTINUED = "features", "checkpoints", "continued.json"
LARGE = (MODEL, EXEMPLARS)  # by default kept for the newest task alone


class RunFolder:
    """The layout of an output folder.

    Args:
        root: the run's `output_dir`.

    Attributes:
        single: True for a single revision, whose folder holds the last task's files alone.
    """

    single = False

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def task(self, t: int) -> Path:
        """Return the folder of the task with 0-based index t."""
        return self.root / f"task-{t + 1}"

    def features(self, t: int) -> Path:
        """Return the file with the features of task t's test images."""
        return self.root / FEATURES / f"task-{t + 1}.safetensors"

    def checkpoints(self, t: int) -> Path:
        """Return the folder of task t's Trainer checkpoints."""
        return self.root / CHECKPOINTS / f"task-{t + 1}"

    def last_checkpoint(self, t: int) -> Path | None:
        """Return a task's newest checkpoint whose files are all as they were written; None if there is none.

        Those that are passed over are named in a warning.
        """
        for folder in checkpoints(self.checkpoints(t)):
            try:
                check_checkpoint(folder)
            except ValueError as error:
                warnings.warn(
                    f"{error}. The checkpoint before it is used, or else the task starts anew.", stacklevel=3
                )
            else:
                return folder
        return None

    def finished_tasks(self) -> int:
        """Return the number of tasks that have ended, counted from the first of the stream."""
        first = t = self.first
        while self.task(t).is_dir():
            t += 1
        return t if t > first else 0

    @property
    def first(self) -> int:
        """Return the 0-based index of the first task here, above 0 where `start_at` has noted that."""
        path = self.root / CONTINUED
        first = read_json(path).get("first") if path.exists() else 0
        if type(first) is not int or first < 0:
            raise ValueError(f"{path} has first={first!r}: expected the 0-based index of a task.")
        return first

    def start_at(self, first: int) -> None:
        """Note that the task with this 0-based index is the first one here."""
        if first:
            write_json(self.root / CONTINUED, {"first": first})
        else:
            (self.root / CONTINUED).unlink(missing_ok=True)

    def is_empty(self) -> bool:
        """Return whether the folder holds no run: neither finished tasks nor checkpoints."""
        return not any(self.root.glob("task-*")) and not (self.root / CHECKPOINTS).exists()

    def check_unused(self) -> None:
        """Raise ValueError if the folder holds an earlier run."""
        if not self.is_empty():
            raise ValueError(
                f"output_dir={self.root} holds an earlier run ({self.finished_tasks()} finished tasks): continue it with "
                "resume_from_checkpoint=True, delete it with overwrite_output_dir=True, or choose another folder."
            )

    def clear(self) -> None:
        """Delete an earlier run's files, and nothing else."""
        for task in self.root.glob("task-*"):
            # the copies at the top level; whatever else lies there is the user's
            for file in task.rglob("*"):
                if file.is_file():
                    (self.root / file.relative_to(task)).unlink(missing_ok=True)
        for folder in (*self.root.glob("task-*"), *self.root.glob(".task-*")):
            shutil.rmtree(folder, ignore_errors=True)
        for name in (FEATURES, CHECKPOINTS):
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / CONTINUED).unlink(missing_ok=True)

    def publish(self, t: int, write: Callable[[Path], object]) -> Path:
        """Write a finished task, whole or not at all, and return its folder.

        The files are then copied to the top level, each atomically; a run that dies in between keeps its task.

        Args:
            t: the task's 0-based index.
            write: fills the temporary folder that it is given, which then becomes the task's.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".task-{t + 1}-", dir=self.root))
        try:
            write(temporary)
            temporary.chmod(0o755)  # mkdtemp makes it private, which a finished task is not
            shutil.rmtree(self.task(t), ignore_errors=True)
            os.replace(temporary, self.task(t))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.promote(t)
        return self.task(t)

    def promote(self, t: int) -> None:
        """Copy a finished task's files to the top level, their digests last."""
        for file in sorted(self.task(t).rglob("*"), key=lambda file: (file.name == DIGESTS, file)):
            if file.is_file():
                with replacing(self.root / file.relative_to(self.task(t))) as temporary:
                    _link(file, temporary) if file.name in LARGE else shutil.copyfile(file, temporary)

    def drop_large(self, before: int) -> None:
        """Remove a whole model's weights and stored images from the folders of the tasks with 0-based index below `before`."""
        for t in range(before):
            for name in LARGE:
                (self.task(t) / name).unlink(missing_ok=True)


def config_name(folder: Path) -> str:
    """Return the name of the file that describes the model in a task's folder: an adapter's, or a whole model's."""
    whole = (folder / MODEL_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file()
    return MODEL_CONFIG if whole else ADAPTER_CONFIG


def _link(file: Path, target: Path) -> None:
    """Link a large file instead of copying it, where the file system can."""
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
