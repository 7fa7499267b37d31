"""Define events of a stream, in addition to those of a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.images import set_epoch
from ..data.stream import TaskStream
from ..models import StreamModel
from ..report.formatting import printable
from ..runs.checks import first_task
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


class StreamProgress(ProgressCallback, StreamCallback):
    """Show progress bars that say which task they belong to, and print a line when a task starts and ends."""

    learned = ""  # the task in training
    prediction_bar: Any  # transformers' own knows None alone

    def on_task_begin(
        self,
        args: PGPTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        task: int,
        stream: TaskStream | None = None,
        training_stream: TaskStream | None = None,
        **kwargs: Any,
    ) -> None:
        self.learned = f"task {task + 1}"
        if stream is None:
            return
        own = training_stream or stream
        before = stream.num_tasks - own.num_tasks  # which are learned with the last one
        self.learned = f"tasks 1 to {task + 1}" if before else self.learned
        if state.is_world_process_zero:
            names = [stream.label_names[label] for label in own.tasks[task - before].classes]
            shown = ", ".join(map(printable, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            title = f"{self.learned} of {stream.num_tasks}{' as one' if before else ''}".capitalize()
            tqdm.write(f"{title}: {len(own.train(task - before))} images of {shown}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"  training {self.learned}")

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
            tqdm.write(
                f"  {', '.join(_figures(results, task))}, protected rank {results['projection_rank'][-1]} -> {folder}"
            )


def _figures(results: dict[str, Any], task: int) -> list[str]:
    """Return what was measured after the 0-based task, in words."""
    average, own = results["average_accuracy"], results["accuracy_matrix"][task][task]
    if average is not None:
        accuracy = f"average accuracy {average:.2f} %"
    elif own is not None:
        accuracy = f"accuracy on task {task + 1} {own:.2f} %, earlier tasks not all measured"
    else:
        accuracy = "accuracy not measured"
    if first_task(results):  # learned as one: there is nothing to compare with
        return [accuracy]
    measured = {
        "forgetting {:.2f}": results["forgetting"],
        "drift {:.3f}": results["drift"][-1],
        "changed selections {:.1f} %": _percent((results.get("changed_selections") or [None])[-1]),
    }
    return [accuracy, *(words.format(value) for words, value in measured.items() if value is not None)]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


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
