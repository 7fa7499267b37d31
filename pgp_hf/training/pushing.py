"""Uploading finished tasks while the next one trains."""

from __future__ import annotations

import atexit

from tqdm.auto import tqdm
from transformers.trainer_utils import HubStrategy

from .. import hub
from ..hub.queue import Uploads
from ..runs.folder import RunFolder
from .arguments import PGPTrainingArguments
from .callbacks import StreamCallback


class PushTasks(StreamCallback):
    """Uploads finished tasks beside the training, in order and with retries, on the main process alone.

    What the Hub still lacks when the stream has ended, `args.hub_wait` seconds later, is reported with the command
    that uploads it; a training that breaks off reports it when the program ends.
    """

    def __init__(self) -> None:
        self.uploads: Uploads | None = None

    def on_stream_begin(self, args, state, control, first_task, **kwargs):  # type: ignore[override]
        if state.is_world_process_zero:
            self._start(args, new_run=first_task == 0)
            self._add(args, first_task)

    def on_task_end(self, args, state, control, task, results, folder, **kwargs):  # type: ignore[override]
        if state.is_world_process_zero:
            if self.uploads is None:  # tasks trained one by one
                self._start(args, new_run=task == 0)
            self._add(args, task + 1)

    def on_stream_end(self, args, state, control, results, **kwargs):  # type: ignore[override]
        if not state.is_world_process_zero:
            return
        self.uploads.add(results["num_tasks"])
        if not self.uploads.wait(0) and args.hub_wait and not args.disable_tqdm:
            tqdm.write(f"Waiting up to {args.hub_wait:g} s for the upload to {self.repo.url}")
        self.uploads.wait(args.hub_wait)
        self.uploads.close()
        atexit.unregister(self._report)
        self._report()
        if self.uploads.done == self.uploads.wanted and not args.disable_tqdm:
            tqdm.write(f"All {self.uploads.done} tasks are on the Hub: {self.repo.url}")

    def _start(self, args: PGPTrainingArguments, new_run: bool) -> None:
        if self.uploads is not None:
            self.uploads.close()
        self.repo, self.folder = repo, folder = args.hub_repo(new_run), RunFolder(args.output_dir)
        self.uploads = Uploads(
            repo.create, lambda t: repo.put(t, folder.task(t)), token=args.hub_token, first=folder.first
        )
        atexit.unregister(self._report)
        atexit.register(self._report)

    def _add(self, args: PGPTrainingArguments, tasks: int) -> None:
        self.uploads.add(0 if args.hub_strategy == HubStrategy.END else tasks)

    def _report(self) -> None:
        finished = self.folder.finished_tasks()
        if self.uploads.done < finished:
            finish = hub.command(self.folder.root, self.repo)
            print(hub.missing(self.uploads, finished, finish), flush=True)
