"""Choose by evaluations, and only ever on a validation split: a checkpoint, when to stop, a learning rate.

While a task is trained, the images of every task so far are evaluated, under names such as `eval_task_2_accuracy`. What is
chosen by must exist in every task: `eval_current_accuracy`, of the task in training, and
`eval_mean_accuracy`, the mean over the tasks so far; likewise `..._loss` and whatever `compute_metrics` returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from ..data.stream import TaskStream

CURRENT, MEAN = "current", "mean"
CURRENT_ACCURACY = f"eval_{CURRENT}_accuracy"
_PLATEAU = ("reduce_lr_on_plateau", "greedy")
_UNMEASURED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def summarize(
    metrics: Mapping[str, float], current: Sequence[str], seen: Sequence[str], prefix: str
) -> dict[str, float]:
    """Return the metrics of the task in training, and their means over all tasks, under names that every task has.

    Args:
        metrics: of each task by "PREFIX_TASK_METRIC".
        current: the tasks in training, usually one; nothing is returned of them where they have no images.
        seen: all tasks that were evaluated, among them the current ones.
        prefix: such as "eval".
    """
    found: dict[str, float] = {}
    for name, tasks in ((CURRENT, current), (MEAN, seen)):
        own = [_of_task(metrics, f"{prefix}_{task}_") for task in tasks]
        for metric in own[0] if own else ():
            values = [one[metric] for one in own if metric in one]
            if len(values) == len(own):
                found[f"{prefix}_{name}_{metric}"] = sum(values) / len(values)
    return found


def _of_task(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the metrics with a prefix, without it; times are left out."""
    own = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: value for name, value in own.items() if name not in _UNMEASURED}


def chooses(args: TrainingArguments, callbacks: Iterable[TrainerCallback] = ()) -> str | None:
    """Return the argument or callback by which an evaluation decides on the model; None if none does."""
    for name, used in (
        ("load_best_model_at_end", (True,)),
        ("save_strategy", ("best",)),
        ("lr_scheduler_type", _PLATEAU),
    ):
        value = getattr(args, name)
        if (plain := getattr(value, "value", value)) in used:
            return f"{name}={plain!r}"
    early = next((one for one in callbacks if isinstance(one, EarlyStoppingCallback)), None)
    return None if early is None else type(early).__name__


def check_choice(
    args: TrainingArguments, stream: TaskStream, callbacks: Iterable[TrainerCallback], own_metrics: bool
) -> None:
    """Raise ValueError unless whatever an evaluation decides on has a metric that exists, of images held out for it.

    Args:
        own_metrics: whether `compute_metrics` is the user's, who alone knows the names of its values.
    """
    by, metric = chooses(args, callbacks), args.metric_for_best_model
    if metric is None and by is not None:
        raise ValueError(f"{by} needs a metric: metric_for_best_model={CURRENT_ACCURACY!r}, for example.")
    evaluates = getattr(args.eval_strategy, "value", args.eval_strategy) != "no"
    if by is not None and not evaluates:
        raise ValueError(f"{by} needs evaluations while a task is trained: set eval_strategy='epoch', for example.")
    if metric is not None and evaluates:
        _check_name(metric, own_metrics)
    if by is None:
        return
    if not stream.num_tasks or not all(stream.has_validation(t) for t in range(stream.num_tasks)):
        raise ValueError(
            f"{by} would choose by test images, whose accuracies then no longer tell how the model does on new images: hold "
            "out validation images of each task, TaskStream.from_dataset(..., train_val_split=0.1) or --train_val_split 0.1."
        )
    _check_mode(args)


def _check_name(metric: str, own_metrics: bool) -> None:
    """Raise ValueError unless a metric exists in every task."""
    known = [f"eval_{name}_{value}" for value in ("accuracy", "loss") for name in (CURRENT, MEAN, "task_1")]
    full = metric if metric.startswith("eval_") else f"eval_{metric}"  # as transformers reads it
    stems = tuple(f"eval_{name}_" for name in (CURRENT, MEAN, "task_1"))
    if full not in known and not (own_metrics and full.startswith(stems)):
        own = ", or the same of a value that compute_metrics returns" if own_metrics else ""
        raise ValueError(
            f"metric_for_best_model={metric!r} is not measured in every task: choose one of {', '.join(known)}{own}."
        )


def _check_mode(args: TrainingArguments) -> None:
    """Raise ValueError if a schedule waits for a metric to fall that is the better the greater it is, or the reverse."""
    schedule: Any = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if schedule not in _PLATEAU:
        return
    settings = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
    mode, expected = settings.get("mode", "min"), "max" if args.greater_is_better else "min"
    if mode != expected:
        raise ValueError(
            f"lr_scheduler_type={schedule!r} treats {'lower' if mode == 'min' else 'greater'} values of "
            f"{args.metric_for_best_model!r} as better, and greater_is_better={args.greater_is_better}: add "
            f"lr_scheduler_kwargs={{'mode': {expected!r}}}."
        )
