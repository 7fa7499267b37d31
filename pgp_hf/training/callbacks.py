"""Define events of a stream, in addition to those of a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.images import set_epoch
from ..models import StreamModel
from .arguments import PGPTrainingArguments


class StreamCallback(TrainerCallback):
    """Listen to a stream as well as to a `Trainer`.

    Each event receives `args, state, control` first; kwargs always hold `model`, `stream` and `training_stream`, which is
    the same unless the method learns all tasks as one, the last. Tasks are counted from 0.
    """

    def on_stream_begin(
        self, args: PGPTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run before the first task, whose index is `first_task` in kwargs: above 0 in a resumed run."""

    def on_task_begin(
        self, args: PGPTrainingArguments, state: TrainerState, control: TrainerControl, task: int, **kwargs: Any
    ) -> None:
        """Run before a task trains."""

    def on_task_end(
        self,
        args: PGPTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        task: int,
        results: dict[str, Any],
        folder: Path,
        **kwargs: Any,
    ) -> None:
        """Run after a task was trained, its statistics gathered, all seen tasks evaluated, and `folder` written."""

    def on_stream_end(
        self,
        args: PGPTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        results: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Run after the last task."""


class FollowTraining(TrainerCallback):
    """Tell the model when a task's steps begin, and the training images which epoch it is, for their augmentation.

    Args:
        model: the `StreamModel` in training.
        images: returns the training images of the task, and the dataset that is trained on.
    """

    def __init__(self, model: StreamModel, images: Callable[[], Iterable[object]]) -> None:
        self.model, self.images = model, images

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model.training_starts()  # by now a checkpoint has been loaded, and the processes agree

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for images in self.images():
            set_epoch(images, int((state.epoch or 0) + 1e-6))


def ends_epoch(state: TrainerState, control: TrainerControl) -> bool:
    """Return whether the step that has just ended is followed by what is done at the end of an epoch."""
    last = control.should_epoch_stop or control.should_training_stop
    return last or float(state.epoch or 0).is_integer()


def fire(callbacks: Iterable[TrainerCallback], event: str, *arguments: Any, **kwargs: Any) -> None:
    """Call an event of a stream on all callbacks that listen to it."""
    for callback in callbacks:
        if hasattr(callback, event):
            getattr(callback, event)(*arguments, **kwargs)
