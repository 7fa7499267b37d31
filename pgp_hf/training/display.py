"""Show how a stream goes on, in a terminal or a log file: bars, losses, and a line when a task starts and ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.markup import shorten_names
from ..data.stream import TaskStream
from ..report.formatting import WIDTH, fill, printable
from ..runs.checks import first_task
from .arguments import PGPTrainingArguments
from .callbacks import StreamCallback
from .choosing import CURRENT

_UNTOLD = ("epoch", "grad_norm", "total_flos", "train_runtime", "learning_rate")
_RATES = ("_runtime", "_per_second", "_model_preparation_time")


class StreamLines(StreamCallback):
    """Print a line when a task starts and ends."""

    learned = ""  # the task in training

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
            shown = shorten_names(list(map(printable, names)), 6)
            title = f"{self.learned} of {stream.num_tasks}{' as one' if before else ''}".capitalize()
            tqdm.write(fill(f"{title}: {len(own.train(task - before))} images of {shown}", "    "))

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
            rank = f"protected rank {results['projection_rank'][-1]}"
            tqdm.write(fill(f"  {', '.join([*_figures(results, task), rank])} -> {folder}", "    "))


class StreamProgress(ProgressCallback, StreamLines):
    """Show progress bars that say which task they belong to, with the loss; without a terminal, a line for each task."""

    training_bar: Any  # transformers' own know None alone
    prediction_bar: Any
    losses: list[float]  # logged in the task in training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.losses, self.current_step = [], 0
        if state.is_world_process_zero:
            words = f"  training {self.learned}"
            self.training_bar = tqdm(total=state.max_steps, desc=words, dynamic_ncols=True, disable=None)

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
                total=len(eval_dataloader), desc="  evaluation", leave=False, dynamic_ncols=True, disable=None
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
        # outside of training, the line at the end of the task has it
        if self.training_bar is None or logs is None or "train_runtime" in logs:
            return
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.training_bar.set_postfix_str(f"loss {self.losses[-1]:.4g}", refresh=False)
        elif words := in_words(logs):
            tqdm.write(_line(f"step {state.global_step} of {state.max_steps}", words))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None and self.training_bar.disable and self.losses:
            fell = " -> ".join(f"{loss:.4g}" for loss in dict.fromkeys((self.losses[0], self.losses[-1])))
            tqdm.write(f"  {state.global_step} steps, loss {fell}")
        super().on_train_end(args, state, control, **kwargs)


class StreamPrinter(PrinterCallback, StreamLines):
    """Print a short line for all that is logged, and no bar, and a line when a task starts and ends."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if any(name.endswith("_projection_rank") for name in logs or ()):  # the line at the end of the task has it
            return
        if state.is_world_process_zero and (words := in_words(logs or {})):
            print(_line(f"step {state.global_step} of {state.max_steps}", words), flush=True)


def in_words(logs: Mapping[str, Any]) -> str:
    """Return what is logged in words; empty where it is of a single task's evaluation, which the stream's follows."""
    told = {}
    for name, value in logs.items():
        plain = name.removeprefix("eval_").removeprefix("stream_")
        of_task = name.startswith("eval_") and plain.startswith("task_")
        if not (of_task or name in _UNTOLD or name.endswith(_RATES)):
            told[plain.replace("_", " ")] = f"{value:.4g}" if isinstance(value, float) else printable(value)
    return ", ".join(f"{name.removeprefix(f'{CURRENT} ')} {value}" for name, value in told.items())


def _line(at: str, words: str) -> str:
    line = f"  {at}: {words}"
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


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
