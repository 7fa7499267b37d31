"""Measuring a stream: predictions under the evaluation rules, features, drift, and the results file's content."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from . import metrics
from .heads import keep_classes
from .images import CachedQueries
from .stream import TaskStream


def relative_drift(before: np.ndarray, after: np.ndarray) -> float:
    """Mean over images of `|f_i(x) - f_j(x)| / |f_j(x)|` for features `(N, d)` (the poster's Eq. 2, measured)."""
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    norms = np.linalg.norm(before, axis=-1)
    return float(np.mean(np.linalg.norm(after - before, axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)))


def changed_share(before: np.ndarray, after: np.ndarray) -> float:
    """Share of images whose set of selected pool entries `(N, k)` differs."""
    return float(np.mean((np.sort(before, axis=-1) != np.sort(after, axis=-1)).any(-1)))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": _percent(prediction.predictions, prediction.label_ids)}


def _percent(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(100 * np.mean(logits.argmax(-1) == labels))


SUMMARY = (
    "average_accuracy",
    "forgetting",
    "forgetting_clipped",
    "backward_transfer",
    "learning_accuracy",
    "per_task_average_accuracy",
)


@dataclass
class StreamResults:
    """What a run has measured so far; `to_dict` is the content of `results.json`.

    Attributes:
        matrix: accuracies in percent of the chosen head, a row per finished task; row i has i + 1 entries.
        linear_matrix: the same of the linear head beside a statistics head, else empty.
        drift, rank: one value per finished task.
        changed: share of old test images with other pool entries than when their task ended, one value per finished
            task; empty where nothing is selected.
        usage: per seen task, how often its test images selected each pool entry, after the last finished task.
        drift_lacks: tasks that drift and changed selections leave out, because the run was continued from a single
            revision; 0-based, usually none.
        seconds: wall time by activity, summed over tasks.
        images_trained: training images seen, with repetitions.
    """

    method: str
    projection: str
    head: str
    scenario: str
    num_tasks: int
    seed: int
    eval_mask: str
    batchwise_prompt: bool
    compensate_drift: bool = False
    matrix: list[list[float]] = field(default_factory=list)
    linear_matrix: list[list[float]] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    usage: list[list[int]] | None = None
    drift_lacks: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "statistics": 0.0, "evaluation": 0.0})
    images_trained: int = 0

    def to_dict(self) -> dict[str, Any]:
        results = {
            "method": self.method,
            "projection": self.projection,
            "head": self.head,
            "scenario": self.scenario,
            "num_tasks": self.num_tasks,
            **self._accuracies(self.matrix),
            "drift": self.drift,
            "projection_rank": self.rank,
            "train_images_per_second": self.images_trained / max(self.seconds["train"], 1e-9),
            "images_trained": self.images_trained,
            "seconds": self.seconds,
            "eval_mask": self.eval_mask,
            "batchwise_prompt": self.batchwise_prompt,
            "seed": self.seed,
            "versions": versions(),
        }
        if self.changed:
            results["changed_selections"] = self.changed
        if self.usage is not None:
            results["prompt_usage"] = self.usage
        if self.compensate_drift:
            results["compensate_drift"] = True
        if self.drift_lacks:
            results["drift_lacks"] = self.drift_lacks
        if self.head == "statistics":
            results["heads"] = {
                "linear": self._accuracies(self.linear_matrix),
                "statistics": self._accuracies(self.matrix),
            }
        return results

    def _accuracies(self, matrix: list[list[float]]) -> dict[str, Any]:
        """A head's accuracies, and what follows from them."""
        full = [[*row, *[None] * (self.num_tasks - len(row))] for row in matrix]
        full += [[None] * self.num_tasks for _ in range(self.num_tasks - len(full))]
        summary = metrics.summarize(full)
        return {"accuracy_matrix": full, **{name: summary[name] for name in SUMMARY}}

    def load(self, results: dict[str, Any]) -> None:
        """Continue from the content of a results file.

        Raises:
            ValueError: a file of another method, scenario, number of tasks or seed.
        """
        same = ("method", "projection", "head", "scenario", "num_tasks", "seed", "eval_mask", "batchwise_prompt")
        for name in same:
            if results.get(name) != getattr(self, name):
                raise ValueError(
                    f"the earlier run has {name}={results.get(name)!r}, this one {getattr(self, name)!r}: "
                    "continue with the same settings, or choose another output_dir."
                )
        if results.get("compensate_drift", False) != self.compensate_drift:
            raise ValueError(
                f"the earlier run has compensate_drift={not self.compensate_drift}, this one {self.compensate_drift}: "
                "continue with the same settings, or choose another output_dir."
            )
        self.matrix = _rows(results["accuracy_matrix"])
        if self.head == "statistics":
            self.linear_matrix = _rows(results["heads"]["linear"]["accuracy_matrix"])
        self.changed = list(results.get("changed_selections", []))
        self.drift, self.rank = list(results["drift"]), list(results["projection_rank"])
        self.seconds, self.images_trained = dict(results["seconds"]), results["images_trained"]
        self.usage = results.get("prompt_usage")
        self.drift_lacks = list(results.get("drift_lacks", []))


class StreamEvaluation:
    """The part of `PGPTrainer` that evaluates: whole streams, and a `Trainer`'s own evaluation and prediction."""

    results: StreamResults
    stream: TaskStream
    task: int | None
    _features: dict[int, np.ndarray]
    _selected: dict[int, np.ndarray]
    _queries: dict[int, Tensor]
    _scored: int | None
    _recording: bool

    def evaluate_stream(self) -> dict[str, Any]:
        """Evaluate every task trained so far, and take the figures into `results`.

        Class-incremental and online: a prediction may be any class seen so far, and no task id enters.
        Task-incremental: a prediction is one of its own task's classes.

        Returns:
            The content of `results.json`.
        """
        if self.task is None:
            raise ValueError("no task has been trained yet: call train() or train_task(0) first.")
        started = time.perf_counter()
        t, row, linear, usage, drifts, changes = self.task, [], [], [], [], []
        for j in range(t + 1):
            output = self._record(j)
            found = output.predictions
            row.append(_percent(found["logits"], output.label_ids))
            if "linear" in found:
                linear.append(_percent(found["linear"], output.label_ids))
            if j == t:
                self._keep_reference(t, found)
            elif j not in self.results.drift_lacks:
                drifts.append(relative_drift(self._features[j], found["features"]))
            if "selected" in found:
                selected = found["selected"]
                usage.append(np.bincount(selected.ravel(), minlength=self.tuner.adapter_config.pool_size).tolist())
                if j < t and j not in self.results.drift_lacks:
                    changes.append(changed_share(self._selected[j], selected))
        self.results.matrix[t:] = [row]
        self.results.linear_matrix[t:] = [linear] if linear else []
        self.results.drift[t:] = [float(np.mean(drifts or 0))]
        self.results.changed[t:] = [float(np.mean(changes or 0))] if usage else []
        self.results.usage = usage or None
        self._count("evaluation", started)
        results = self.results.to_dict()
        logs = {f"eval_task_{j + 1}_accuracy": value for j, value in enumerate(row)}
        self.log(
            {
                **logs,
                "eval_average_accuracy": results["average_accuracy"],
                "eval_forgetting": results["forgetting"],
                "eval_drift": results["drift"][-1],
                **({"eval_changed_selections": self.results.changed[-1]} if self.results.changed else {}),
                "eval_projection_rank": results["projection_rank"][-1] if results["projection_rank"] else 0,
            }
        )
        return results

    def _keep_reference(self, j: int, found: dict[str, np.ndarray]) -> None:
        """Keep how the test images of task j are seen when it ends: drift is measured against that."""
        self._features[j] = found["features"]
        if "selected" in found:
            self._selected[j] = found["selected"]

    def _test_sets(self, t: int) -> dict[str, Any]:
        return {f"task_{j + 1}": self.stream.test(j) for j in range(t + 1)}

    def _allowed_classes(self) -> list[int] | None:
        """Classes that a prediction may take now; None for all."""
        if self.stream.scenario == "task_incremental" and self._scored is not None:
            return list(self.stream.tasks[self._scored].classes)
        return None if self.args.eval_mask == "none" or self.task is None else self.stream.seen_classes(self.task)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As a `Trainer`'s; notes whose test images these are, which the task-incremental scenario needs."""
        found = re.search(r"task_(\d+)$", metric_key_prefix)
        self._scored = int(found[1]) - 1 if found else None
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """One evaluation batch: loss, logits with unseen classes masked, labels.

        While a stream is evaluated, the logits come with the head's inputs, the selected prompts and, when a
        statistics head speaks, the linear head's logits on the same inputs.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        with torch.no_grad(), self._head_inputs() as features:
            outputs = model(**inputs)
        allowed = self._allowed_classes()
        logits = keep_classes(self.tuner.class_logits(outputs).float(), allowed)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if prediction_loss_only:
            return loss, None, None
        if not self._recording:
            return loss, logits, labels
        found = {"logits": logits, "features": features[0].float()}
        if self.tuner.statistics_speak:
            with torch.no_grad(), self.accelerator.autocast():
                found["linear"] = keep_classes(self.tuner.linear_logits(features[0]).float(), allowed)
        if self.tuner.selected_prompts is not None:
            found["selected"] = self.tuner.selected_prompts
        return loss, found, labels

    @contextmanager
    def _head_inputs(self) -> Iterator[list[Tensor]]:
        """A list that receives what the head reads, `(B, d)`, at each forward pass meanwhile."""
        features: list[Tensor] = []
        watch = self.tuner.watch_features(lambda tensor: features.append(tensor.detach()))
        try:
            yield features
        finally:
            watch.remove()

    def _record(self, j: int) -> PredictionOutput:
        """Predictions, features and selections for the test images of task j."""
        images = self.stream.test(j)
        if self.args.cache_queries and self.tuner.query is not None:
            if j not in self._queries:
                self._queries[j] = self._frozen_queries(images)
            images = CachedQueries(images, self._queries[j])
        compute_metrics, self.compute_metrics, self._recording = self.compute_metrics, None, True
        try:
            return self.predict(images, metric_key_prefix=f"eval_task_{j + 1}")
        finally:
            self.compute_metrics, self._recording = compute_metrics, False

    @torch.no_grad()
    def _frozen_queries(self, images: Dataset) -> Tensor:
        """Queries `(N, d)` of images, on every process, in the batches that evaluation uses."""
        queries, hidden = [], self.args.disable_tqdm or not self.is_world_process_zero()
        for batch in tqdm(self.get_test_dataloader(images), desc="queries", leave=False, disable=hidden):
            with self.accelerator.autocast():
                query = self.tuner.query(self._prepare_inputs(batch)["pixel_values"])
            queries.append(self.accelerator.gather_for_metrics(query).cpu())
        return torch.cat(queries)


def _rows(matrix: list[list[float | None]]) -> list[list[float]]:
    """The rows of finished tasks, without the entries that are not there yet."""
    return [[a for a in row if a is not None] for row in matrix if row[0] is not None]


def versions() -> dict[str, str]:
    """Versions that a number depends on."""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    from . import __version__

    return {"pgp_hf": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
