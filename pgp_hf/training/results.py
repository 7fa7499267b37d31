"""Hold the figures of a run: the measures of an evaluation, and the content of the results file."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from .. import metrics
from ..data.markup import table
from ..data.scenarios import SCENARIOS
from ..data.stream import TaskImages
from ..methods import ContinualMethod
from ..methods.memory import rgb_bytes
from ..metrics._running import Accuracies, Row
from ..runs.checks import finished_tasks, first_task, origin_on_hub
from ..version import __version__


def relative_drift(before: np.ndarray, after: np.ndarray) -> float:
    """Return the mean over images of `|f_i(x) - f_j(x)| / |f_j(x)|` for features `(N, d)` (PGP, ICLR 2024, Eq. 2)."""
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    norms = np.linalg.norm(before, axis=-1)
    return float(np.mean(np.linalg.norm(after - before, axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)))


def changed_share(before: np.ndarray, after: np.ndarray) -> float:
    """Return the share of images whose set of selected pool entries `(N, k)` differs."""
    return float(np.mean((np.sort(before, axis=-1) != np.sort(after, axis=-1)).any(-1)))


def percent(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the accuracy in percent of logits `(N, C)` on labels `(N,)`."""
    return float(100 * np.mean(logits.argmax(-1) == labels))


Usage = list[int] | dict[str, int]
LARGE_POOL = 100

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
    """Hold what a run has measured so far; `to_dict` is the content of `results.json`.

    Attributes:
        method: the registered name, or the adapter's for projected prompts.
        model: what learns: "l2p", "full", "last:2", "head", "lora:8", ...
        method_settings: those of the method, ready for JSON.
        trainable_parameters: numbers that learn in the model.
        first: 0-based index of the first task that is evaluated, above 0 where the tasks up to it are learned as one. The
            lists below begin with it; the file has empty rows, and zeros, for the tasks before.
        num_tasks: of the stream; it grows with one that does.
        matrix: accuracies in percent of the chosen head, a row per finished task; that of task i has i + 1 entries. None
            for a task whose test images were not there.
        within: those where each image's task is known, and only its classes compete: from the same predictions. None for a
            run that was begun by a version that did not measure it. As of all but the chosen head's, what follows from
            the matrix is kept instead of it, so that a file grows linearly with the tasks besides the one matrix.
        linear, linear_within: the same for the linear head, where a statistics head classifies; else empty.
        drift, rank: one value per finished task; a drift is None where no earlier task was measured.
        steps: of the optimizer, one value per finished task.
        changed: share of old test images that select other pool entries than when their task ended, one value per finished
            task, None as in drift; empty where nothing is selected.
        usage: per seen task, how often its test images selected each pool entry, after the last finished task; None for
            a task that was not measured. Of a pool of more than 100 entries, which may grow with the tasks, only entries
            that were selected, by their index as text.
        drift_lacks: tasks that drift and changed selections leave out although they were measured, because the run was
            continued from a single revision; 0-based, usually none.
        seconds: wall time by activity, summed over tasks.
        images_trained: training images seen, with repetitions.
        memory: number of training images that the method keeps after the last finished task, and their bytes as
            uncompressed 8-bit RGB.
        calibration_error: how far scores of the statistics head are from the share of right predictions over all seen
            test images, `before` and `after` they are calibrated; None for another head, or without test images.
        continues: the revision that the run goes on from: its `repo` (None for a folder), `revision`, `commit` (or None)
            and number of `tasks`, and its own origin as `continues` where it had one; None for a run from its first task.
        training: settings that the last task was trained with, ready for JSON.
    """

    method: str
    model: str
    projection: str
    head: str
    scenario: str
    num_tasks: int
    seed: int
    eval_mask: str
    batchwise_prompt: bool
    compensate_drift: bool = False
    method_settings: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: int = 0
    first: int = 0
    matrix: list[Row] = field(default_factory=list)
    within: Accuracies | None = field(default_factory=Accuracies)
    linear: Accuracies = field(default_factory=Accuracies)
    linear_within: Accuracies | None = field(default_factory=Accuracies)
    drift: list[float | None] = field(default_factory=list)
    changed: list[float | None] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    usage: list[Usage | None] | None = None
    drift_lacks: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "statistics": 0.0, "evaluation": 0.0})
    images_trained: int = 0
    memory: dict[str, int] = field(default_factory=lambda: {"images": 0, "bytes": 0})
    calibration_error: dict[str, float] | None = None
    continues: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> dict[str, Any] | None:
        """Return the newest revision on the Hub that the run goes on from, None if there is none."""
        return origin_on_hub({"continues": self.continues})

    def measure_method(self, method: ContinualMethod, task: int, images_of: Callable[[int], TaskImages]) -> None:
        """Note the rank and the memory of a method that has just ended a task; `images_of` returns those of a task."""
        self.rank[task:] = [method.rank]
        places: dict[int, list[int]] = {}
        for own, position in method.exemplars():
            places.setdefault(own, []).append(position)
        sizes = [size for own, positions in places.items() for size in rgb_bytes(images_of(own), positions)]
        self.memory = {"images": len(sizes), "bytes": sum(sizes)}

    def note_task(self, num_tasks: int, training: dict[str, Any], parameters: int) -> None:
        """Note the number of tasks, the settings and the number of trainable parameters that a task begins with."""
        self.num_tasks, self.training, self.trainable_parameters = num_tasks, training, parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        results = {
            "method": self.method,
            "model": self.model,
            "method_settings": self.method_settings,
            "projection": self.projection,
            "head": self.head,
            "scenario": self.scenario,
            "num_tasks": self.num_tasks,
            "finished_tasks": self.first + len(self.matrix),
            **(own := self._accuracies()),
            "drift": [*[0.0] * self.first, *self.drift],
            "projection_rank": [0] * self.first + self.rank,
            "steps": [0] * self.first + self.steps,
            "train_images_per_second": self.images_trained / max(self.seconds["train"], 1e-9),
            "images_trained": self.images_trained,
            "trainable_parameters": self.trainable_parameters,
            "memory": self.memory,
            "seconds": self.seconds,
            "eval_mask": self.eval_mask,
            "batchwise_prompt": self.batchwise_prompt,
            "seed": self.seed,
            "versions": versions(),
        }
        if self.first:
            results["first_task"] = self.first
        results.update(self._task_incremental(self.within))
        if self.changed:
            results["changed_selections"] = [*[0.0] * self.first, *self.changed]
        if self.usage is not None:
            results["prompt_usage"] = self.usage
        if self.compensate_drift:
            results["compensate_drift"] = True
        if self.drift_lacks:
            results["drift_lacks"] = self.drift_lacks
        if self.calibration_error is not None:
            results["calibration_error"] = self.calibration_error
        if self.continues is not None:
            results["continues"] = self.continues
        if self.training:
            results["training"] = self.training
        if self.head == "statistics":
            results["heads"] = {
                "linear": {**self.linear.to_dict(), **self._task_incremental(self.linear_within)},
                # whose matrix is that above
                "statistics": {**{name: own[name] for name in SUMMARY}, **self._task_incremental(self.within)},
            }
        return results

    def _repr_html_(self) -> str:
        """Return the accuracy matrix as a table for a notebook, the darker the more accurate, with the measures above it."""
        name = self.method if self.projection == "none" else f"{self.method} with {self.projection} projection"
        if not self.matrix:
            return table(f"{name}, none of {self.num_tasks} tasks", [], [])
        content, tasks = self.to_dict(), self.first + len(self.matrix)
        measured = {
            "average accuracy {:.2f} %": content["average_accuracy"],
            "forgetting {:.2f}": None if self.first else content["forgetting"],
            "drift {:.3f}": None if self.first or not self.drift else self.drift[-1],
        }
        told = [words.format(value) for words, value in measured.items() if value is not None]
        rows = content["accuracy_matrix"][self.first : tasks]
        shown = [
            [f"after task {self.first + i + 1}", *(None if value is None else f"{value:.1f}" for value in row)]
            for i, row in enumerate(rows)
        ]
        return table(
            ", ".join([f"{name}, {tasks} of {self.num_tasks} tasks", *told]),
            ["accuracy in %", *(f"task {j + 1}" for j in range(self.num_tasks))],
            shown,
            [[None, *(None if value is None else value / 100 for value in row)] for row in rows],
        )

    def _accuracies(self) -> dict[str, Any]:
        """Return the chosen head's accuracy matrix, and what follows from it."""
        full: list[Row] = [[None] * self.num_tasks for _ in range(self.first)]
        full += [[*row, *[None] * (self.num_tasks - len(row))] for row in self.matrix]
        full += [[None] * self.num_tasks for _ in range(self.num_tasks - len(full))]
        summary = metrics.summarize(full, self.first + len(self.matrix))
        return {"accuracy_matrix": full, **{name: summary[name] for name in SUMMARY}}

    def _task_incremental(self, within: Accuracies | None) -> dict[str, Any]:
        """Return an entry of the accuracies where tasks are known; nothing where that is the scenario itself."""
        return {} if self._task_known or within is None or not within.now else {"task_incremental": within.to_dict()}

    @property
    def _task_known(self) -> bool:
        return SCENARIOS[self.scenario].task_known

    def load(self, results: dict[str, Any], going_on: bool = False) -> None:
        """Continue from the content of a results file.

        Args:
            going_on: whether the stream goes on after the run's last task, with settings of its own: only what was
                learned must be the same.

        Raises:
            ValueError: a file of another method, scenario, number of tasks or seed.
        """
        same = ("method", "projection", "head", "scenario")
        settings = () if going_on else ("num_tasks", "seed", "eval_mask", "batchwise_prompt")
        for name in (*same, *settings):
            if results.get(name) != getattr(self, name):
                raise ValueError(
                    f"the earlier run has {name}={results.get(name)!r}, this one {getattr(self, name)!r}: "
                    "continue with the same settings, or choose another output_dir."
                )
        if results.get("model", self.model) != self.model:  # runs of earlier versions do not say
            raise ValueError(
                f"the earlier run has model={results['model']!r}, this one {self.model!r}: continue with the same model, or "
                "choose another output_dir."
            )
        if not going_on and results.get("compensate_drift", False) != self.compensate_drift:
            raise ValueError(
                f"the earlier run has compensate_drift={not self.compensate_drift}, this one {self.compensate_drift}: "
                "continue with the same settings, or choose another output_dir."
            )
        if (first := first_task(results)) != self.first:
            raise ValueError(
                f"the earlier run has accuracies from task {first + 1} on, this one will have them from task "
                f"{self.first + 1} on, by the same method: the earlier results.json was altered. Fetch it again."
            )
        rows = range(first, finished_tasks(results))
        # without the entries of later tasks
        self.matrix = [results["accuracy_matrix"][i][: i + 1] for i in rows]
        if not self._task_known:
            self.within = _within(results, rows)
        if self.head == "statistics":
            linear = results["heads"]["linear"]
            self.linear = Accuracies.load(linear, rows)
            self.linear_within = None if self._task_known else _within(linear, rows)
        self.changed = list(results.get("changed_selections", []))[self.first :]
        self.drift, self.rank = (list(results[name])[self.first :] for name in ("drift", "projection_rank"))
        self.steps = _steps(results)[self.first :]
        self.seconds, self.images_trained = dict(results["seconds"]), results["images_trained"]
        self.usage = results.get("prompt_usage")
        self.drift_lacks = list(results.get("drift_lacks", []))
        self.memory = dict(results.get("memory", self.memory))
        self.calibration_error = results.get("calibration_error")
        self.continues = results.get("continues")
        self.trainable_parameters = results.get("trainable_parameters", self.trainable_parameters)
        self.training = dict(results.get("training", {}))


def _within(content: dict[str, Any], rows: range) -> Accuracies | None:
    """Return a head's task-incremental accuracies; None from a version that did not measure them."""
    known = content.get("task_incremental")
    return None if known is None else Accuracies.load(known, rows)


def _steps(results: dict[str, Any]) -> list[int]:
    """Return the optimizer's steps in each finished task; from a version that did not count them, about their sum."""
    if "steps" in results:
        return list(results["steps"])
    per_step = results.get("training", {}).get("images_per_step")
    return [0] * (finished_tasks(results) - 1) + [results["images_trained"] // per_step if per_step else 0]


@cache
def _installed() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")}


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {"pgp_hf": __version__, "python": platform.python_version(), **_installed()}
