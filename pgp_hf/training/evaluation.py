"""Measuring a stream: predictions under the evaluation rules, features, drift, and the results file's content."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from ..data.images import CachedQueries
from ..data.stream import TaskStream
from ..heads import keep_classes
from .results import StreamResults, changed_share, percent, relative_drift


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": percent(prediction.predictions, prediction.label_ids)}


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
            row.append(percent(found["logits"], output.label_ids))
            if "linear" in found:
                linear.append(percent(found["linear"], output.label_ids))
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
        inputs.pop("task", None)
        inputs.pop("index", None)
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
        if self.tuner.uses_statistics_head:
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
