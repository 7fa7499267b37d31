"""Print for `--dry_run` all settings that a command line results in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..data.scenarios import SCENARIOS
from ..training.arguments import PGPTrainingArguments
from .arguments import Arguments, DataArguments, ModelArguments
from .recipes import as_published

_TRAINING = (
    "output_dir",
    "seed",
    "optim",
    "optim_args",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "per_device_eval_batch_size",
    "reinit_optimizer",
    "train_mask",
    "eval_mask",
)
_PREPROCESSING = ("image_size", "image_mean", "image_std")
_NOTES = ("about", "differs", "unsure")
_OWN = "the backbone's own"


def describe(method: str, preset: dict[str, Any] | None, arguments: Arguments) -> str:
    """Return the settings as JSON text, without touching network or disk.

    Args:
        method: of the example, such as "l2p".
        preset: content of the preset, whose notes are printed too; None without one.
        arguments: of the command line.
    """
    model, data, prompts, run, training = arguments
    notes: dict[str, Any] = {key: preset[key] for key in _NOTES if preset and key in preset}
    settings: dict[str, Any] = {
        "method": method,
        "preset": run.preset,
        **notes,
        **_sources(model, data, training),
        "preprocessing": {
            **_preprocessing(model, training),
            **({"as the preset has it": preset["preprocessing"]} if preset else {}),
        },
        "prompts": vars(prompts),
        "head": run.head,
        "projection": {**run.config().to_dict(), "unprojected twin": run.projection != "none" and not run.no_compare},
        "training": _training(data, training),
    }
    if run.main_job and not run.no_compare:
        other = as_published(arguments)
        settings["beside it, as published"] = {
            "prompts": vars(other.prompts),
            "head": other.run.head,
            "projection": other.run.config().to_dict(),
        }
    return json.dumps(settings, indent=2)


def describe_methods(
    methods: Mapping[str, dict[str, Any]],
    presets: Mapping[str, dict[str, Any]],
    trainable: str,
    model: ModelArguments,
    data: DataArguments,
    training: PGPTrainingArguments,
) -> str:
    """Return the settings of runs that train the model itself as JSON text, likewise.

    Args:
        methods: the settings of each method by its name.
        presets: content of the presets by their names, whose notes are printed too.
        trainable: what of the model learns.
        model, data, training: of the command line.
    """
    settings = {
        "methods": methods,
        "presets": {name: {key: preset[key] for key in _NOTES if key in preset} for name, preset in presets.items()},
        "trainable": trainable,
        **_sources(model, data, training),
        "preprocessing": {
            **_preprocessing(model, training),
            **{
                f"as {name} has it": preset["preprocessing"]
                for name, preset in presets.items()
                if "preprocessing" in preset
            },
        },
        "training": {**_training(data, training), "head_learning_rate": training.head_learning_rate},
    }
    return json.dumps(settings, indent=2)


def _sources(model: ModelArguments, data: DataArguments, training: PGPTrainingArguments) -> dict[str, Any]:
    return {
        "model": {
            **{key: value for key, value in vars(model).items() if key not in _PREPROCESSING},
            "model_name_or_path": model.model_name_or_path or "the small backbone inside this package",
        },
        "data": {
            **vars(data),
            "dataset_name": data.dataset_name or data.train_dir or "the handwritten digits of scikit-learn",
            "class_order_seed": training.seed if data.class_order_seed is None else data.class_order_seed,
        },
    }


def _preprocessing(model: ModelArguments, training: PGPTrainingArguments) -> dict[str, Any]:
    return {
        **{key: _OWN if getattr(model, key) is None else getattr(model, key) for key in _PREPROCESSING},
        "augmentation": training.augmentation,
        "crop_min_scale": training.crop_min_scale,
    }


def _training(data: DataArguments, training: PGPTrainingArguments) -> dict[str, Any]:
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return {
        **{key: _plain(getattr(training, key)) for key in _TRAINING},
        "num_train_epochs": 1.0 if SCENARIOS[data.scenario].one_epoch else training.num_train_epochs,  # per task
        "images_per_step": per_step,
        "learning_rate_per_256_images": round(training.learning_rate * 256 / per_step, 12),
    }


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # enums of TrainingArguments
