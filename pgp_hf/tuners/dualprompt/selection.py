"""Infer the task of an image from class statistics of its query, instead of from learned keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...heads.statistics import ClassStatistics
from ..base.layer import PromptLayer

CONTAINER = "dualprompt_queries"


class TaskStatistics(ClassStatistics):
    """Class statistics of the frozen model's queries, with the tasks that the classes came in.

    With p(c | q) the probabilities of the classes, calibrated as those of a head, and n_ct the number of images of class
    c in task t,

        p(t | q) = sum_c p(c | q) n_ct / n_c

    Queries do not change while prompts learn, so the statistics of a task are final before it is trained.

    Args:
        num_classes: C; 0 for classes that are all to be added.
        num_tasks: number of tasks that there is room for.
        dim: length of a query.
        shrinkage: as a head has it.

    Attributes:
        tasks: number of images of each class in each task, `(C, T)`, int64.
    """

    tasks: Tensor

    def __init__(self, num_classes: int, num_tasks: int, dim: int, shrinkage: float = 0.1) -> None:
        super().__init__(num_classes, dim, shrinkage)
        self.register_buffer("tasks", torch.zeros(num_classes, num_tasks, dtype=torch.int64))

    def add_classes(self, count: int) -> TaskStatistics:
        super().add_classes(count)
        self.tasks = torch.cat([self.tasks, self.tasks.new_zeros(count, self.tasks.shape[1])])
        return self

    def make_room(self, num_tasks: int) -> TaskStatistics:
        """Make room for so many tasks, if there is less."""
        added = max(num_tasks - self.tasks.shape[1], 0)
        self.tasks = torch.cat([self.tasks, self.tasks.new_zeros(len(self.tasks), added)], dim=1)
        return self

    @torch.no_grad()
    def add_task(self, task: int, statistics: ClassStatistics) -> TaskStatistics:
        """Add the queries of the 0-based task's training images, of all processes."""
        self.merge(statistics)
        self.tasks[:, task] += statistics.counts.to(self.tasks.device)
        return self

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self.seen.any():
            raise ValueError(
                "there are no statistics of queries to select experts by: the trainer gathers them as a task begins, and a "
                "loop of your own by model.base_model.query_statistics.add_task(task, statistics)."
            )
        weight, bias, centre = super().solve()
        temperature = self.temperature
        return weight / temperature, bias / temperature, centre

    @torch.no_grad()
    def posterior(self, queries: Tensor, num_tasks: int) -> Tensor:
        """Return the probabilities of the first tasks, `(B, num_tasks)`, float32, for queries `(B, d)`."""
        counts = self.tasks[:, :num_tasks].to(queries.device)
        share = counts / self.counts.to(queries.device).clamp(min=1)[:, None]
        # a class that none of these tasks has is out of the question
        logits = self(queries).masked_fill(counts.sum(1) == 0, -torch.inf)
        found = logits.softmax(-1) @ share.to(logits)
        return found / found.sum(-1, keepdim=True)


def add_queries(layer: PromptLayer, adapter: str, statistics: TaskStatistics) -> None:
    """Give the wrapped embeddings, where the adapter's keys are, statistics of queries as buffers."""
    if not hasattr(layer, CONTAINER):
        setattr(layer, CONTAINER, nn.ModuleDict())
        layer.other_param_names = (*layer.other_param_names, CONTAINER)  # PEFT saves what is named here
    getattr(layer, CONTAINER)[adapter] = statistics.to(next(layer.base_layer.parameters()).device)


def queries_of(layer: PromptLayer, adapter: str | None) -> TaskStatistics | None:
    """Return an adapter's statistics of queries; None if it selects by keys."""
    return dict(getattr(layer, CONTAINER, {}).items()).get(adapter)
