"""Measuring a stream: predictions under the evaluation rules, features, drift, and the results file's content."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import metrics


def keep_classes(logits: Tensor, classes: Sequence[int] | None) -> Tensor:
    """`logits` `(B, C)` with every class outside `classes` at minus infinity; None keeps all."""
    if classes is None:
        return logits
    mask = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    mask[list(classes)] = False
    return logits.masked_fill(mask, float("-inf"))


def relative_drift(before: np.ndarray, after: np.ndarray) -> float:
    """Mean over images of `|f_i(x) - f_j(x)| / |f_j(x)|` for features `(N, d)` (the poster's Eq. 2, measured)."""
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    norms = np.linalg.norm(before, axis=-1)
    return float(np.mean(np.linalg.norm(after - before, axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)))


@dataclass
class StreamResults:
    """What a run has measured so far; `to_dict` is the content of `results.json`.

    Attributes:
        matrix: accuracies in percent, a row per finished task; row i has i + 1 entries.
        drift, rank: one value per finished task.
        usage: per seen task, how often its test images selected each pool entry, after the last finished task.
        seconds: wall time by activity, summed over tasks.
        images_trained: training images seen, with repetitions.
    """

    method: str
    projection: str
    scenario: str
    num_tasks: int
    seed: int
    eval_mask: str
    batchwise_prompt: bool
    matrix: list[list[float]] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    usage: list[list[int]] | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "statistics": 0.0, "evaluation": 0.0})
    images_trained: int = 0

    def to_dict(self) -> dict[str, Any]:
        full = [[*row, *[None] * (self.num_tasks - len(row))] for row in self.matrix]
        full += [[None] * self.num_tasks for _ in range(self.num_tasks - len(full))]
        summary = metrics.summarize(full)
        results = {
            "method": self.method,
            "projection": self.projection,
            "scenario": self.scenario,
            "num_tasks": self.num_tasks,
            "accuracy_matrix": full,
            "average_accuracy": summary["average_accuracy"],
            "forgetting": summary["forgetting"],
            "forgetting_clipped": summary["forgetting_clipped"],
            "backward_transfer": summary["backward_transfer"],
            "learning_accuracy": summary["learning_accuracy"],
            "per_task_average_accuracy": summary["per_task_average_accuracy"],
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
        if self.usage is not None:
            results["prompt_usage"] = self.usage
        return results

    def load(self, results: dict[str, Any]) -> None:
        """Continue from the content of a results file.

        Raises:
            ValueError: a file of another method, scenario, number of tasks or seed.
        """
        for name in ("method", "projection", "scenario", "num_tasks", "seed", "eval_mask", "batchwise_prompt"):
            if results.get(name) != getattr(self, name):
                raise ValueError(
                    f"the earlier run has {name}={results.get(name)!r}, this one {getattr(self, name)!r}: "
                    "continue with the same settings, or choose another output_dir."
                )
        self.matrix = [[a for a in row if a is not None] for row in results["accuracy_matrix"] if row[0] is not None]
        self.drift, self.rank = list(results["drift"]), list(results["projection_rank"])
        self.seconds, self.images_trained = dict(results["seconds"]), results["images_trained"]
        self.usage = results.get("prompt_usage")


def versions() -> dict[str, str]:
    """Versions that a number depends on."""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    from . import __version__

    return {"pgp_hf": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
