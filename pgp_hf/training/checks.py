"""Check training arguments: values that no training can use, and settings that do not work with a stream of tasks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels

from ..data.files import check_utf8
from ..fields import check_fields, check_value


@dataclass(frozen=True)
class Range:
    """The values that an argument may have, without an end but finite where `high` is None.

    Args:
        what: why, for the message.
        above: whether `low` itself is left out.
    """

    low: float
    high: float | None
    what: str
    above: bool = False

    def holds(self, value: float) -> bool:
        """Return True for a value within the range."""
        high = value < float("inf") if self.high is None else value <= self.high
        return high and (value > self.low if self.above else value >= self.low)

    def __str__(self) -> str:
        if self.above:
            above = f"number above {self.low:g}"
            return f"a finite {above}" if self.high is None else f"a {above}, at most {self.high:g}"
        return f"a finite number from {self.low:g}" if self.high is None else f"{self.low:g} to {self.high:g}"


_COUNT, _SEED = Range(1, None, "it counts from 1"), Range(0, 2**32 - 1, "NumPy takes no other seeds")
_RATE = Range(0, None, "it is a learning rate")
_BETA = Range(0, 1 - 2**-24, "it is the share of a moment that Adam keeps at each step")  # below 1 in float32
_RANGES = {
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "dataloader_prefetch_factor": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    "save_total_limit": Range(1, None, "leave it out to keep all checkpoints of the task in training"),
    "ddp_timeout": _COUNT,
    "dataloader_num_workers": Range(0, None, "0 reads images in the process that trains"),
    "seed": _SEED,
    "data_seed": _SEED,
    "learning_rate": _RATE,
    "head_learning_rate": _RATE,
    "later_prompt_learning_rate": _RATE,
    "num_train_epochs": Range(0, None, "it counts passes over a task's images", above=True),
    "warmup_steps": Range(0, None, "it counts steps, or is a share of all steps below 1"),
    "weight_decay": Range(0, None, "weights would grow"),
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": Range(0, None, "it is added to a square root"),
    "max_grad_norm": Range(0, float("inf"), "0 clips nothing"),
    "label_smoothing_factor": Range(0, 1, "it is a share of the target"),
    "eval_delay": Range(0, None, "it counts steps or epochs"),
    "crop_min_scale": Range(0, 1, "it is a share of the image", above=True),
    "keep_samples": Range(0, None, "it counts images"),
    "crop_views": Range(1, None, "it counts crops of an image"),
    "query_cache_gb": Range(0, None, "0 keeps queries in memory alone"),
    "hub_wait": Range(0, float("inf"), "it is a number of seconds"),
}
_CHOICES: dict[str, Any] = {
    "optim": OptimizerNames,
    "lr_scheduler_type": SchedulerType,
    "save_strategy": SaveStrategy,
}
_TEXTS = ("query_cache", "metric_for_best_model", "optim_args", "run_name", "hub_model_id", "hub_base_model")
_CASTS = "would cast the prompts permanently, and rounding would undo the projection: use bf16=True, which keeps them in float32."
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bf16_full_eval": ((True,), _CASTS),
    "fp16_full_eval": ((True,), _CASTS),
    "dataloader_drop_last": (
        (True,),
        "would leave test images out of the evaluation, and small tasks out of the training: leave it False.",
    ),
    "eval_do_concat_batches": ((False,), "leaves test images in pieces: leave it True."),
    "enable_jit_checkpoint": (
        (True,),
        "would end a task before its last step and count it as finished: leave it False, a run saves on SIGTERM.",
    ),
    "remove_unused_columns": ((True,), "would drop the images before they are read: leave it False."),
    "prediction_loss_only": (
        (True,),
        "would leave the evaluation of the stream without predictions: leave it False.",
    ),
    "batch_eval_metrics": (
        (True,),
        "would leave the evaluation of the stream without predictions, which it keeps for a task at a time: leave it "
        "False.",
    ),
    "ignore_data_skip": (
        (True,),
        "would train on a task's first images again after a resume, and not on its last: leave it False.",
    ),
    "train_sampling_strategy": (
        ("group_by_length", "batch_rebalance"),
        "sorts texts by their length, which images do not have: leave it 'random', or use 'sequential'.",
    ),
}


def check_values(args: TrainingArguments) -> None:
    """Raise TypeError or ValueError for the first argument whose value no training can use, and say what it may be."""
    check_fields(args)
    for name, kind in _CHOICES.items():
        check_value(name, getattr(args, name), kind)
    for name in _TEXTS:
        if (text := getattr(args, name)) is not None and not isinstance(text, str | os.PathLike):
            raise TypeError(f"{name}={text!r:.80}: expected text, or None to leave it out.")
    for name in ("log_level", "log_level_replica"):
        if getattr(args, name) not in trainer_log_levels:
            raise ValueError(
                f"{name}={getattr(args, name)!r} is unknown: choose one of {', '.join(trainer_log_levels)}."
            )
    for name, range_ in _RANGES.items():
        value = getattr(args, name, None)  # some are None, or of other versions of transformers
        if value is not None and not range_.holds(value):
            raise ValueError(f"{name}={value} is out of range: expected {range_} ({range_.what}).")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(
            f"max_steps={args.max_steps} is out of range: use at least 1, or -1 to train for num_train_epochs."
        )
    for name, strategy in (
        ("logging_steps", args.logging_strategy),
        ("eval_steps", args.eval_strategy),
        ("save_steps", args.save_strategy),
    ):
        every = getattr(args, name)
        if getattr(strategy, "value", strategy) == IntervalStrategy.STEPS.value and every is not None:
            _check_interval(name, every)


def _check_interval(name: str, every: float) -> None:
    """Raise ValueError unless something can happen every so many steps."""
    if not 0 < every < float("inf") or (every > 1 and every != int(every)):
        raise ValueError(
            f"{name}={every} is out of range: use a whole number of steps from 1, or a share of all steps below 1."
        )


def refuse_what_breaks_streams(args: TrainingArguments) -> None:
    """Raise ValueError for settings of a `Trainer` that do not work with a stream of tasks."""
    for name, (refused, why) in _REFUSED.items():
        if (value := getattr(args, name, None)) in refused:
            raise ValueError(f"{name}={value} {why}")
    if isinstance(args.accelerator_config, AcceleratorConfig) and not args.accelerator_config.use_seedable_sampler:
        raise ValueError(
            "accelerator_config with use_seedable_sampler=False would draw another order of images after a resume, and train "
            "on some of them again and on others not at all: leave it True."
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise to the embeddings of words, which images do not "
            "have: leave it out."
        )
    if args.deepspeed:
        raise ValueError(
            "deepspeed steps flattened shards, which cannot be projected, and prompts are far too small to gain "
            "from it: launch with plain data parallelism (accelerate launch --multi_gpu)."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process mean nn.DataParallel, whose replicas share the prompt selection: "
            "start with `accelerate launch`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )


def check_output_dir(folder: str) -> None:
    """Raise ValueError for a path where there cannot be a folder, or whose files safetensors cannot read."""
    check_utf8(folder)
    for path in (Path(folder), *Path(folder).parents):
        if path.is_file():
            raise ValueError(f"output_dir={folder}: {path} is a file. Choose a folder, which need not be there yet.")


def check_reporting(args: TrainingArguments) -> None:
    """Raise ValueError for a tracker that is unknown, ImportError for one whose package is missing."""
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to={name!r} is unknown: choose none, all, or some of {known}.")
        if name not in {*get_available_reporting_integrations(), "azure_ml", "flyte"}:  # which that may leave out
            raise ImportError(
                f"report_to={name!r} needs a package that is not installed here: leave it out, or install it."
            )


def refuse_whole_compilation(args: TrainingArguments) -> None:
    """Raise ValueError where a `Trainer` would compile the whole model, with the hooks that select prompts in it."""
    given = [
        f"{name}={value}"
        for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode")
        if (value := getattr(args, name, None))
    ]
    by_launcher = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if not given and by_launcher.lower() != "no":
        given = [
            f"ACCELERATE_DYNAMO_BACKEND={by_launcher}, as `accelerate launch --dynamo_backend` or another Trainer sets it,"
        ]
    if given:
        raise ValueError(
            f"{given[0]} compiles the whole model, whose selection of prompts and head change from task to task: leave it "
            "out. compile_trunk=True compiles the frozen blocks of a model with prompts, once."
        )


def check_together(args: TrainingArguments) -> None:
    """Raise ValueError for settings that cannot work together."""
    if not args.dataloader_num_workers:
        for name, unused in (("dataloader_persistent_workers", False), ("dataloader_multiprocessing_context", None)):
            if (value := getattr(args, name, unused)) != unused:
                raise ValueError(f"{name}={value} needs workers: set dataloader_num_workers, to 4 for example.")
    steps, weights = 100, [torch.nn.Parameter(torch.zeros(()))]
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD(weights, lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]  # text has become a dict
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r} cannot be used with learning_rate="
            f"{args.learning_rate:g} and lr_scheduler_kwargs={args.lr_scheduler_kwargs} ({error}): change one of them."
        ) from error
