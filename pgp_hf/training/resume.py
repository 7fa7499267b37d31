"""Resuming: an earlier run's files are checked as a whole before a trainer takes anything over."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from .. import hub
from ..data.stored import Stored, from_tensors
from ..data.stream import TaskStream
from ..inference.whole import load_whole
from ..methods import ContinualMethod, MethodState
from ..models import StreamModel, load_weights, weights
from ..report import card, figures
from ..runs.atomic import write_tensors
from ..runs.folder import DESCRIPTION, EXEMPLARS, MANIFEST, RESULTS, RunFolder, config_name
from ..runs.open import open_run
from ..runs.reading import read_json, read_tensors
from ..runs.revision import Revision, read_method
from .arguments import PGPTrainingArguments
from .evaluation import Recorded, References
from .progress import Progress
from .results import StreamResults


class LoadedTask(NamedTuple):
    """The state that a run had when a task ended, read and checked.

    Attributes:
        weights: of the adapter or the whole model, see `pgp_hf.models.weights`.
        bases: of the projection, and their description.
        method: what the method remembers; None in a run that was written before methods had files of their own.
        stored: images of its exemplars, where the run keeps images.
    """

    revision: Revision
    weights: dict[str, Tensor]
    bases: tuple[dict[str, Tensor], dict[str, Any]]
    method: MethodState | None
    stored: Stored
    results: StreamResults


class EarlierRun:
    """An earlier run, compared with the stream, the model and the method that are to continue it.

    Args:
        source: its folder, or a single revision of it.
        model: the whole model; not changed here.
        learner: the `StreamModel` inside it.
        results: of the trainer that goes on.
    """

    def __init__(
        self,
        source: RunFolder,
        stream: TaskStream,
        model: PeftModel | PreTrainedModel,
        learner: StreamModel,
        method: ContinualMethod,
        results: StreamResults,
    ) -> None:
        self.source, self.stream, self.model, self.learner = source, stream, model, learner
        self.method, self.results = method, results

    def load(self, t: int) -> LoadedTask:
        """Read and check the state after the 0-based task t.

        Raises:
            ValueError: files that are damaged, or belong to another stream, model, method or setting.
        """
        revision, results = self._revision(t), copy.deepcopy(self.results)
        tensors, bases = self._weights(revision), revision.bases()
        if isinstance(self.model, PeftModel):
            revision.check_backbone(self.model.get_base_model())
        try:
            results.load(revision.results or {})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{revision.folder / RESULTS} lacks what a run needs to go on ({type(error).__name__}: {error})."
            ) from error
        state = self._method_state(revision)
        return LoadedTask(revision, tensors, bases, state, self._stored(revision, state), results)

    def _weights(self, revision: Revision) -> dict[str, Tensor]:
        """Read what the model has kept, which must have the names and shapes that this one has."""
        expected = weights(self.model)
        if not revision.whole:
            return revision.weights(expected)
        tensors = load_whole(revision).state_dict()
        for name in sorted(expected.keys() | tensors.keys()):
            here, there = (found[name].shape if name in found else None for found in (expected, tensors))
            if here != there:
                raise ValueError(
                    f"the model in {revision.folder} is another kind than this one: {name!r} has shape {there} there, "
                    f"{here} here. Continue with the same backbone and head."
                )
        return tensors

    def _revision(self, t: int) -> Revision:
        """Read the revision of task t, which must have this stream, this projection and these settings."""
        folder = self.source.task(t)
        revision = Revision.read(folder, f"task-{t + 1}")
        if revision.manifest is None:
            raise ValueError(f"{folder} is an adapter without a run: there is nothing to continue.")
        self.stream.check_manifest(revision.manifest, gone=revision.tasks if self.method.stores_images else 0)
        projection = self.method.projection
        if projection is not None:
            _compare("projection", folder, read_json(folder / DESCRIPTION), projection.config.to_dict())
        kinds = [
            "a whole model" if whole else "an adapter"
            for whole in (revision.whole, not isinstance(self.model, PeftModel))
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{folder} holds {kinds[0]}, and this model is {kinds[1]}: continue with the same.")
        _compare("adapter", folder, revision.config, self.learner.settings())
        return revision

    def _method_state(self, revision: Revision) -> MethodState | None:
        """Return what the method remembers, if it is this method with these settings."""
        found = revision.method()
        if found is None:
            if self.method.name != "projected_prompts":
                raise ValueError(
                    f"{revision.folder} does not say by which method it was trained: only projected prompts can be continued."
                )
            return None
        check_method(self.method, found[1], revision.folder)
        return MethodState(found[0], found[1].get("state", {}))

    def _stored(self, revision: Revision, state: MethodState | None) -> Stored:
        """Read the images that the method keeps in this state, if the run has stored them."""
        if state is None or not self.method.stores_images:
            return {}
        method = type(self.method)(self.method.config)  # the trainer's own must not change before all is checked
        method.load_state(state)
        counts = [len(self.stream.train(t)) for t in range(revision.tasks)]
        tensors = revision.exemplars()
        try:
            return from_tensors(tensors, method.exemplars(), counts)
        except ValueError as error:
            raise ValueError(
                f"{revision.folder / EXEMPLARS} does not fit the method's memory: {error}. Fetch the folder again."
            ) from error

    # ---- what drift is measured against --------------------------------------------------------------------------

    def load_references(
        self,
        loaded: LoadedTask,
        references: References,
        record: Callable[[dict[str, Tensor], int], Recorded],
    ) -> list[int]:
        """Restore the model's view of each finished task's test images as its task ended.

        They are read from `features/`. Where that is missing, as for a revision from the Hub, they are computed again
        with the adapter of that time.

        Args:
            record: predicts a task's test images with an adapter's weights of that time.

        Returns:
            Tasks for which neither is available, which drift leaves out.
        """
        lost, last = [], loaded.revision
        for j in range(self.results.first, last.tasks):
            path = self.source.features(j)
            if path.is_file():
                tensors = _read_reference(path, len(self.stream.test(j)), j)
                references.keep(j, tensors["features"], tensors.get("selected"))
                continue
            try:
                then = loaded.weights if j == last.tasks - 1 else self._weights(self._earlier(last, j))
            except (ValueError, EntryNotFoundError):
                lost.append(j)
                continue
            found = record(then, j)
            references.keep(j, found.features, found.selected)
        if new := sorted({*lost} - {*loaded.results.drift_lacks}):
            warnings.warn(
                f"{self.source.root}: of tasks {', '.join(str(j + 1) for j in new)} neither features/ nor the revision is "
                'there, so drift and changed selections leave them out from now on. Continue from "owner/name@task-k" on '
                "the Hub, or from a folder next to task-1, task-2, ... to have them measured.",
                stacklevel=6,
            )
        return lost

    def _earlier(self, last: Revision, j: int) -> Revision:
        """Read the revision of the earlier task j; ValueError when there is none, or it is another run's."""
        revision = self._revision(j)
        rows = [(found.results or {})["accuracy_matrix"][: j + 1] for found in (revision, last)]
        if rows[0] != rows[1]:
            raise ValueError(f"{revision.folder} is another run's: its accuracies differ")
        return revision

    # ---- its files -----------------------------------------------------------------------------------------------

    def copy_to(self, folder: RunFolder, finished: int) -> None:
        """Copy the finished tasks that can be found to another run's folder, each whole or not at all."""
        last, first = Revision.read(self.source.task(finished - 1)), finished - 1
        while first > self.source.first:
            try:
                self._earlier(last, first - 1)
            except (ValueError, EntryNotFoundError):  # reported with the references
                break
            first -= 1
        folder.start_at(first)
        for t in range(first, finished):
            folder.publish(t, partial(_copy_task, self.source.task(t)))


def start_new(args: PGPTrainingArguments, progress: Progress, folder: RunFolder) -> None:
    """Prepare the folder of a new run.

    Raises:
        ValueError: this trainer has begun a run, or the folder holds an earlier one.
    """
    progress.check_new()
    if args.process_index == 0:
        if args.overwrite_output_dir:
            folder.clear()
        else:
            folder.check_unused()


@dataclass(frozen=True)
class Resumer:
    """Load an earlier run into a trainer, which hands over whatever that changes.

    Attributes:
        model, learner: the whole model, and the `StreamModel` inside it.
        folder: the trainer's own.
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
        if checkpoint is not None and (found := read_method(checkpoint)) is not None:
            check_method(self.method, found[1], checkpoint)
        earlier = EarlierRun(source, self.stream, self.model, self.learner, self.method, progress.results)
        if finished:
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
        if not finished and checkpoint is None:
            warnings.warn(f"{source.root} holds no run to resume: starting with the first task.", stacklevel=4)
        return finished or progress.results.first, checkpoint

    def _elsewhere(self, source: RunFolder) -> bool:
        return source.root.resolve() != self.folder.root.resolve()

    def _find(self, where: str | bool) -> RunFolder:
        """Find the run, and check that it can be continued in this folder."""
        with self.args.main_process_first(desc="fetching the run"):  # it may be on the Hub
            source = open_run(self.folder.root if where is True else str(where), token=self.args.hub_token)
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

    def _take_over(self, earlier: EarlierRun, t: int) -> None:
        """Take over the state that the run had when the 0-based task t ended; all of it is checked before."""
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
            earlier.copy_to(self.folder, finished)
            references = self.progress.references
            for t in references.features:
                write_tensors(self.folder.features(t), references.tensors(t))
        if finished:
            self.folder.promote(finished - 1)  # the run may have died before doing so


def check_method(method: ContinualMethod, saved: dict[str, Any], folder: Path) -> None:
    """Raise ValueError unless `method.json` names this method with these settings."""
    _compare("method", folder, saved, {"name": method.name})
    _compare("method", folder, saved["settings"], method.settings())


def _compare(what: str, folder: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise ValueError at the first setting in which an earlier run differs."""
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the {what} in {folder} has {name}={saved.get(name)!r}, this one {value!r}: continue with the same."
            )


def _read_reference(path: Path, images: int, j: int) -> dict[str, np.ndarray]:
    tensors = read_tensors(path)
    if "features" not in tensors or any(tensor.ndim != 2 or len(tensor) != images for tensor in tensors.values()):
        raise ValueError(f"{path} does not hold a row for each of the {images} test images of task {j + 1}.")
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _copy_task(source: Path, folder: Path) -> None:
    """Copy the files of the contract; card and figures are made anew where they are missing.

    Raises:
        ValueError: a link that leaves the folder, which would copy an unrelated local file into the run.
    """
    cache = source.resolve().parent.parent / "blobs"  # the Hub's cache is made of links
    for path in hub.listed(source, exemplars=True):
        file = (source / path).resolve()
        if not file.is_relative_to(source.resolve()) and file.parent != cache:
            raise ValueError(
                f"{source / path} is a link to {file}, outside its folder: replace it by the file itself."
            )
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / path)
    if not (folder / "README.md").exists():
        results, manifest, adapter, description = (
            read_json(folder / name) for name in (RESULTS, MANIFEST, config_name(folder), DESCRIPTION)
        )
        figures.save_figures(results, folder / "figures")
        card.save_card(folder / "README.md", results, manifest, adapter, description)
