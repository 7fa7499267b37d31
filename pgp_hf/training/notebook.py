"""Show how a stream goes on in a notebook: for each task a bar and a table of losses. It needs IPython."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from .display import StreamLines

_COLUMNS = {
    "eval_current_accuracy": "Accuracy",
    "eval_mean_accuracy": "Mean accuracy of all tasks",
    "eval_current_loss": "Validation loss",
}


class NotebookProgress(NotebookProgressCallback, StreamLines):
    """Show a bar and a table for each task, with the losses of its steps and what is evaluated while it is trained."""

    training_tracker: Any  # transformers' own know None alone
    prediction_bar: Any

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_column = "Step"
        self.training_tracker = NotebookTrainingTracker(state.max_steps)
        self.training_tracker.prefix = f"Training {self.learned}"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_tracker is None or not logs:
            return
        values = {"Training loss": logs["loss"]} if "loss" in logs else {}
        values |= {column: round(logs[name], 4) for name, column in _COLUMNS.items() if name in logs}
        if values:
            self.training_tracker.write_line({"Step": state.global_step, **values})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_tracker is None:  # a call of the user's own
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            return
        self.training_tracker.remove_child()  # the bar of a task's evaluation; `on_log` has its values
        self.prediction_bar, self._force_next_update = None, True
