"""Share one pass over a task's images between what its method keeps of them and the class statistics of a head."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..methods import TaskContext
from .views import Views, head_inputs


class HeadInputs:
    """Note what the head reads of a task's images while its method goes over them.

    Attributes:
        batches: the head's inputs `(B, d)` of each batch, on the CPU, and its labels `(B,)`; empty where the method has not
            passed every batch through the model once.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []

    def noting(self, context: TaskContext) -> TaskContext:
        """Return a context whose views are noted."""

        def views(limit: int | None) -> Views:
            found, once = list[tuple[Tensor, Tensor]](), True
            with head_inputs(context.model) as seen:
                for batch, positions in context.views(limit):
                    seen.clear()
                    yield batch, positions  # the method passes it before it asks for the next
                    once = once and len(seen) == 1
                    found += [(features.float().cpu(), batch.labels) for features in seen]
            if found and once:
                self.batches = found

        return replace(context, views=views)
