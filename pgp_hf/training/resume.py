"""How a run goes on: from its own folder, from a single revision, from the Hub."""

from __future__ import annotations

import copy
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from huggingface_hub.errors import EntryNotFoundError
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from .. import hub
from ..data.stream import TaskStream
from ..projection import Projection
from ..report import card as model_card
from ..report import figures as plots
from ..runs.atomic import write_json
from ..runs.folder import ADAPTER_CONFIG, CONTINUED, DESCRIPTION, MANIFEST, RESULTS, RunFolder
from ..runs.open import open_run
from ..runs.reading import read_json, read_tensors
from ..runs.revision import Revision
from .results import StreamResults


class ContinuedRuns:
    """The part of `PGPTrainer` that reads what an earlier run left."""

    folder: RunFolder
    results: StreamResults
    projection: Projection
    stream: TaskStream
    task: int | None
    _interrupted: bool
    _features: dict[int, np.ndarray]
    _selected: dict[int, np.ndarray]

    def _start(self, resume: str | bool | None) -> tuple[int, str | None]:
        """Index of the first task to train, and the checkpoint to enter it by."""
        if self.task is not None and not resume:
            state, ways = (
                f"has trained {self.task + 1} tasks already",
                "train(resume_from_checkpoint=True) or train_task",
            )
            if self._interrupted:
                state, ways = f"has begun task {self.task + 1} already", "train(resume_from_checkpoint=True)"
            raise ValueError(f"this trainer {state}: go on with {ways}, or make a new model and a new trainer.")
        if not resume:
            if self.is_world_process_zero():
                if self.args.overwrite_output_dir:
                    self.folder.clear()
                else:
                    self.folder.check_unused()
            self.accelerator.wait_for_everyone()
            return 0, None
        with self.args.main_process_first(desc="fetching the run"):  # it may be on the Hub
            source = open_run(self.folder.root if resume is True else resume, token=self.args.hub_token)
        elsewhere = source.root.resolve() != self.folder.root.resolve()
        if elsewhere and source.root.resolve().is_relative_to(self.folder.root.resolve()):
            raise ValueError(f"output_dir={self.folder.root} holds {source.root}: continue it in another output_dir.")
        if elsewhere and not self.args.overwrite_output_dir and self.is_world_process_zero():
            self.folder.check_unused()
        finished = source.finished_tasks()
        if finished:
            if not self.args.reinit_optimizer and finished < self.stream.num_tasks:
                raise ValueError(
                    "reinit_optimizer=False carries the optimizer's state from task to task, which finished tasks do "
                    "not keep: such a run cannot be resumed exactly. Start anew, or use reinit_optimizer=True."
                )
            self._load_task(source, finished - 1)
        checkpoint = source.last_checkpoint(finished) if finished < self.stream.num_tasks else None
        if not finished and self._interrupted:
            if checkpoint is None:
                raise ValueError(
                    f"this trainer has begun its first task and {source.root} holds no checkpoint of it: make a new model "
                    "and a new trainer."
                )
            self._forget_first_task()
        self._interrupted = False
        if self.is_world_process_zero():
            if elsewhere and self.args.overwrite_output_dir:
                self.folder.clear()
            if finished and (elsewhere or source.single):
                self._adopt(source, finished)
            if finished:
                self.folder.promote(finished - 1)  # a run may have died before it came to that
        self.accelerator.wait_for_everyone()
        if not finished and checkpoint is None:
            warnings.warn(f"{source.root} holds no run to resume: starting with the first task.", stacklevel=3)
        return finished, None if checkpoint is None else str(checkpoint)

    # ---- the state -----------------------------------------------------------------------------------------------

    def _forget_first_task(self) -> None:
        """Go back to before the first task, which this very trainer has begun; a checkpoint has the parameters."""
        self.projection.load_state({}, self.projection.config.to_dict())
        self.optimizer = self.lr_scheduler = self.task = None
        blank = {name: [] for name in ("matrix", "linear_matrix", "drift", "changed", "rank")}
        self.results = replace(self.results, usage=None, **blank)

    def _load_task(self, source: RunFolder, t: int) -> None:
        """Take over the state that the run in `source` had when task t ended; everything is checked before."""
        revision = self._revision(source, t)
        model, results = self.accelerator.unwrap_model(self.model), copy.deepcopy(self.results)
        expected = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
        weights, (bases, description) = revision.weights(expected), revision.bases()
        revision.check_backbone(self.tuner.model)
        try:
            results.load(revision.results)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{revision.folder / RESULTS} lacks what a run needs to go on ({type(error).__name__}: {error})."
            ) from error
        self.projection.load_state(bases, description)
        self.results = results
        self.eval_dataset = self._test_sets(t)
        self._load_references(source, revision, expected, weights)
        self._put(weights, t)

    def _revision(self, source: RunFolder, t: int) -> Revision:
        """The revision of task t, found to have this stream, this projection and these settings.

        Raises:
            ValueError: it has not, or is damaged.
        """
        folder = source.task(t)
        revision = Revision.read(folder, f"task-{t + 1}")
        if revision.manifest is None:
            raise ValueError(f"{folder} is an adapter without a run: there is nothing to continue.")
        self.stream.check_manifest(revision.manifest)
        for saved, settings, what in (
            (read_json(folder / DESCRIPTION), self.projection.config.to_dict(), "projection"),
            (revision.adapter, self.tuner.adapter_config.settings(), "adapter"),
        ):
            for name, value in settings.items():
                if saved.get(name) != value:
                    raise ValueError(
                        f"the {what} in {folder} has {name}={saved.get(name)!r}, this one {value!r}: continue with the same."
                    )
        return revision

    def _put(self, weights: dict[str, Tensor], t: int) -> None:
        """Give the model the adapter that it had when task t ended."""
        model = self.accelerator.unwrap_model(self.model)
        set_peft_model_state_dict(model, weights, adapter_name=model.active_adapter)
        self.task = t
        self.tuner.resume_after(t)

    # ---- what drift is measured against --------------------------------------------------------------------------

    def _load_references(
        self, source: RunFolder, last: Revision, expected: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> None:
        """The test images of finished tasks, as they were when their task ended.

        Read from `features/`; where that is not at hand, as in a revision from the Hub, computed again with the adapter
        of that time. Drift leaves out the tasks for which there is neither.
        """
        self._features, self._selected = {}, {}
        lost = []
        for j in range(last.tasks):
            if source.features(j).is_file():
                self._read_reference(source.features(j), j)
                continue
            try:
                then = weights if j == last.tasks - 1 else self._earlier(source, last, j).weights(expected)
            except (ValueError, EntryNotFoundError):
                lost.append(j)
                continue
            self._put(then, j)
            self._keep_reference(j, self._record(j).predictions)
        if news := sorted({*lost} - {*self.results.drift_lacks}):
            warnings.warn(
                f"{source.root}: of tasks {', '.join(str(j + 1) for j in news)} neither features/ nor the revision is at "
                'hand, so drift and changed selections leave them out from now on. Continue from "owner/name@task-k" on '
                "the Hub, or from a folder beside task-1, task-2, ... to have them measured.",
                stacklevel=5,
            )
        self.results.drift_lacks = sorted({*self.results.drift_lacks, *lost})

    def _earlier(self, source: RunFolder, last: Revision, j: int) -> Revision:
        """The revision of the earlier task j; ValueError when it is not at hand, or another run's."""
        revision = self._revision(source, j)
        rows = [found.results["accuracy_matrix"][: j + 1] for found in (revision, last)]
        if rows[0] != rows[1]:
            raise ValueError(f"{revision.folder} is another run's: its accuracies differ")
        return revision

    def _read_reference(self, path: Path, j: int) -> None:
        tensors, images = read_tensors(path), len(self.stream.test(j))
        if "features" not in tensors or any(tensor.ndim != 2 or len(tensor) != images for tensor in tensors.values()):
            raise ValueError(f"{path} does not hold a row for each of the {images} test images of task {j + 1}.")
        self._keep_reference(j, {name: tensor.numpy() for name, tensor in tensors.items()})

    # ---- its files -----------------------------------------------------------------------------------------------

    def _adopt(self, source: RunFolder, finished: int) -> None:
        """Copy the finished tasks that are at hand, each whole or not at all."""
        last, first = Revision.read(source.task(finished - 1)), finished - 1
        while first > source.first:
            try:
                self._earlier(source, last, first - 1)
            except (ValueError, EntryNotFoundError):  # reported with the references
                break
            first -= 1
        if first:
            write_json(self.folder.root / CONTINUED, {"first": first})
        for t in range(first, finished):
            self.folder.publish(t, lambda folder, t=t: _copy_task(source.task(t), folder))
        for t in self._features:
            self._write_reference(t)


def _copy_task(source: Path, folder: Path) -> None:
    """Copy the files of the contract; card and figures are made anew where they are missing.

    Raises:
        ValueError: a link out of the folder, which would draw a file of this machine into the run.
    """
    cache = source.resolve().parent.parent / "blobs"  # the Hub's cache is made of links
    for path in hub.listed(source):
        file = (source / path).resolve()
        if not file.is_relative_to(source.resolve()) and file.parent != cache:
            raise ValueError(f"{source / path} is a link to {file}, out of its folder: put the file itself there.")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / path)
    if not (folder / "README.md").exists():
        names = (RESULTS, MANIFEST, ADAPTER_CONFIG, DESCRIPTION)
        contents = [read_json(folder / name) for name in names]
        plots.save_figures(contents[0], folder / "figures")
        model_card.save_card(folder / "README.md", *contents)
