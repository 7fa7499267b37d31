"""The settings that a run's results depend on: what is recorded of them, and how they are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..methods import ContinualMethod
from ..models import StreamModel

if TYPE_CHECKING:
    from .arguments import PGPTrainingArguments

# the settings of a `Trainer` and of this package that the result of a task depends on
RECORDED = (
    *("seed", "data_seed", "num_train_epochs", "max_steps", "optim", "optim_args", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("learning_rate", "head_learning_rate", "later_prompt_learning_rate", "label_smoothing_factor", "bf16", "fp16"),
    *(
        "augmentation",
        "crop_min_scale",
        "crop_views",
        "last_block",
        "skip_fixed",
        "compile_trunk",
        "exact_images",
        "train_mask",
        "eval_mask",
        "compensate_drift",
    ),
)
# and those that a run which goes on does not take over by itself
_OWN = ("reinit_optimizer", "train_sampling_strategy", "average_tokens_across_devices", "load_best_model_at_end")
# those by which a checkpoint is chosen, or the learning rate, where an evaluation decides on one
_EVALUATED = (
    *("metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps", "eval_delay"),
    *("save_strategy", "save_steps"),
)
# the values that settings of today had in effect before there was a choice, for runs that do not record them
BEFORE: Mapping[str, Any] = {
    "crop_views": None,
    "last_block": "full",
    "skip_fixed": False,
    "compile_trunk": False,
    "exact_images": True,
}
FREE = (
    "where and how often a run logs, saves and uploads, its devices, processes, data loader workers and evaluation batch "
    "size, the division of a step's images into micro-batches (unless batchwise_prompt is set), cache_queries, query_cache, "
    "query_cache_gb, verify_images, figures, keep_samples and save_full_weights"
)
"""Settings that may change when a run is resumed, for error messages."""


def recorded_settings(args: PGPTrainingArguments) -> dict[str, Any]:
    """Return the settings of a `Trainer` that a task's result depends on, ready for JSON: `training` in `results.json`."""
    names = [*RECORDED, *_OWN, *(_EVALUATED if args.metric_for_best_model is not None else ())]
    found = {name: getattr(args, name) for name in names}
    # whatever their division among processes and micro-batches, since that changes nothing
    found["images_per_step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {name: _plain(value) for name, value in found.items()}


def run_settings(args: PGPTrainingArguments, method: ContinualMethod, learner: StreamModel) -> dict[str, Any]:
    """Return all settings that a run's results depend on, by part, ready for JSON: `settings.json` in a checkpoint.

    What is learned is not among them: `stream.json` describes it.
    """
    training, model = recorded_settings(args), learner.settings()
    if model.get("batchwise_prompt"):  # the images of a micro-batch choose their prompts together
        training["per_device_train_batch_size"] = args.per_device_train_batch_size
    projection = {} if method.projection is None else method.projection.config.to_dict()
    parts = {
        "training": training,
        "model": {"name": learner.name, **model},
        "method": {"name": method.name, **method.settings()},
        "projection": projection,
    }
    return {part: _plain(settings) for part, settings in parts.items()}


def differing(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each setting that differs from the recorded one; what only one of the two has is left out."""
    return [
        f"{name}: {now[name]!r}, was {recorded[name]!r}"
        for name in now
        if name in recorded and recorded[name] != now[name]
    ]


def print_differing(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Print the settings that differ from those that a run's last task was trained with."""
    if differ := differing({**BEFORE, **recorded}, now):
        print("Settings that differ from the recorded ones:", *differ, sep="\n  ", flush=True)


def check_same_settings(recorded: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError naming every setting that differs from those that a run was trained with.

    Args:
        recorded, now: by part, as `run_settings` returns them; a part or a setting that an earlier version did not record
            is not compared.
        where: the folder of the run's task or checkpoint.
    """
    differ = []
    for part in now:
        own = recorded.get(part)
        if isinstance(own, Mapping):
            own = {**BEFORE, **own} if part == "training" else own
            differ += [line if part == "training" else f"{part}.{line}" for line in differing(own, now[part])]
    if differ:
        raise ValueError(
            f"{where} was trained with other settings, on which its results depend: {'; '.join(differ)}. Continue with the "
            f"recorded ones, or start a new run in another output_dir. Free to change are {FREE}."
        )


def _plain(value: Any) -> Any:
    """Return a value as JSON would give it back: enums as their value, tuples as lists, what JSON lacks as text."""
    value = getattr(value, "value", value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # an infinite max_grad_norm clips nothing
    return value if isinstance(value, str | int | float | None) else str(value)
