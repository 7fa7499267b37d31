"""The progress of a run: all that a trainer carries from task to task besides the model and the method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..data.stored import Stored, keep_images
from ..data.stream import TaskImages
from ..methods import ContinualMethod
from ..metrics._running import Accuracies
from ..runs.folder import RunFolder
from .evaluation import References
from .results import StreamResults


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        results: what has been measured.
        references: what drift is measured against.
        stored: images that the method kept when the last finished task ended, where the run keeps images.
        task: 0-based index of the task that is in training or was trained last; None before the first.
        interrupted: True from a task's start to its end, hence still True after a task has failed.
    """

    results: StreamResults
    references: References = field(default_factory=References)
    stored: Stored = field(default_factory=Stored)
    task: int | None = None
    interrupted: bool = False
    images_before: int = 0  # images trained before the task
    running: dict[str, float] = field(default_factory=dict)  # when the activities that go on have started

    def begin(self, t: int) -> None:
        """Begin the 0-based task t.

        Raises:
            ValueError: an earlier task that has failed, or a task out of turn.
        """
        if self.interrupted:
            raise ValueError(
                f"this trainer has begun task {(self.task or 0) + 1} and not finished it: continue by "
                "train(resume_from_checkpoint=True), or make a new model and a new trainer."
            )
        first, tasks = self.results.first, self.results.num_tasks
        following = first + len(self.results.matrix)
        if t != following:
            done = following if self.results.matrix else 0
            as_one = f"; method {self.results.method!r} learns all tasks as one, t={first}" if first else ""
            raise ValueError(
                f"t={t} is not the next task: {done} of {tasks} tasks are trained, so t={following} comes next (counted "
                f"from 0{as_one})."
            )
        self.task, self.interrupted, self.images_before = t, True, self.results.images_trained

    def step(self, within: int) -> int:
        """Return the optimizer's step over all tasks, given that within the task in training."""
        if self.task is None:
            return within
        if not self.interrupted:
            return sum(self.results.steps)
        return sum(self.results.steps[: self.task - self.results.first]) + within

    def measure_method(self, method: ContinualMethod, task: int, images_of: Callable[[int], TaskImages]) -> None:
        """Note what a method keeps that has just ended a task, and store its images if it says so.

        Args:
            method: of the run.
            task: 0-based, in the stream that is trained on.
            images_of: returns the training images of a task.
        """
        self.results.measure_method(method, task, images_of)
        if method.stores_images:
            self.stored = keep_images(method.exemplars(), images_of)

    def check_new(self) -> None:
        """Raise ValueError if a task has been begun already."""
        if self.task is None:
            return
        if self.interrupted:
            state, ways = f"has begun task {self.task + 1}", "train(resume_from_checkpoint=True)"
        else:
            state, ways = f"has trained {self.task + 1} tasks", "train(resume_from_checkpoint=True) or train_task"
        raise ValueError(f"this trainer {state} already: go on with {ways}, or make a new model and a new trainer.")

    def forget(self) -> None:
        """Go back to before the first task."""
        blank: dict[str, Any] = {name: [] for name in ("matrix", "drift", "changed", "rank", "steps")}
        blank |= {name: Accuracies() for name in ("within", "linear", "linear_within")}
        self.stored = {}
        self.results, self.task = replace(self.results, usage=None, memory={"images": 0, "bytes": 0}, **blank), None

    def kept(self, folder: RunFolder) -> str:
        """Describe for an error message what is kept of the run if the current task fails."""
        return (
            f"task {self.task} is kept in {folder.task(self.task - 1)}"
            if self.task and self.results.matrix
            else "no task was finished"
        )

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Add the wall time of the block to that of an activity."""
        self.running[activity] = time.perf_counter()
        try:
            yield
            self.results.seconds[activity] += time.perf_counter() - self.running[activity]
        finally:
            del self.running[activity]

    def counted(self) -> dict[str, Any]:
        """Return what has been counted and measured up to now, within a task: a checkpoint keeps it."""
        now = time.perf_counter()
        since = {activity: now - started for activity, started in self.running.items()}
        seconds = {activity: spent + since.get(activity, 0.0) for activity, spent in self.results.seconds.items()}
        return {"images_trained": self.results.images_trained, "seconds": seconds}

    def recount(self, counted: Mapping[str, Any] | None = None) -> None:
        """Count on from a checkpoint of the task in training, or else from its start."""
        self.results.images_trained = self.images_before
        if counted is not None:
            self.results.images_trained, self.results.seconds = counted["images_trained"], dict(counted["seconds"])


def task_seed(seed: int, t: int) -> int:
    """Return the seed of the 0-based task t in a run with this seed."""
    return int(np.random.SeedSequence([seed, t]).generate_state(1)[0])
