"""Presets: published settings as data files, one a method and benchmark, and the print of what a command line means.

`presets/<method>/<name>.json` has the arguments of the example scripts by group, `model`, `data`, `prompts` and
`training`, and says beside them where they come from (`about`), how images are prepared (`preprocessing`), where this
package departs from the released code (`differs`) and what could not be verified (`unsure`).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..cli.experiment import DataArguments, ModelArguments, RunArguments
    from ..training.arguments import PGPTrainingArguments

FOLDER = Path(__file__).resolve().parent
GROUPS = ("model", "data", "prompts", "training")

# A source named on the command line replaces the preset's together with what belongs to that source alone.
_BELONGS = {
    "--model_name_or_path": {"model_revision"},
    "--dataset_name": {"dataset_revision", "dataset_split"},
    "--train_dir": {"dataset_name", "dataset_revision", "dataset_split", "image_column_name", "label_column_name"},
}
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
_OWN = "the backbone's own"


def names(method: str) -> list[str]:
    """Names of a method's presets, sorted."""
    return sorted(path.stem for path in (FOLDER / method).glob("*.json"))


def load(method: str | None, name: str) -> dict[str, Any]:
    """A preset's content.

    Raises:
        ValueError: no such preset; the message lists those there are.
    """
    known = names(method) if method else []
    if name not in known:
        choice = f"choose one of {', '.join(known)}" if known else f"method {method!r} has none"
        raise ValueError(f"preset {name!r} is unknown: {choice}.")
    return json.loads((FOLDER / str(method) / f"{name}.json").read_text(encoding="utf-8"))


def arguments(preset: dict[str, Any], given: Collection[str] = ()) -> list[str]:
    """A preset as command-line arguments, to put before the user's own, which then win.

    Args:
        preset: from `load`.
        given: the options on the user's command line. One that names another backbone or data set drops the preset's
            revision and split, which belong to the preset's own.
    """
    dropped = set().union(*(_BELONGS.get(option, ()) for option in given))
    argv = []
    for group in GROUPS:
        for name, value in preset.get(group, {}).items():
            if name not in dropped:
                argv += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return argv


def describe(
    method: str | None,
    preset: dict[str, Any] | None,
    model: ModelArguments,
    data: DataArguments,
    prompts: Any,
    run: RunArguments,
    training: PGPTrainingArguments,
) -> str:
    """Resolved settings as JSON text, without touching network or disk."""
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    stated = {key: preset[key] for key in ("about", "differs", "unsure") if preset and key in preset}
    seed = training.seed if data.class_order_seed is None else data.class_order_seed
    settings = {
        "method": method,
        "preset": run.preset,
        **stated,
        "model": {
            **{key: value for key, value in vars(model).items() if key not in _PREPROCESSING},
            "model_name_or_path": model.model_name_or_path or "the small backbone inside this package",
        },
        "data": {
            **vars(data),
            "dataset_name": data.dataset_name or data.train_dir or "the handwritten digits of scikit-learn",
            "class_order_seed": seed,
        },
        "preprocessing": {
            **{key: _OWN if getattr(model, key) is None else getattr(model, key) for key in _PREPROCESSING},
            "augmentation": training.augmentation,
            "crop_min_scale": training.crop_min_scale,
            **({"as the preset has it": preset["preprocessing"]} if preset else {}),
        },
        "prompts": vars(prompts),
        "head": run.head,
        "projection": {**run.config().to_dict(), "unprojected twin": run.projection != "none" and not run.no_compare},
        "training": {
            **{key: _plain(getattr(training, key)) for key in _TRAINING},
            "num_train_epochs": 1.0 if data.scenario == "online" else training.num_train_epochs,  # per task
            "images_per_step": per_step,
            "learning_rate_per_256_images": round(training.learning_rate * 256 / per_step, 12),
        },
    }
    return json.dumps(settings, indent=2)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # enums of TrainingArguments
