"""Define the scenarios of continual learning: the classes that compete at test time, and the epochs of a task.

Whatever depends on the scenario is a field or a method of `Scenario`, looked up by `SCENARIOS[stream.scenario]`, so
that a new scenario is one more entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .checking import shorten


@dataclass(frozen=True)
class Scenario:
    """The rules by which a stream is learned and tested.

    Args:
        name: as users write it, and as files keep it.
        title: as a sentence names it.
        help: one line for a command line's help.
        task_known: whether the task of each test image is given, so that only that task's classes compete.
        one_epoch: whether each task's images are seen once.
    """

    name: str
    title: str
    help: str
    task_known: bool = False
    one_epoch: bool = False

    def allowed_classes(self, tasks: Sequence[Sequence[int]], after: int, task: int) -> list[int]:
        """Return the label ids that may win for an image of one task.

        Args:
            tasks: the label ids of each task, in stream order.
            after: the task learned last, 0-based.
            task: the image's own task, 0-based.
        """
        competing = tasks[task : task + 1] if self.task_known else tasks[: after + 1]
        return list(dict.fromkeys(label for classes in competing for label in classes))


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "class_incremental",
            title="class-incremental",
            help="a test image may be of any class seen so far",
        ),
        Scenario(
            "task_incremental",
            title="task-incremental",
            help="the task of each test image is given, and only its classes compete",
            task_known=True,
        ),
        Scenario(
            "online",
            title="class-incremental, one pass over the data (online)",
            help="class-incremental, with one epoch for each task",
            one_epoch=True,
        ),
    )
}


def check_scenario(name: str) -> None:
    """Raise ValueError unless there is a scenario of this name."""
    if not isinstance(name, str) or name not in SCENARIOS:
        raise ValueError(f"scenario must be one of {shorten(SCENARIOS)}, got {name!r}")
