"""Lay out the files of a run, which are written whole or not at all.

output_dir/  the last finished task's files (large ones as hard links), and
  task-1/ ... task-T/   the same files as they were when each task ended
  samples/class-0-1.png ...         test images of each class, where the run was asked to keep some
  features/task-1.safetensors ...   head inputs and pool entries of each task's test images when it ended
  checkpoints/task-t/checkpoint-N/  checkpoints of the task in training, removed when it ends; see `runs.checkpoint`
  queries/              queries of images, which hold for any run; see `training.queries`
  continued.json        in a run continued from a single revision, or one that learns all tasks as one, the last: the
                        number of tasks that are not here
  .copying              while a task's files are copied to the top level: the name of its folder
  .task-t.aside/        files of somebody else, while those of task t take their place in task-t/
  .run.lock             while a process trains here, see `lock`
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from . import removal
from .atomic import replacing, sync, sync_names, write_json
from .checkpoint import UNFINISHED, check_checkpoint, checkpoints, delete_checkpoint, was_begun
from .lock import HOLDER
from .reading import read_json

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL = "config.json", "model.safetensors"  # in place of an adapter's, where a whole model has learned
PROCESSOR = "preprocessor_config.json"
BASES, DESCRIPTION = "projection.safetensors", "projection.json"
METHOD_STATE, METHOD = "method.safetensors", "method.json"
EXEMPLARS = "exemplars.safetensors"  # images, where the method keeps some and the run stores them
MANIFEST, RESULTS = "stream.json", "results.json"
DIGESTS = "digests.json"  # of all other files of a task, written last
FEATURES, CHECKPOINTS, CONTINUED, QUERIES = "features", "checkpoints", "continued.json", "queries"
SAMPLES, SAMPLE = "samples", re.compile(r"class-(\d+)-(\d+)\.png")  # test images that a run has kept on request
COPYING = ".copying"
LARGE = (MODEL, EXEMPLARS)  # by default kept for the newest task alone
TASK = re.compile(r"task-([1-9]\d{0,5})")

# what a task's folder holds, and the top level
_RUN = (RESULTS, MANIFEST, BASES, DESCRIPTION, METHOD_STATE, METHOD, DIGESTS)  # nobody else has them
_STATE = (*_RUN, ADAPTER_CONFIG, ADAPTER, MODEL_CONFIG, MODEL)
_FIGURES = tuple(
    f"figures/{name}.{suffix}"
    for name in (
        *("accuracy_matrix", "task_curves", "forgetting_by_task", "stability"),
        *("prompt_usage", "prompts_and_keys"),
    )
    for suffix in ("png", "svg")
)
_TASK_FILES = (
    *(*_STATE, EXEMPLARS, PROCESSOR, "processor_config.json", "README.md"),
    *_FIGURES,
)
# what else is written to the top level, whose temporary files are swept
_ALSO_SWEPT = (
    CONTINUED,
    "comparison.json",
    "figures/comparison.png",
    "figures/comparison.svg",
    "settings.json",
    "frozen.json",
)
_UNPUBLISHED = re.compile(TASK.pattern.join((r"\.", r"-[a-z0-9_]{8}")))  # as `mkdtemp` calls folders
_ASIDE = re.compile(TASK.pattern.join((r"\.", r"\.aside")))


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

    def samples(self) -> list[Path]:
        """Return the test images that the run has kept, by class and number."""
        found = {path: SAMPLE.fullmatch(path.name) for path in (self.root / SAMPLES).glob("class-*.png")}
        return sorted(
            (path for path, match in found.items() if match),
            key=lambda path: [int(number) for number in SAMPLE.fullmatch(path.name).groups()],  # type: ignore[union-attr]  # matched
        )

    def checkpoints(self, t: int) -> Path:
        """Return the folder of task t's checkpoints."""
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

    def tasks(self) -> list[int]:
        """Return the 0-based indices of the finished tasks that are here, whether or not those before them are."""
        found = [TASK.fullmatch(folder.name) for folder in self.root.glob("task-*") if _holds_task(folder)]
        return sorted(int(name[1]) - 1 for name in found if name)

    def finished_tasks(self) -> int:
        """Return the number of tasks that have ended, counted from the first of the stream."""
        here, first = {*self.tasks()}, self.first
        t = first
        while t in here:
            t += 1
        return t if t > first else 0

    def check_gaps(self) -> None:
        """Raise ValueError if a task is missing here before another one, which must not be trained over."""
        here = self.tasks()
        lacking = [t for t in range(self.first, here[-1]) if t not in here] if here else []
        early = [t for t in here if t < self.first]
        if lacking or early:
            what = (
                f"lacks {_named(lacking)}, but holds {_named(here)}"
                if lacking
                else f"holds {_named(early)}, but {CONTINUED} says that task-{self.first + 1} is the first one here"
            )
            raise ValueError(
                f"{self.root} {what}: a finished task is never trained over. Put back what was removed or changed; or "
                f"continue from a single task in another output_dir: resume_from_checkpoint={str(self.task(here[-1]))!r}."
            )
        following, begun, copied = self.finished_tasks() or self.first, self.begun(), self._copied()
        if later := [t for t in begun if t > following]:
            raise ValueError(
                f"{self.root} holds checkpoints of {_named(later)}, but lacks task-{following + 1}, which ended before: a "
                f"finished task is never trained over. Put back what was removed, or delete {self.root / CHECKPOINTS}."
            )
        if begun and copied and not here:
            raise ValueError(
                f"{self.root} lacks the folders of the {copied} tasks that its {RESULTS} counts: a finished task is never "
                f"trained over. Put back what was removed, or delete {self.root / CHECKPOINTS}."
            )

    def check_free(self, t: int) -> None:
        """Raise ValueError if the 0-based task t cannot be published here, such as one that is finished already."""
        if _holds_task(self.task(t)):
            raise ValueError(
                f"output_dir={self.root} holds task-{t + 1} already, and a finished task is never trained over: continue "
                "the run with resume_from_checkpoint=True, or choose another folder."
            )
        path = self.task(t)
        whole = path.is_file() or path.is_symlink()
        _check_free([path] if whole else [path / name for name in _TASK_FILES if (path / name).exists()])

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
        return not self._left()

    def check_unused(self) -> None:
        """Raise ValueError if the folder holds an earlier run, or files that a run would replace."""
        if not self.is_empty():
            raise ValueError(
                f"output_dir={self.root} holds an earlier run ({len(self.tasks())} finished tasks): continue it with "
                "resume_from_checkpoint=True, delete it with overwrite_output_dir=True, or choose another folder."
            )
        self.check_top_level()

    def check_top_level(self) -> None:
        """Raise ValueError if the top level holds files that a run would replace."""
        self._check_top_level(self._in_the_way())

    def begun(self) -> list[int]:
        """Return the 0-based indices of the tasks whose checkpoints are here, whole or not."""
        found = (TASK.fullmatch(folder.parent.name) for folder in self._all_checkpoints() if was_begun(folder))
        return sorted({int(name[1]) - 1 for name in found if name})

    def clear(self) -> None:
        """Delete the files that an earlier run has written, and the folders that are empty then.

        Queries stay, since they hold for any run.

        Raises:
            ValueError: files of somebody else that a run would replace, in which case nothing is deleted; files that
                cannot be deleted.
        """
        top, tasks = self._top_level(), self.tasks()
        self._check_top_level([name for name in self._in_the_way() if name not in top])
        self.sweep()
        self.drop_checkpoints()
        for t in tasks:
            if not self.task(t).is_symlink():  # which no run has made
                removal.remove(self.task(t), self._written(self.task(t)))
        features = [self.features(t) for t in self._features()]
        removal.remove(self.root / FEATURES, [path.name for path in features])
        removal.remove(self.root / SAMPLES, [path.name for path in self.samples()])
        removal.remove(self.root, [*top, COPYING, CONTINUED])
        if not self.is_empty():
            raise ValueError(
                f"output_dir={self.root} still holds {', '.join(map(str, self._left()))} of an earlier run, which cannot be "
                "deleted: remove it, or choose another folder."
            )

    def sweep(self) -> None:
        """Remove what a run was writing when it died; only for whoever holds the lock of the folder."""
        for folder in self.root.glob(".task-*"):
            if _UNPUBLISHED.fullmatch(folder.name):
                removal.remove_temporary(folder)
            elif aside := _ASIDE.fullmatch(folder.name):
                removal.merge(folder, self.task(int(aside[1]) - 1))
        for folder in (self.root / CHECKPOINTS).glob("task-*/.checkpoint-*"):
            if TASK.fullmatch(folder.parent.name) and UNFINISHED.fullmatch(folder.name):
                removal.remove_temporary(folder)
        features = [f"task-{t + 1}.safetensors" for t in self._features(temporary=True)]
        for where, known in (
            (self.root, (*_TASK_FILES, *_ALSO_SWEPT, COPYING, HOLDER)),
            (self.root / FEATURES, features),
        ):
            removal.remove(where, removal.temporaries(where, known))

    def drop_checkpoints(self, before: int | None = None) -> None:
        """Delete checkpoints of all tasks, or of those with 0-based index below `before`."""
        for folder in self._all_checkpoints():
            if before is None or int(folder.parent.name.removeprefix("task-")) - 1 < before:
                delete_checkpoint(folder)
        for folder in (*(self.root / CHECKPOINTS).glob("task-*"), self.root / CHECKPOINTS):
            removal.remove_empty(folder)

    def publish(self, t: int, write: Callable[[Path], object]) -> Path:
        """Write a finished task, whole or not at all, and return its folder.

        The files are then copied to the top level, each atomically; a run that dies in between keeps its task.

        Args:
            t: the task's 0-based index.
            write: fills the temporary folder that it is given, which then becomes the task's.

        Raises:
            ValueError: the task is finished already.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.check_free(t)
        temporary = Path(tempfile.mkdtemp(prefix=f".task-{t + 1}-", dir=self.root))
        try:
            write(temporary)
            temporary.chmod(0o755)  # mkdtemp makes it private, which a finished task is not
            for written in filter(Path.exists, (temporary, self.features(t))):
                sync(written)  # the task's checkpoints are deleted next
            self._place(temporary, t)
            sync_names(self.root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.promote(t)
        return self.task(t)

    def promote(self, t: int) -> None:
        """Copy a finished task's files to the top level, their digests last."""
        with replacing(self.root / COPYING) as temporary:  # for whoever reads the top level meanwhile
            temporary.write_text(f"{self.task(t).name}\n", encoding="utf-8")
        task = self.task(t)
        listed = removal.listed(task / DIGESTS)
        earlier = removal.listed(self.root / DIGESTS)
        removal.remove(self.root, [name for name in _FIGURES if name in earlier and name not in listed])
        for name in sorted(
            {*listed, DIGESTS} if listed else self._written(task), key=lambda name: (name == DIGESTS, name)
        ):
            if (task / name).is_file():
                with replacing(self.root / name) as temporary:
                    _link(task / name, temporary) if name in LARGE else shutil.copyfile(task / name, temporary)
        (self.root / COPYING).unlink(missing_ok=True)

    def complete_copy(self, t: int) -> None:
        """Copy a finished task's files to the top level unless they are there, where files may have been edited since."""
        copies = ((self.task(t) / name, self.root / name) for name in (RESULTS, DIGESTS))
        if (self.root / COPYING).exists() or any(_content(file) != _content(copy) for file, copy in copies):
            self.promote(t)

    def drop_large(self, before: int) -> None:
        """Remove a whole model's weights and stored images from the folders of the tasks with 0-based index below `before`."""
        for folder in map(self.task, range(before)):
            if not (there := [name for name in LARGE if os.path.lexists(folder / name)]):
                continue  # most, in a long stream, whose files need not be read at the end of each task
            own = removal.listed(folder / DIGESTS)
            adapter = (folder / ADAPTER_CONFIG).is_file()  # beside which a model's weights are somebody else's
            for name in there:
                if name in own and not (name == MODEL and adapter):
                    (folder / name).unlink(missing_ok=True)

    def _place(self, temporary: Path, t: int) -> None:
        """Give a written folder its name, whole or not at all; files of somebody else that lie there already stay."""
        target, aside = self.task(t), self.root / f".{self.task(t).name}.aside"
        removal.remove_empty(target)
        if not target.exists():
            os.replace(temporary, target)
            return
        pairs = ((file, target / file.relative_to(temporary)) for file in sorted(temporary.rglob("*")))
        _check_free([there for file, there in pairs if there.exists() and not (file.is_dir() and there.is_dir())])
        os.replace(target, aside)
        try:
            os.replace(temporary, target)
        finally:  # `sweep` does so if the process dies first
            removal.merge(aside, target)

    def _written(self, folder: Path) -> list[str]:
        """Return the files of a task in its folder or at the top level."""
        names = removal.written(folder, _TASK_FILES, [DIGESTS])
        others = (MODEL_CONFIG, MODEL) if (folder / ADAPTER_CONFIG).is_file() else ()
        return [name for name in names if name not in others]

    def _top_level(self) -> list[str]:
        """Return the files that a run has copied to the top level."""
        names = {name for t in self.tasks() for name in self._written(self.task(t)) if (self.root / name).is_file()}
        if all((self.root / name).is_file() for name in (RESULTS, MANIFEST)):  # a copy of a task
            names |= {*self._written(self.root)}
        return sorted(names)

    def _copied(self) -> int:
        """Return the number of tasks that the top level counts, 0 where it holds no copy of one."""
        try:
            count = read_json(self.root / RESULTS).get("finished_tasks")
        except ValueError:
            return 0
        return count if type(count) is int else 0

    def _in_the_way(self) -> list[str]:
        """Return the files at the top level that those of a task would replace."""
        return [name for name in _TASK_FILES if (self.root / name).exists()]

    def _check_top_level(self, names: Sequence[str]) -> None:
        if names:
            raise ValueError(
                f"output_dir={self.root} holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}, which the files "
                "of a run would replace: choose another folder, or move them. A finished task that lies here is continued "
                "with resume_from_checkpoint=True."
            )

    def _features(self, temporary: bool = False) -> list[int]:
        """Return the 0-based tasks whose features are here, or were being written."""
        pattern = r"\.{}\.safetensors\.\d+\.tmp" if temporary else r"{}\.safetensors"
        found = (re.fullmatch(pattern.format(TASK.pattern), path.name) for path in (self.root / FEATURES).glob("*"))
        return sorted({int(name[1]) - 1 for name in found if name})

    def _all_checkpoints(self) -> list[Path]:
        """Return the folders of all checkpoints, whole or not."""
        return [
            folder
            for task in (self.root / CHECKPOINTS).glob("task-*")
            if TASK.fullmatch(task.name)
            for folder in checkpoints(task)
        ]

    def _left(self) -> list[Path]:
        """Return the folders of finished tasks and checkpoints."""
        return [*(self.task(t) for t in self.tasks()), *filter(was_begun, self._all_checkpoints())]


def config_name(folder: Path) -> str:
    """Return the name of the file that describes the model in a task's folder: an adapter's, or a whole model's."""
    whole = (folder / MODEL_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file()
    return MODEL_CONFIG if whole else ADAPTER_CONFIG


def _check_free(in_the_way: Sequence[Path]) -> None:
    if in_the_way:
        raise ValueError(
            f"{in_the_way[0]} is in the way of a task's files, and no run has written it: move it, or choose another "
            "output_dir."
        )


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _holds_task(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _RUN)


def _named(tasks: Sequence[int]) -> str:
    """Return the names of the folders of tasks, shortened."""
    names = [f"task-{t + 1}" for t in tasks]
    return ", ".join(names if len(names) < 6 else [*names[:2], "...", names[-1]])


def _link(file: Path, target: Path) -> None:
    """Link a large file instead of copying it, where the file system can."""
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
