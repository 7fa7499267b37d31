"""Define events of a stream, in addition to those of a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.images import AugmentedImages
from ..data.stream import TaskStream
from ..models import StreamModel
from .arguments import PGPTrainingArguments


class StreamCallback(TrainerCallback):
    """Listen to a stream as well as to a `Trainer`.

    Each event receives `args, state, control` first; kwargs always hold `model` and `stream`. Tasks are counted from 0.
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


class StreamProgress(ProgressCallback, StreamCallback):
    """Show progress bars that say which task they belong to, and print a line when a task starts and ends."""

    task = 0
    prediction_bar: Any  # transformers' own knows None alone

    def on_task_begin(
        self,
        args: PGPTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        task: int,
        stream: TaskStream | None = None,
        **kwargs: Any,
    ) -> None:
        self.task = task
        if state.is_world_process_zero and stream is not None:
            names = [stream.label_names[label] for label in stream.tasks[task].classes]
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            tqdm.write(f"Task {task + 1} of {stream.num_tasks}: {len(stream.train(task))} images of {shown}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"  training task {self.task + 1}")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.prediction_bar is None and eval_dataloader is not None:
            self.prediction_bar = tqdm(
                total=len(eval_dataloader), desc="  evaluation", leave=False, dynamic_ncols=True
            )
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if "train_runtime" not in (logs or {}):  # the line at the end of the task has it
            super().on_log(args, state, control, logs=logs, **kwargs)

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
        if state.is_world_process_zero:
            shares = results.get("changed_selections")
            changed = f"changed selections {100 * shares[-1]:.1f} %, " if shares else ""
            tqdm.write(
                f"  average accuracy {results['average_accuracy']:.2f} %, forgetting {results['forgetting']:.2f}, "
                f"drift {results['drift'][-1]:.3f}, {changed}protected rank {results['projection_rank'][-1]} -> {folder}"
            )


class FollowTraining(TrainerCallback):
    """Tell the model when a task's steps begin, and the training images which epoch it is, for their augmentation.

    Args:
        model: the `StreamModel` in training.
        images: returns the training images of the task.
    """

    def __init__(self, model: StreamModel, images: Callable[[], AugmentedImages | None]) -> None:
        self.model, self.images = model, images

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model.training_starts()  # by now a checkpoint has been loaded, and the processes agree

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        images = self.images()
        if images is not None:
            images.set_epoch(int((state.epoch or 0) + 1e-6))


def fire(callbacks: Iterable[TrainerCallback], event: str, *arguments: Any, **kwargs: Any) -> None:
    """Call an event of a stream on all callbacks that listen to it."""
    for callback in callbacks:
        if hasattr(callback, event):
            getattr(callback, event)(*arguments, **kwargs)
