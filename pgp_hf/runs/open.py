"""Open an earlier run: from its folder, from a single revision, or from a repository on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..projection import Projection, ProjectionConfig
from .checks import origin_on_hub
from .folder import RunFolder, config_name
from .revision import Revision
from .settled import settled
from .sources import TASK, locate


class RevisionRun(RunFolder):
    """A run known by one revision, with earlier ones where they can be found.

    Args:
        folder: the revision's files.
        tasks: number of tasks that had ended.
        run: the folder that holds `features/` and earlier tasks, as far as they exist.
        earlier: returns the folder of the task with 0-based index t; by default the one in `run`.
    """

    single = True

    def __init__(self, folder: Path, tasks: int, run: Path, earlier: Callable[[int], Path] | None = None) -> None:
        super().__init__(folder)
        self._tasks, self._run = tasks, RunFolder(run)
        self._earlier = earlier or self._run.task

    def task(self, t: int) -> Path:
        """Return the folder of the task with 0-based index t; earlier ones on the Hub are downloaded."""
        return self.root if t == self._tasks - 1 else self._earlier(t)

    def features(self, t: int) -> Path:
        """Return the file with the features of task t's test images."""
        return self._run.features(t)

    def last_checkpoint(self, t: int) -> Path | None:
        """Return None, since a revision is a finished task and has no checkpoints."""
        return None

    def finished_tasks(self) -> int:
        """Return the number of tasks that had ended."""
        return self._tasks


def open_run(where: str | Path, **hub: Any) -> RunFolder:
    """Open the run to continue.

    Args:
        where: a run's folder, one of its task folders or a copy of one, or "repo@task-3" on the Hub.
        hub: `token` and other options, as for `locate`.

    Raises:
        ValueError: no such revision, or one that is damaged; see `Revision.read`.
    """
    folder = Path(where)
    repo, at, revision = str(where).rpartition("@")
    if at and not folder.exists():
        folder = locate(repo, revision, card=True, **hub)
        results = Revision.read(folder, revision).results or {}

        def earlier(t: int) -> Path:
            return locate(_repo_of(t, repo, results), f"task-{t + 1}", card=True, **hub)

        return RevisionRun(folder, _finished_tasks(folder, revision), folder, earlier)
    run = RunFolder(folder)
    if run.is_empty() and (folder / config_name(folder)).is_file():
        folder = locate(folder)
        named = TASK.fullmatch(folder.resolve().name)
        return RevisionRun(folder, _finished_tasks(folder), folder.resolve().parent if named else folder)
    return run


def open_finished(where: str | Path, revision: str | None = None, **hub: Any) -> RunFolder:
    """Open a run, or one of its revisions, of which at least one task has ended.

    Args:
        where: a run's folder, one of its task folders or a copy of one, or the id of a repository on the Hub.
        revision: "task-3" for the state after the third task, by default the last; on the Hub also a branch or commit.
        hub: `token` and other options, as for `locate`.

    Raises:
        ValueError: no such revision, one that is damaged, a run without a finished task, or one that lacks a task.
    """
    if not Path(where).is_dir():
        return open_run(f"{where}@{revision or 'main'}", **hub)
    run = open_run(where)
    if revision not in (None, "main"):
        folder = locate(where, revision)
        return RevisionRun(folder, _finished_tasks(folder, revision), folder.resolve().parent)
    if not run.single:
        run.check_gaps()
    if not run.finished_tasks():
        raise ValueError(f"{run.root} holds no finished task: expected a run's folder, or one of its task folders.")
    return run


def load_projection_config(repo_or_dir: str | Path, revision: str | None = None, **hub: Any) -> ProjectionConfig:
    """Read the settings of a revision's projection: `ProjectionConfig.from_pretrained`."""

    def read() -> ProjectionConfig:
        return Revision.read(locate(repo_or_dir, revision, **hub), revision).projection_config()

    return settled(repo_or_dir, revision, read)


def load_projection(repo_or_dir: str | Path, revision: str | None = None, **hub: Any) -> Projection:
    """Read a revision's projection with its bases: `Projection.from_pretrained`."""

    def read() -> Projection:
        return Revision.read(locate(repo_or_dir, revision, **hub), revision).projection()

    return settled(repo_or_dir, revision, read)


def _repo_of(t: int, repo: str, results: Mapping[str, Any]) -> str:
    """Return the repository that has the 0-based task t of a run: its own, or that of a revision that it goes on from."""
    origin = origin_on_hub(results)
    while origin and t < origin["tasks"]:
        repo, origin = origin["repo"], origin_on_hub(origin)
        if Path(repo).is_dir():
            raise ValueError(f"task {t + 1} is in the repository {repo!r}, and here is a folder of that name.")
    return repo


def _finished_tasks(folder: Path, revision: str | None = None) -> int:
    tasks = Revision.read(folder, revision).tasks
    if not tasks:
        raise ValueError(f"{folder} is an adapter without a run: there is nothing to continue.")
    return tasks
