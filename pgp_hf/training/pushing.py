"""Upload finished tasks while the next one trains."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import HubStrategy

from .. import hub
from ..hub.queue import Uploads
from ..runs.folder import RESULTS, RunFolder
from .arguments import PGPTrainingArguments
from .callbacks import StreamCallback


class PushTasks(StreamCallback):
    """Upload finished tasks in the background, in order and with retries, on the main process alone.

    What the Hub still lacks `args.hub_wait` seconds after the stream has ended is reported with the command that uploads
    it. If training fails, that is reported when the program ends.

    Args:
        origin: returns the revision on the Hub that the run goes on from, None where there is none.
    """

    def __init__(self, origin: Callable[[], dict[str, Any] | None] = lambda: None) -> None:
        self._origin = origin
        self._newest = b""  # results of the newest task that is uploaded
        self.uploads: Uploads | None = None
        self.repo: hub.TaskRepo | None = None
        self.left_out: list[str] = []
        self._report: Callable[[], None] = lambda: None

    def on_stream_begin(
        self, args: PGPTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            first = kwargs["first_task"]
            _add(self._start(args, first), args, first)

    def on_task_end(
        self,
        args: PGPTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        task: int,
        results: dict[str, Any],
        folder: Path,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            # on_stream_begin has not run where tasks are trained one by one, and they may follow a stream that has ended
            known = self.uploads
            uploads = self._start(args, task) if known is None or known.closed else known
            _drop_large(args, uploads)
            _add(uploads, args, task + 1)

    def on_stream_end(
        self,
        args: PGPTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        results: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.uploads is None or self.repo is None:
            return
        uploads, url, folder = self.uploads, self.repo.url, RunFolder(str(args.output_dir))
        uploads.add(folder.finished_tasks())
        if not uploads.wait(0) and args.hub_wait and not args.disable_tqdm:
            tqdm.write(f"Waiting up to {args.hub_wait:g} s for the upload to {url}")
        uploads.wait(args.hub_wait)
        uploads.close()
        _drop_large(args, uploads)
        atexit.unregister(self._report)
        self._report()
        if uploads.done == uploads.wanted:
            self._newest = (folder.task(uploads.done - 1) / RESULTS).read_bytes()
            if not args.disable_tqdm:
                lacking = (
                    f", but {', '.join(self.left_out)}, whose weights the run has not kept" if self.left_out else ""
                )
                which = f"All tasks after task-{self.repo.begins}" if self.repo.begins else f"All {uploads.done} tasks"
                tqdm.write(f"{which} are on the Hub{lacking}: {url}")

    def _start(self, args: PGPTrainingArguments, task: int) -> Uploads:
        """Start uploading what is finished of a run, which is new if `task`, the one to train, is its first."""
        folder, origin = RunFolder(str(args.output_dir)), self._origin()
        first = folder.first
        repo = args.hub_repo(origin, new_run=task == (origin["tasks"] if origin else first))
        if self.uploads is not None:
            self.uploads.close()
            newest = folder.task(self.uploads.done - 1) / RESULTS
            if newest.is_file() and newest.read_bytes() == self._newest:
                first = self.uploads.done  # what this has uploaded need not be compared again
        if first == folder.first:
            self.left_out = []

        def put(t: int) -> None:
            if repo.put(t, folder.task(t)) == hub.Outcome.LEFT_OUT:
                self.left_out.append(f"task-{t + 1}")

        uploads = Uploads(repo.create, put, token=args.hub_token, first=first)

        def report() -> None:
            if lacking := hub.missing(uploads, folder.finished_tasks(), folder.root, repo):
                print(lacking, flush=True)

        atexit.unregister(self._report)
        self.uploads, self.repo, self._report = uploads, repo, report
        atexit.register(report)
        return uploads


def _drop_large(args: PGPTrainingArguments, uploads: Uploads) -> None:
    """Remove what `save_full_weights` keeps for the last task alone from the tasks before, where the Hub has it."""
    folder = RunFolder(str(args.output_dir))
    if args.save_full_weights == "last":
        folder.drop_large(before=min(uploads.done, folder.finished_tasks() - 1))


def _add(uploads: Uploads, args: PGPTrainingArguments, tasks: int) -> None:
    uploads.add(0 if args.hub_strategy == HubStrategy.END else tasks)


def check_push(blocking: bool, revision: str | None) -> None:
    """Raise ValueError for arguments of a `Trainer`'s `push_to_hub` that do not work with a stream of tasks."""
    if not blocking or revision not in (None, "main"):
        raise ValueError(
            f"blocking={blocking}, revision={revision!r}: tasks go to main and to tags, and in the background by "
            "push_to_hub=True in the training arguments; leave both out."
        )


def check_origin(args: PGPTrainingArguments, origin: dict[str, Any] | None, *folders: RunFolder) -> None:
    """Raise ValueError if a run that goes on from a revision on the Hub is to be uploaded to where it cannot go.

    Args:
        origin: the revision.
        folders: hold tasks that the run has finished.
    """
    if args.push_to_hub and origin:
        finished = max(folder.finished_tasks() for folder in folders)
        hub.check_origin(args.hub_model_id, origin, finished, args.hub_token)


def push_now(
    args: PGPTrainingArguments, folder: RunFolder, token: str | None = None, private: bool | None = None
) -> hub.Pushed:
    """Upload the finished tasks that are not on the Hub yet, with the given token and privacy instead of those in `args`."""
    repo = args.hub_repo(hub.origin_of(folder))
    token, private = token or repo.token, repo.private if private is None else private
    return hub.push(
        folder.root,
        repo.repo_id,
        token=token,
        private=private,
        base_model=repo.base_model,
        exemplars=repo.exemplars,
        license=repo.license,
    )
