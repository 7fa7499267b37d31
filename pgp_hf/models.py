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
        """Return the kind of model under which `results.json` lists it, such as "l2p"."""

    @property
    def class_names(self) -> Mapping[int, str] | None:
        """Name of each class by its label id; None for a model without a classifier."""

    def settings(self) -> dict[str, Any]:
        """Return the settings that must agree for a run to be continued, ready for JSON."""

    def digest(self) -> dict[str, str]:
        """Return the SHA-256 of the frozen weights by its key in `results.json`."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by their names in the checkpoint."""

    def class_logits(self, output: ModelOutput) -> Tensor:
        """Return the scores `(B, C)` in an output of the model."""

    def watch_features(self, callback: Callable[[Tensor], object]) -> RemovableHandle:
        """Call `callback` with the head's input, `(B, d)`, at each forward pass until the handle is removed."""

    def auxiliary_loss(self, output: ModelOutput) -> Tensor | None:
        """Return a loss of the model's own for each image, `(B,)`, such as L2P's pull term."""

    def prepare_stream(self, tasks: list[list[int]], names: Mapping[int, str]) -> None:
        """Prepare for a stream of tasks with these classes and class names."""

    def begin_task(self, task: int) -> None:
        """Prepare for the training of the 0-based task."""

    def training_starts(self) -> None:
        """Prepare for the task's first step, after a checkpoint, if any, has been loaded."""

    def after_step(self) -> None:
        """Restore after each optimizer step whatever must not move."""

    def end_task(self, task: int) -> None:
        """Finish the 0-based task, which has been trained."""

    def resume_after(self, task: int) -> None:
        """Continue from the state after the 0-based task, which has been loaded."""


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
        """Return True while logits come from the statistics."""

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
    # the PeftModel forwards attribute access to its tuner, so that it would pass the check itself
    inside = model.base_model if isinstance(model, PeftModel) else model
    if isinstance(inside, StreamModel):
        return inside
    raise TypeError(
        f"model is a {type(model).__name__} without a prompt adapter: wrap it with "
        "peft.get_peft_model(model, pgp_hf.L2PConfig(...))."
    )
