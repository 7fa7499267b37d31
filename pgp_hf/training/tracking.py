"""Show trackers a stream as one run: one global step over all tasks, the task as an axis, and each task's figures."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from ..runs.atomic import write_json
from ..runs.reading import read_json
from .callbacks import fire
from .progress import Progress

_TRACKERS: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())
_FOLDER, _NAME = "runs/stream", "runs/trackio.json"  # within `output_dir`, also where a run is resumed


class StreamHandler(CallbackHandler):
    """Call callbacks as transformers does, but show trackers, those of `report_to`, the whole stream as one run.

    A `Trainer` trains anew for each task, so that trackers would see as many runs, each from step 0. Here they are opened
    with the first task and closed after the last, and see steps counted over all tasks; also in a run that is resumed or
    goes on by `learn`. Their logs have `task` besides, counted from 1, and after each task they get its figures. All other
    callbacks see each task as a `Trainer` trains it.

    Args:
        handler: that of a `Trainer`, whose place this one takes.
        progress: of the run.

    Attributes:
        measuring: True while a stream is evaluated, whose results are logged as a whole.
    """

    def __init__(self, handler: CallbackHandler, progress: Progress) -> None:
        vars(self).update(vars(handler))  # its own initializer would add all callbacks again, with its warnings
        self.progress, self.measuring = progress, False
        self._open: list[TrainerCallback] = []
        self._in_stream = False

    @property
    def trackers(self) -> list[TrainerCallback]:
        """Return the callbacks that are trackers."""
        return [callback for callback in self.callbacks if isinstance(callback, _TRACKERS)]

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Call an event of a `Trainer` on all callbacks."""
        if not self.trackers:
            return super().call_event(event, args, state, control, **kwargs)
        for callback in list(self.callbacks):
            call = self._track if isinstance(callback, _TRACKERS) else self._call
            result = call(callback, event, args, state, control, **kwargs)
            control = control if result is None else result
        return control

    def fire(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call an event of a stream on all callbacks that listen to it."""
        if event == "on_stream_begin":
            self._close(args, state, control)  # from a run of this trainer that was interrupted
            self._in_stream = True
        fire(self.callbacks, event, args, state, control, **kwargs)
        if event == "on_task_end" and state.is_world_process_zero:
            for tracker in self.trackers:
                _show(tracker, kwargs["folder"], kwargs["results"], self._shown(state).global_step, kwargs["task"] + 1)
        if event == "on_stream_end" or (event == "on_task_end" and not self._in_stream):  # that of `train_task` alone
            self._close(args, state, control)
            self._in_stream = False

    def _call(self, callback: TrainerCallback, event: str, *given: Any, **kwargs: Any) -> TrainerControl | None:
        own = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
        return getattr(callback, event)(*given, **{name: getattr(self, name) for name in own}, **kwargs)

    def _track(
        self,
        callback: TrainerCallback,
        event: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl | None:
        """Call an event of a `Trainer` on a tracker, as one of the stream; not at all if it has no meaning there."""
        opened = any(callback is one for one in self._open)
        if (
            event == "on_train_end"
            or (event == "on_train_begin" and opened)
            or (event == "on_predict" and self.measuring)
        ):
            return None
        shown = self._shown(state)
        if event == "on_train_begin":
            self._open.append(callback)
            if state.is_world_process_zero:
                _prepare(callback, args, shown.global_step)
        if "logs" in kwargs and self.progress.task is not None:
            kwargs["logs"] = {**kwargs["logs"], "task": self.progress.task + 1}
        # a checkpoint is named after the step in its task
        return self._call(
            callback, event, _named(callback, args), state if event == "on_save" else shown, control, **kwargs
        )

    def _close(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        for callback in self._open:
            self._call(callback, "on_train_end", _named(callback, args), self._shown(state), control)
        self._open = []

    def _shown(self, state: TrainerState) -> TrainerState:
        """Return the state of a task as one of the stream, whose steps go on over all tasks."""
        shown = copy.copy(state)
        shown.global_step = self.progress.step(state.global_step)
        shown.max_steps = state.max_steps + shown.global_step - state.global_step
        return shown


def _prepare(callback: TrainerCallback, args: TrainingArguments, step: int) -> None:
    """Let a tracker go on with the run in `output_dir`, if it does after this step, and begin a new one otherwise."""
    root = Path(str(args.output_dir))
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is None:
        callback.logging_dir = callback.logging_dir or str(root / _FOLDER)
        make: Callable[..., Any] = callback._SummaryWriter
        # what was logged after the checkpoint that training goes on from, or by an earlier run, is no longer shown
        callback.tb_writer = make(log_dir=callback.logging_dir, purge_step=step + 1 if step else 0)
    if isinstance(callback, TrackioCallback) and not (step and (root / _NAME).is_file()):
        write_json(root / _NAME, {"run_name": f"{root.resolve().name}-{uuid.uuid4().hex[:6]}"})


def _named(callback: TrainerCallback, args: TrainingArguments) -> TrainingArguments:
    """Return the arguments with the name of the run, by which trackio knows one that goes on."""
    path = Path(str(args.output_dir)) / _NAME
    if not isinstance(callback, TrackioCallback) or args.run_name is not None or not path.is_file():
        return args
    args = copy.copy(args)
    args.run_name = str(read_json(path)["run_name"])
    return args


def _show(callback: TrainerCallback, folder: Path, results: dict[str, Any], step: int, task: int) -> None:
    """Log the figures in a task's folder, where the tracker takes images; in TensorBoard, also measures by task.

    TensorBoard has one axis, the step: those are points at the number of the task.
    """
    figures = {f"figures/{file.stem}": file for file in sorted((folder / "figures").glob("*.png"))}
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        for name, file in figures.items():
            with Image.open(file) as image:
                callback.tb_writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        measured = {name: results[name] for name in ("average_accuracy", "forgetting", "learning_accuracy")}
        for name, value in {**measured, "drift": results["drift"][-1]}.items():
            if value is not None:
                callback.tb_writer.add_scalar(f"by_task/{name}", value, task)
        callback.tb_writer.flush()
    elif figures and isinstance(callback, TrackioCallback | WandbCallback):
        library: Any = callback._trackio if isinstance(callback, TrackioCallback) else callback._wandb
        images = {name: library.Image(str(file)) for name, file in figures.items()}
        library.log({**images, "train/global_step": step, "train/task": task})
