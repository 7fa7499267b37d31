"""Upload finished tasks to the Hub, each as one commit on `main` and one tag: `task-1`, `task-2`, ...

    python -m pgp_hf.hub push OUTPUT_DIR --repo_id OWNER/NAME

uploads what is missing there, in order, and changes nothing if nothing is missing. A trainer does the same while it
trains (`push_to_hub=True`), through the queue in `queue.py`. Only the files named in `UPLOADED_FILES` leave the
machine, as sanitised copies: local paths are stripped, and the card names the repository. Training images that a run
stores follow only with `--exemplars`.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ..push_options import WAIT
from ..runs.folder import DIGESTS, EXEMPLARS, MODEL, MODEL_CONFIG, RESULTS, RunFolder
from ..runs.reading import read_json
from .origin import origin_of, task_numbers
from .queue import Refused, Uploads, explain
from .snapshot import CARD, UPLOADED_FILES, is_ours, listed, snapshot

__all__ = ["UPLOADED_FILES", "PushError", "Pushed", "TaskRepo", "command", "listed", "missing", "push", "snapshot"]


class PushError(RuntimeError):
    """Tasks are missing on the Hub; the message says which ones, why, and what to do."""


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push.

    Attributes:
        repo_id: the repository, with its owner.
        uploaded: tags that are new.
        present: tags that were there before.
        left_out: tags of tasks whose weights the run has not kept, see `save_full_weights` of the training arguments.
        elsewhere: tags of tasks that are in the repository that the run goes on from.
    """

    repo_id: str
    uploaded: list[str]
    present: list[str]
    left_out: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


class Outcome(Enum):
    """The outcome for one task; the value completes a sentence about it."""

    UPLOADED = "uploaded"
    PRESENT = "is there already"
    LEFT_OUT = "left out, since the run has not kept its weights"
    ELSEWHERE = "left out, since it is in the repository that the run goes on from"


def check_license(license: str | None, name: str = "license") -> None:
    """Raise ValueError for anything but the id of a license, or None; `name` is that of the argument, for the message."""
    if license is not None and not (isinstance(license, str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license)):
        raise ValueError(
            f"{name}={license!r} is not the id of a license as the Hub writes them: 'apache-2.0', 'mit', 'other'."
        )


# ---- one repository ---------------------------------------------------------------------------------------------------


@dataclass
class TaskRepo:
    """The repository of a run.

    Args:
        repo_id: "owner/name", or "name" for the token's own user.
        token: as everywhere in `huggingface_hub`; `HF_TOKEN` or the stored one by default.
        private: whether a new repository is private; by default, as its owner's settings say.
        base_model: Hub id of a backbone that was loaded from a local folder.
        new_run: whether the run is just starting, so that the repository must not hold any task of it yet.
        exemplars: whether training images that the run stores are uploaded too.
        license: id of the license that the cards name, such as "apache-2.0"; by default they name none.
        origin: the revision that the run goes on from, if it is on the Hub: its tasks are not uploaded.
    """

    repo_id: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    base_model: str | None = None
    new_run: bool = False
    exemplars: bool = False
    license: str | None = None
    origin: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, value in (("repo_id", self.repo_id), ("base_model", self.base_model)):
            try:
                if value is not None:
                    validate_repo_id(value)
            except HFValidationError as error:
                raise ValueError(f"{name}={value!r} is not 'name' or 'owner/name' on the Hub: {error}") from error
        check_license(self.license)
        self._api = HfApi(token=self.token)

    @property
    def url(self) -> str:
        """Return the address of the repository."""
        return f"{self._api.endpoint}/{self.repo_id}"

    @property
    def begins(self) -> int:
        """Return the 0-based index of the first task to upload."""
        return self.origin["tasks"] if self.origin else 0

    def create(self) -> None:
        """Create the repository unless it exists, and set `repo_id` to its full id.

        Raises:
            Refused: the repository is public although `private` is set, or holds a run although `new_run` is set.
        """
        self.repo_id = self._api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.private and not self._api.repo_info(self.repo_id).private:
            raise Refused(
                f"{self.repo_id} exists and is public, which private=True does not change: make it private in its "
                "settings, choose another repository, or leave private out."
            )
        held = [n for n in task_numbers(self._tags()) if n > self.begins] if self.new_run else []
        if held:
            begins = f"goes on after task-{self.begins}" if self.begins else "is a new one"
            raise Refused(
                f"{self.repo_id} already holds a run (tag task-{held[0]}), and this {begins}: choose another repository, or "
                f"delete the old tags first (hf repos tag delete {self.repo_id} task-{held[0]}, and so on)."
            )

    def put(self, t: int, folder: Path) -> Outcome:
        """Upload the task with 0-based index t from `folder` unless it is there or elsewhere, or its weights are gone.

        Afterwards `main` holds exactly this task's files, and files of other kinds as before. A commit whose answer was
        lost is not made twice, and `main` is not overwritten if somebody else has moved it in the meantime.

        Raises:
            Refused: the tag exists with other content, or `main` holds later tasks.
        """
        tag, tags = f"task-{t + 1}", self._tags()
        if t < self.begins and tag not in tags:
            return Outcome.ELSEWHERE
        with tempfile.TemporaryDirectory(prefix="pgp_hf-") as copy, disable_progress_bars():
            files = snapshot(
                folder,
                Path(copy),
                repo_id=self.repo_id,
                base_model=self.base_model,
                exemplars=self.exemplars,
                license=self.license,
            )
            wanted = {path: Path(copy) / path for path in files}
            if tag in tags:
                self._check_same(tag, wanted)
                return Outcome.PRESENT
            if MODEL_CONFIG in wanted and MODEL not in wanted:
                return Outcome.LEFT_OUT
            later = [f"task-{n}" for n in task_numbers(tags) if n > t + 1]
            commit = self._find(t, wanted) if later else self._head(t, wanted)
            if commit is None:
                raise Refused(
                    f"{tag} cannot be uploaded: {self.repo_id} already holds {', '.join(later)}, and main never goes "
                    "back. Choose another repository, or delete those tags first "
                    f"(hf repos tag delete {self.repo_id} {later[0]}, and so on)."
                )
            self._api.create_tag(self.repo_id, tag=tag, revision=commit)
        return Outcome.UPLOADED

    def _tags(self) -> dict[str, str]:
        return {tag.name: tag.target_commit for tag in self._api.list_repo_refs(self.repo_id).tags}

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        entries = self._api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile) and is_ours(entry.path, True)}

    def _head(self, t: int, wanted: dict[str, Path]) -> str:
        """Return the head of `main`, after committing the wanted files unless it holds them already."""
        head = self._api.model_info(self.repo_id, revision="main").sha
        assert head is not None  # only lists of models come without it
        tree = self._tree(head)
        if _difference(tree, wanted) is None:
            return head
        additions: list[CommitOperationAdd] = []
        for path, file in wanted.items():
            tensors = path.endswith(".safetensors")
            # as bytes, since a path would get a progress bar of its own
            additions.append(CommitOperationAdd(path, file.read_bytes() if tensors else file))
            if tensors:
                # one by one: several go through a thread pool, which Python waits for at exit even if it hangs
                self._api.preupload_lfs_files(self.repo_id, additions[-1:])
        deletions = [
            CommitOperationDelete(path) for path in tree if path not in wanted and path not in _foreign(wanted)
        ]
        title = _title(t, read_json(wanted[RESULTS]))
        commit = self._api.create_commit(
            self.repo_id, [*additions, *deletions], commit_message=title, revision="main", parent_commit=head
        )
        return commit.oid

    def _find(self, t: int, wanted: dict[str, Path]) -> str | None:
        """Return an earlier commit of the wanted files whose tag is missing; None if there is none."""
        start = f"Task {t + 1} of "
        for commit in self._api.list_repo_commits(self.repo_id):
            if commit.title.startswith(start) and _difference(self._tree(commit.commit_id), wanted) is None:
                return commit.commit_id
        return None

    def _check_same(self, tag: str, wanted: dict[str, Path]) -> None:
        tree = self._tree(tag)
        path = _difference(tree, wanted)
        if path is not None:
            what = f"holds another run: its {tag} differs from the one here in {path}"
            if path == EXEMPLARS and path not in tree:
                what = f"has {tag} without {path}"
            raise Refused(
                f"{self.repo_id} {what}. Published revisions are never changed: choose another repository, or delete the old "
                f"tags first (hf repos tag delete {self.repo_id} {tag}, and so on)."
            )


def _title(t: int, results: dict[str, Any]) -> str:
    average, lost = results["average_accuracy"], results["forgetting"]
    accuracy = "not measured" if average is None else f"{average:.2f} %"
    forgetting = "" if lost is None else f", forgetting {lost:.2f}"
    return f"Task {t + 1} of {results['num_tasks']}: average accuracy {accuracy}{forgetting}"


def _foreign(wanted: Mapping[str, Path]) -> set[str]:
    """Return files that only a whole model's run has: in another's repository, or without weights, they do not count."""
    return {MODEL, MODEL_CONFIG} - wanted.keys()


def _difference(tree: dict[str, RepoFile], wanted: dict[str, Path]) -> str | None:
    """Return a path at which a revision and the wanted files differ.

    Neither the card counts, which people may edit, nor stored images that are not to be uploaded or are here no more.
    """
    paths = {*tree, *wanted} - {CARD} - _foreign(wanted) - ({EXEMPLARS} - wanted.keys())
    for path in sorted(paths, key=lambda path: (path == DIGESTS, path)):  # which differ wherever another file does
        if path not in tree or path not in wanted:
            return path
        there, data = tree[path], wanted[path].read_bytes()
        if there.lfs is not None:
            same = there.lfs.sha256 == hashlib.sha256(data).hexdigest()
        else:  # git names a file by this digest
            same = there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if not same:
            return path
    return None


# ---- a whole folder ---------------------------------------------------------------------------------------------------


def push(
    output_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    base_model: str | None = None,
    exemplars: bool = False,
    license: str | None = None,
    wait: float = WAIT,
    say: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Upload the finished tasks of a run that are not on the Hub yet, in order; pushing again changes nothing.

    Connection errors, time-outs and 5xx answers are retried with exponential backoff.

    A run that goes on from a revision on the Hub uploads the tasks after it.

    Args:
        output_dir: the run's folder.
        repo_id, token, private, base_model, exemplars, license: as for [`TaskRepo`].
        wait: seconds without progress after which to give up.
        say: receives a line for each task.

    Raises:
        ValueError: a folder without finished tasks, or that lacks one before another; a `repo_id` or `base_model` that is not an id on the Hub.
        PushError: tasks that could not be uploaded, with the reason and the command that finishes it.
    """
    folder = RunFolder(output_dir)
    folder.check_gaps()
    tasks = folder.finished_tasks()
    if not tasks:
        found = "holds no finished task (task-1)" if folder.root.is_dir() else "is not a folder here"
        raise ValueError(f"{folder.root} {found}: give the output_dir of a run.")
    repo = TaskRepo(
        repo_id, token, private, base_model, exemplars=exemplars, license=license, origin=origin_of(folder)
    )
    tags: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}

    def put(t: int) -> None:
        outcome = repo.put(t, folder.task(t))
        tags[outcome].append(f"task-{t + 1}")
        where = f": {repo.url}/tree/task-{t + 1}" if outcome in (Outcome.UPLOADED, Outcome.PRESENT) else ""
        say(f"task-{t + 1} {outcome.value}{where}")

    # silent on the way, since the error below reports everything
    uploads = Uploads(repo.create, put, notify=lambda message: None, token=token, first=folder.first)
    uploads.add(tasks)
    done = -1
    while not uploads.wait(wait) and uploads.done > done:
        done = uploads.done
    uploads.close()
    if uploads.done < tasks:
        raise PushError(missing(uploads, tasks, folder.root, repo))
    return Pushed(repo.repo_id, *tags.values())


def command(output_dir: str | Path, repo: TaskRepo) -> str:
    """Return the command line that uploads what is missing, without the token, which must not be printed."""
    parts = ["python", "-m", "pgp_hf.hub", "push", str(output_dir), "--repo_id", repo.repo_id]
    parts += ["--private"] if repo.private else ["--no-private"] if repo.private is False else []
    parts += ["--base_model", repo.base_model] if repo.base_model else []
    parts += ["--exemplars"] if repo.exemplars else []
    parts += ["--license", repo.license] if repo.license else []
    return shlex.join(parts)


def missing(uploads: Uploads, tasks: int, output_dir: str | Path, repo: TaskRepo) -> str:
    """Return a report of the tasks that are not on the Hub, with the command that uploads them; empty if all are there."""
    names = [f"task-{t + 1}" for t in range(max(uploads.done, repo.begins), tasks)]
    if not names:
        return ""
    shown = ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"
    reason = "The upload has not finished." if uploads.error is None else explain(uploads.error, uploads.token)
    return (
        f"Not on the Hub: {shown}. {reason}\nNothing is lost. This finishes the upload, with the token of HF_TOKEN or "
        f"`hf auth login`:\n  {command(output_dir, repo)}"
    )
