"""Measure a stream under the evaluation rules: accuracies, drift, changed selections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction
from transformers.utils.generic import ModelOutput

from ..data.images import CachedQueries
from ..data.scenarios import SCENARIOS
from ..data.stream import TaskImages, TaskStream
from ..heads import keep_classes
from ..heads.calibration import calibration_error
from ..methods import ContinualMethod
from ..models import KeepsClassStatistics, SelectsPrompts, StreamModel
from .results import LARGE_POOL, StreamResults, Usage, changed_share, percent, relative_drift


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of right predictions in percent, as a `Trainer`'s `compute_metrics`."""
    return {"accuracy": percent(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))}


def test_sets(stream: TaskStream, tasks: int) -> dict[str, Dataset]:
    """Return the test images of the first tasks as `eval_dataset`, as far as they are here."""
    return {f"task_{j + 1}": stream.test(j) for j in range(tasks) if stream.has_test(j)}


class Recorded(NamedTuple):
    """The model's view of a task's test images.

    Attributes:
        labels: `(N,)`.
        logits: `(N, C)`, those of classes that may not win at minus infinity.
        features: the head's inputs, `(N, d)`.
        linear: the linear head's logits, where a statistics head classifies; else None.
        selected: pool entries, `(N, k)`; None where nothing is selected.
    """

    labels: np.ndarray
    logits: np.ndarray
    features: np.ndarray
    linear: np.ndarray | None = None
    selected: np.ndarray | None = None


@dataclass
class References:
    """The model's view of each finished task's test images as its task ended, against which drift is measured.

    Attributes:
        features: by task, `(N, d)`.
        selected: by task, `(N, k)`; empty where nothing is selected.
    """

    features: dict[int, np.ndarray] = field(default_factory=dict)
    selected: dict[int, np.ndarray] = field(default_factory=dict)

    def keep(self, j: int, features: np.ndarray, selected: np.ndarray | None = None) -> None:
        """Keep how the test images of task j are seen as it ends."""
        self.features[j] = features
        if selected is not None:
            self.selected[j] = selected

    def tensors(self, j: int) -> dict[str, Tensor]:
        """Return the content of task j's features file."""
        kept = {"features": self.features, "selected": self.selected}
        return {name: torch.from_numpy(np.ascontiguousarray(of[j])) for name, of in kept.items() if j in of}


def allowed_classes(
    stream: TaskStream, after: int | None, mask: str, tasks: Tensor | None
) -> list[int] | Tensor | None:
    """Return the classes that predictions may take, as `heads.keep_classes` takes them.

    Class-incremental and online: all classes seen, and no task id enters. Task-incremental: each image's own task's.

    Args:
        after: the last task trained, 0-based; None before the first.
        mask: `eval_mask`: "seen", or "none" for all classes.
        tasks: 0-based task of each image, `(B,)`, where it is known.

    Raises:
        ValueError: a task that the stream does not have.
    """
    if SCENARIOS[stream.scenario].task_known and tasks is not None:
        if not 0 <= int(tasks.min()) <= int(tasks.max()) < stream.num_tasks:
            raise ValueError(
                f"images of tasks {sorted(set(tasks.tolist()))}: expected 0..{stream.num_tasks - 1}, each image's task in "
                "the stream, by which its classes are chosen."
            )
        own = torch.zeros(stream.num_tasks, stream.num_classes, dtype=torch.bool, device=tasks.device)
        for task in stream.tasks:
            own[task.index, stream.allowed_classes(task.index, task.index)] = True
        return own[tasks]
    return None if mask == "none" or after is None else stream.seen_classes(after)


class Scorer:
    """Turn a model's outputs on test images into logits under the evaluation rules.

    Attributes:
        task: 0-based task of the images in evaluation, by their dataset; None where they are not a stream's.
        coming: the task of each batch to come, where a dataset has batches of several tasks.
        dtype: precision of what the head has read last.
        recording: True while a stream is evaluated: scores then come with what [`Recorded`] has besides.
    """

    def __init__(self, stream: TaskStream, method: ContinualMethod, mask: str) -> None:
        self.stream, self.method, self.mask = stream, method, mask
        self.task: int | None = None
        self.recording = False
        self.coming: Iterator[int] = iter(())
        self.dtype = torch.float32
        self._seen: tuple[StreamModel, SelectsPrompts | None, KeepsClassStatistics | None] | None = None

    def _kinds(self, model: StreamModel) -> tuple[SelectsPrompts | None, KeepsClassStatistics | None]:
        """Return the model as what else it is, which Python finds out member by member: once, and not for each batch."""
        if self._seen is None or self._seen[0] is not model:
            selecting = model if isinstance(model, SelectsPrompts) else None
            self._seen = model, selecting, model if isinstance(model, KeepsClassStatistics) else None
        return self._seen[1:]

    def expect(self, images: object) -> None:
        """Note the task of the next images, which the user's own collator may not provide."""
        images = images.images if isinstance(images, CachedQueries) else images
        self.coming = iter(getattr(images, "tasks", list)())
        self.task = images.task if isinstance(images, TaskImages) else None

    @torch.no_grad()
    def score(
        self,
        model: StreamModel,
        inputs: Mapping[str, Any],
        output: ModelOutput,
        features: Tensor,
        tasks: Tensor | None,
        after: int | None,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> dict[str, Tensor]:
        """Return the logits of one batch, and while recording the rest of [`Recorded`].

        Args:
            inputs: what the model was given.
            output: what it made of them.
            features: what the head has read, `(B, d)`.
            tasks: 0-based task of each image, `(B,)`; None where the batch does not tell.
            after: the last task trained, 0-based; None before the first.
            autocast: the precision that the model runs in.
        """
        self.task = next(self.coming, self.task)
        if tasks is None and self.task is not None:
            tasks = torch.full((len(features),), self.task, device=features.device)
        allowed = allowed_classes(self.stream, after, self.mask, tasks)
        logits = self.method.predict_logits(model, inputs, model.class_logits(output).float(), features)
        if not self.recording:
            return {"logits": keep_classes(logits, allowed)}
        self.dtype = features.dtype
        found = self._recorded(model, logits, features, allowed, autocast)
        selecting, _ = self._kinds(model)
        if selecting is not None and selecting.selected_prompts is not None:
            found["selected"] = selecting.selected_prompts
        return found

    @torch.no_grad()
    def score_features(
        self,
        model: StreamModel,
        scores: Callable[[Tensor], Tensor],
        features: Tensor,
        task: int,
        after: int | None,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> dict[str, Tensor]:
        """Return what `score` would of a batch whose head input is known.

        Args:
            scores: the model's own scores of it.
            features: what the head reads, `(B, d)`.
            task: 0-based task of the images.
            after, autocast: as `score` has them.
        """
        features = features.to(next(iter(model.trainable().values())).device)
        allowed = allowed_classes(
            self.stream, after, self.mask, torch.full((len(features),), task).to(features.device)
        )
        with autocast():
            logits = scores(features).float()
        return self._recorded(model, self.method.adjust_logits(logits, features), features, allowed, autocast)

    def _recorded(
        self,
        model: StreamModel,
        logits: Tensor,
        features: Tensor,
        allowed: list[int] | Tensor | None,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> dict[str, Tensor]:
        found = {"logits": keep_classes(logits, allowed), "features": features.float()}
        _, keeping = self._kinds(model)
        if keeping is not None and keeping.uses_statistics_head:
            with autocast():
                found["linear"] = keep_classes(keeping.linear_logits(features).float(), allowed)
        return found


def measure(
    results: StreamResults,
    references: References,
    t: int,
    record: Callable[[Sequence[int]], Iterator[Recorded]],
    pool_size: int,
    stream: TaskStream,
    temperature: float | None = None,
) -> None:
    """Evaluate all tasks up to the 0-based task t, which has just ended, and take the figures into `results`.

    Args:
        references: receives those of task t.
        record: predicts the test images of tasks; not asked for a task that has none here, whose figures are None.
        pool_size: number of entries that images select from, if they do.
        stream: the tasks.
        temperature: of scores that are calibrated by one; None for others.
    """
    tasks, sure = [], _Confidence(temperature)
    recorded = record([j for j in range(t + 1) if stream.has_test(j)])
    for j in range(t + 1):
        if not stream.has_test(j):
            tasks.append(_TaskFigures())
            continue
        found = next(recorded)
        sure.add(found)
        if j == t:
            references.keep(t, found.features, found.selected)
        elif j >= results.first and j not in references.features:
            results.drift_lacks = sorted({*results.drift_lacks, j})
        compared = results.first <= j < t and j not in results.drift_lacks
        tasks.append(_TaskFigures.of(found, stream.tasks[j].classes, pool_size, references if compared else None, j))
    _take(results, tasks, t - results.first)
    results.calibration_error = sure.errors()


class _Confidence:
    """Collect the scores of predicted classes, before and after they are calibrated.

    Args:
        temperature: that logits are divided by; None to collect nothing.
    """

    def __init__(self, temperature: float | None) -> None:
        self.temperature = temperature
        self._scores: list[Tensor] = []
        self._right: list[Tensor] = []

    def add(self, found: Recorded) -> None:
        """Add a task's test images."""
        if self.temperature is None:
            return
        logits = torch.from_numpy(found.logits).double()
        scores = [(logits / divisor).softmax(-1).amax(-1) for divisor in (1.0, self.temperature)]
        self._scores.append(torch.stack(scores))
        self._right.append(logits.argmax(-1) == torch.from_numpy(found.labels))

    def errors(self) -> dict[str, float] | None:
        """Return the calibration errors over all of them; None without any."""
        if not self._right:
            return None
        (before, after), right = torch.cat(self._scores, 1), torch.cat(self._right)
        return {"before": calibration_error(before, right), "after": calibration_error(after, right)}


@dataclass
class _TaskFigures:
    """Hold the figures of one task's test images; None for what was not measured.

    Attributes:
        accuracy, within, linear, linear_within: in percent, as in [`StreamResults`].
        usage: how often each pool entry was selected, see [`StreamResults`].
        drift, changed: since the task ended.
    """

    accuracy: float | None = None
    within: float | None = None
    linear: float | None = None
    linear_within: float | None = None
    usage: Usage | None = None
    drift: float | None = None
    changed: float | None = None

    @classmethod
    def of(
        cls, found: Recorded, classes: Sequence[int], pool_size: int, references: References | None, j: int
    ) -> _TaskFigures:
        """Return the figures of the 0-based task j with these classes; None as references compares with nothing."""
        own = np.asarray(classes)
        figures = cls(percent(found.logits, found.labels), _percent_within(found.logits, found.labels, own))
        if found.linear is not None:
            figures.linear = percent(found.linear, found.labels)
            figures.linear_within = _percent_within(found.linear, found.labels, own)
        if found.selected is not None:
            figures.usage = _count_selections(found.selected, pool_size)
        if references is not None:
            figures.drift = relative_drift(references.features[j], found.features)
            if found.selected is not None:
                figures.changed = changed_share(references.selected[j], found.selected)
        return figures


def _take(results: StreamResults, tasks: Sequence[_TaskFigures], at: int) -> None:
    """Take the figures of all tasks seen into the row with index `at` of the results, which is their last then."""
    last = results.first + at
    results.matrix[at:] = [[each.accuracy for each in tasks]]
    if results.within is not None:
        results.within.take(last, [each.within for each in tasks])
    if results.head == "statistics":
        results.linear.take(last, [each.linear for each in tasks])
        if results.linear_within is not None:
            results.linear_within.take(last, [each.linear_within for each in tasks])
    results.drift[at:] = [_mean([each.drift for each in tasks], at)]
    selects = any(each.usage is not None for each in tasks)
    results.usage = [each.usage for each in tasks] if selects else None
    if selects or results.changed[:at]:  # rows without a measured task have nothing that was selected
        lacking = [_mean([], i) for i in range(len(results.changed), at)]
        results.changed[at:] = [*lacking, _mean([each.changed for each in tasks], at)]
    else:
        results.changed[at:] = []


def _count_selections(selected: np.ndarray, pool_size: int) -> Usage:
    """Return how often each pool entry was selected; of a large pool, those that were."""
    counts: list[int] = np.bincount(selected.ravel(), minlength=pool_size).tolist()
    if pool_size <= LARGE_POOL:
        return counts
    return {str(entry): count for entry, count in enumerate(counts) if count}


def _mean(values: Sequence[float | None], at: int) -> float | None:
    """Return the mean of what is not None; without any, 0.0 for the first row, before which there was no task."""
    known = [value for value in values if value is not None]
    if not known:
        return None if at else 0.0
    return float(np.mean(known))


def _percent_within(logits: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> float:
    """Return the accuracy in percent where only `classes` compete, among them all labels."""
    return float(100 * np.mean(classes[logits[:, classes].argmax(-1)] == labels))


def summary_logs(results: StreamResults, prefix: str = "eval") -> dict[str, float]:
    """Return what is logged after the evaluation of a stream, accuracies in percent, under names with this prefix."""
    content = results.to_dict()
    changed = {f"{prefix}_changed_selections": results.changed[-1]} if results.changed else {}
    kept = {f"{prefix}_forgetting": content["forgetting"], f"{prefix}_drift": results.drift[-1], **changed}
    logs = {
        **{f"{prefix}_task_{j + 1}_accuracy": value for j, value in enumerate(results.matrix[-1])},
        f"{prefix}_average_accuracy": content["average_accuracy"],
        **({} if results.first else kept),  # nothing to compare with where all tasks were learned as one
        f"{prefix}_projection_rank": results.rank[-1] if results.rank else 0,
    }
    return {name: value for name, value in logs.items() if value is not None}  # None was not measured
