"""Read an earlier run: its files are checked as a whole before a trainer takes anything over."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from .. import hub
from ..data.stored import Stored, from_tensors
from ..data.stream import TaskStream
from ..inference.adapters import expected_weights, read_adapter, read_weights
from ..inference.whole import load_whole
from ..methods import ContinualMethod, MethodState
from ..models import StreamModel, weights
from ..projection.config import ADDED
from ..report import card, figures
from ..runs.atomic import write_tensors
from ..runs.digests import AlteredFileError, Digests
from ..runs.folder import DESCRIPTION, EXEMPLARS, MANIFEST, RESULTS, RunFolder, config_name
from ..runs.reading import read_json, read_tensors
from ..runs.revision import Revision
from .evaluation import Recorded, References
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
        going_on: whether its settings may differ, since the run's tasks are finished.
    """

    def __init__(
        self,
        source: RunFolder,
        stream: TaskStream,
        model: PeftModel | PreTrainedModel,
        learner: StreamModel,
        method: ContinualMethod,
        results: StreamResults,
        going_on: bool = False,
    ) -> None:
        self.source, self.stream, self.model, self.learner = source, stream, model, learner
        self.method, self.results, self.going_on = method, results, going_on

    def load(self, t: int) -> LoadedTask:
        """Read and check the state after the 0-based task t.

        Raises:
            ValueError: files that are damaged, or belong to another stream, model, method or setting.
        """
        revision, results = self._revision(t), copy.deepcopy(self.results)
        tensors, bases = self._weights(revision), revision.bases()
        if isinstance(self.model, PeftModel):
            revision.check_backbone(self.model.get_base_model())
        if self.stream.is_open:  # a run lists the tasks so far
            results.num_tasks = (revision.manifest or {})["num_tasks"]
        try:
            results.load(revision.results or {}, going_on=self.going_on)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{revision.folder / RESULTS} lacks what a run needs to go on ({type(error).__name__}: {error})."
            ) from error
        state = self._method_state(revision)
        return LoadedTask(revision, tensors, bases, state, self._stored(revision, state), results)

    def _weights(self, revision: Revision) -> dict[str, Tensor]:
        """Read what the model has kept, which must have the names and shapes that this one has.

        What an open stream has added since is zero in the tensors of an earlier task.
        """
        expected = weights(self.model)
        if not revision.whole:
            if not self.stream.is_open or not isinstance(self.model, PeftModel):
                return read_weights(revision, expected)
            base = cast(PreTrainedModel, self.model.get_base_model())
            adapter = read_adapter(revision)
            before = expected_weights(base, adapter.config, adapter.class_names)
            return _enlarged(read_weights(revision, before), expected)
        tensors = load_whole(revision).state_dict()
        if self.stream.is_open:
            tensors = _enlarged(tensors, expected)
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
        self.stream.check_manifest(
            revision.manifest,
            gone=revision.tasks if self.method.stores_images else 0,
            tasks=t + 1 if self.stream.is_open else None,
        )
        projection = self.method.projection
        if projection is not None:
            _compare("projection", folder, {**ADDED, **read_json(folder / DESCRIPTION)}, projection.config.to_dict())
        kinds = [
            "a whole model" if whole else "an adapter"
            for whole in (revision.whole, not isinstance(self.model, PeftModel))
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{folder} holds {kinds[0]}, and this model is {kinds[1]}: continue with the same.")
        _compare("adapter", folder, {**_defaults(self.learner), **revision.config}, self.learner.settings())
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
        counts = [self.stream.num_images("train", t) for t in range(revision.tasks)]
        tensors = revision.exemplars()
        try:
            stored = from_tensors(tensors, method.exemplars(), counts)
            for t, images in stored.items():
                labels = {image.label for image in images.values() if image.label is not None}
                if unknown := sorted(labels - {*self.stream.tasks[t].classes}):
                    raise ValueError(f"it has images of class {unknown[0]} in task {t + 1}, which lacks it")
            return stored
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
                self._check_reference(path, j, last.tasks)
                tensors = _read_reference(path, self.stream.num_images("test", j), j)
                references.keep(j, tensors["features"], tensors.get("selected"))
                continue
            if not self.stream.has_test(j):
                continue
            try:
                then = loaded.weights if j == last.tasks - 1 else self._weights(self._earlier(last, j))
            except AlteredFileError:
                raise
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
                stacklevel=7,
            )
        return lost

    def _check_reference(self, path: Path, j: int, tasks: int) -> None:
        """Raise ValueError unless the features of the 0-based task j are as the run wrote them, as far as it noted that.

        Args:
            tasks: number of finished tasks.
        """
        t, last, beside = j, tasks - 1, RunFolder(path.parent.parent)  # whose first task may be a single revision's
        # a run that goes on from a single revision lacks the folders of earlier tasks, and the first one notes theirs
        while t < last and not beside.task(t).is_dir():
            t += 1
        digests = Digests.read(self.source.task(t) if t == last else beside.task(t))
        if digests is not None:
            digests.check_features(path, own=t == j)

    def _earlier(self, last: Revision, j: int) -> Revision:
        """Read the revision of the earlier task j; ValueError when there is none, or it is another run's."""
        revision = self._revision(j)
        rows = [
            [row[: j + 1] for row in (found.results or {})["accuracy_matrix"][: j + 1]] for found in (revision, last)
        ]
        if rows[0] != rows[1]:
            raise ValueError(f"{revision.folder} is another run's: its accuracies differ")
        return revision

    # ---- its files -----------------------------------------------------------------------------------------------

    def copy_to(self, folder: RunFolder, finished: int, references: References) -> None:
        """Copy the finished tasks that can be found to another run's folder, each whole or not at all.

        Their digests are made anew, since that folder has features of its own. A run of an earlier version has none, and
        gets none: its tasks are compared with those on the Hub.

        Raises:
            ValueError: the folder holds a task of another run.
        """
        last, first = Revision.read(self.source.task(finished - 1)), finished - 1
        while first > self.source.first:
            try:
                self._earlier(last, first - 1)
            except AlteredFileError:
                raise
            except (ValueError, EntryNotFoundError):  # reported with the references
                break
            first -= 1
        there = folder.tasks()  # where an earlier copy was interrupted
        for t in there:
            if t >= finished or not _same_results(self.source.task(t), folder.task(t)):
                raise ValueError(f"output_dir={folder.root} holds task-{t + 1} of another run: choose another folder.")
        folder.start_at(first)
        for t in references.features:
            if not (there and folder.features(t).exists()):
                write_tensors(folder.features(t), references.tensors(t))
        for t in range(first, finished):
            if t not in there:
                earlier = [folder.features(j) for j in range(first)] if t == first else []
                folder.publish(t, partial(_copy_task, self.source.task(t), folder.features(t), earlier))


def _enlarged(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the shapes of others that have grown out of them, with zeros for what was added."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        shape = expected[name].shape if name in expected else tensor.shape
        if tensor.shape != shape and tensor.ndim == len(shape):
            found[name] = tensor.new_zeros(shape)
            found[name][tuple(slice(length) for length in tensor.shape)] = tensor
    return found


def _same_results(a: Path, b: Path) -> bool:
    """Return whether two folders hold the same task, whose results have the digests of its other files."""
    return a.is_dir() and (a / RESULTS).read_bytes() == (b / RESULTS).read_bytes()


def check_method(method: ContinualMethod, saved: dict[str, Any], folder: Path) -> None:
    """Raise ValueError unless `method.json` names this method with these settings."""
    _compare("method", folder, saved, {"name": method.name})
    _compare("method", folder, {**ADDED, **saved["settings"]}, method.settings())


def _defaults(learner: StreamModel) -> dict[str, Any]:
    """Return what an adapter's settings are where a file of an earlier version lacks them, as PEFT reads it, too."""
    config = getattr(learner, "adapter_config", None)
    known = fields(config) if is_dataclass(config) else ()
    return {one.name: one.default for one in known if one.default is not MISSING}


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


def _copy_task(source: Path, features: Path, earlier: list[Path], folder: Path) -> None:
    """Copy the files of the contract; card and figures are made anew where they are missing.

    Args:
        source: folder of the task.
        features, earlier: files with those of the task's test images and of earlier tasks', whose digests are noted here.
        folder: to fill.

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
        figures.save_figures(results, folder / "figures", manifest)
        card.save_card(folder / "README.md", results, manifest, adapter, description)
    if (written := Digests.read(source)) is not None:
        for name in written.checked:
            if (folder / name).exists():
                written.check(name, folder / name)
        Digests.of(folder, features, earlier).write()
