"""The protocols by which everything else meets a model: one that all of them follow, and others that some do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from .heads import ClassStatistics
from .projection import Protectable

__all__ = ["KeepsClassStatistics", "Protectable", "SelectsPrompts", "StreamModel", "stream_model"]


@runtime_checkable
class StreamModel(Protocol):
    """A model that learns a stream of tasks; the prompt tuners are such models."""

    @property
    def name(self) -> str:
        """The kind of model as `results.json` has it, such as "l2p"."""

    @property
    def class_names(self) -> Mapping[int, str] | None:
        """Name of each class by its label id; None for a model without a classifier."""

    def settings(self) -> dict[str, Any]:
        """Return what must agree for a run to be continued, as JSON has it."""

    def digest(self) -> dict[str, str]:
        """Return the SHA-256 of the frozen weights by the name that `results.json` keeps it under."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by their names in the checkpoint."""

    def class_logits(self, output: ModelOutput) -> Tensor:
        """Return the scores `(B, C)` in an output of the model."""

    def watch_features(self, callback: Callable[[Tensor], object]) -> RemovableHandle:
        """Call back with what the head reads, `(B, d)`, at each forward pass until the handle is removed."""

    def auxiliary_loss(self, output: ModelOutput) -> Tensor | None:
        """Return a loss of the model's own for each image, `(B,)`, such as L2P's pull term."""

    def prepare_stream(self, tasks: list[list[int]], names: Mapping[int, str]) -> None:
        """Prepare for a stream of tasks with these classes, named so."""

    def begin_task(self, task: int) -> None:
        """Prepare for the training of the 0-based task."""

    def training_starts(self) -> None:
        """Note that the task's first step is next: a checkpoint, if there is one, has been loaded."""

    def after_step(self) -> None:
        """Mend after each optimizer step what must not have moved."""

    def end_task(self, task: int) -> None:
        """Finish the 0-based task, which has been trained."""

    def resume_after(self, task: int) -> None:
        """Take note that the state after the 0-based task has been loaded."""


@runtime_checkable
class SelectsPrompts(StreamModel, Protocol):
    """A model in which a query to the frozen backbone selects each image's prompts."""

    @property
    def selected_prompts(self) -> Tensor | None:
        """Pool entries `(B, k)` of the last forward pass."""

    @property
    def pool_size(self) -> int:
        """Number of entries to select from."""

    def query(self, pixel_values: Tensor) -> Tensor:
        """Return the query `(B, d)` of each image, which no training changes."""


@runtime_checkable
class KeepsClassStatistics(StreamModel, Protocol):
    """A model whose head may be the statistics of finished tasks' features."""

    @property
    def statistics(self) -> ClassStatistics | None:
        """Class statistics of finished tasks; None with another head."""

    @property
    def uses_statistics_head(self) -> bool:
        """True when logits come from the statistics now."""

    def learn_statistics(self, statistics: ClassStatistics) -> None:
        """Take in the statistics of a task that has just been trained."""

    def linear_logits(self, features: Tensor) -> Tensor:
        """Return the trained head's scores `(B, C)` of features `(B, d)`, whichever head is in use."""

    def as_before_task(self, task: int) -> AbstractContextManager[None] | None:
        """Return a block in which images cannot select the entry of this last task; None where tasks have no entries."""


def stream_model(model: nn.Module) -> StreamModel:
    """Find the `StreamModel` inside what a trainer was given.

    Raises:
        TypeError: there is none.
    """
    # a PeftModel has all attributes of its tuner, and so would pass for one
    inside = model.base_model if isinstance(model, PeftModel) else model
    if isinstance(inside, StreamModel):
        return inside
    raise TypeError(
        f"model is a {type(model).__name__} without a prompt adapter: wrap it by "
        "peft.get_peft_model(model, pgp_hf.L2PConfig(...))."
    )
