"""Configurations of runs, drawn from values that work and values that cannot, and what becomes of such a run."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from accelerate.utils import set_seed
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from pgp_hf import (
    DualPromptConfig,
    L2PConfig,
    PGPTrainer,
    ProjectionConfig,
    StreamTrainer,
    TaskStream,
    load_pretrained,
)
from pgp_hf.methods import create

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Values:
    """Values of a setting: those that some run can have, and those that none can."""

    good: tuple[Any, ...]
    bad: tuple[Any, ...] = ()

    def __add__(self, good: tuple[Any, ...]) -> Values:
        return Values((*self.good, *good), self.bad)


def some(*good: Any) -> Values:
    """Return values that runs can have."""
    return Values(good)


def none(*bad: Any) -> Values:
    """Return values that no run can have."""
    return Values((), bad)


COUNT = Values((1, 2, 3, 100), (-1, 2.5, "2", True))
WEIGHT = Values((0.5, 1), (-1, NAN, "x"))
SHARE = Values((0.1, 0.5), (1.1, -1, NAN, "x"))
SWITCH = Values((True, False), (None, "yes", 1))

L2P = {
    "pool_size": Values((2, 3, 10), (0, *COUNT.bad, None)),
    "prompt_length": Values((0, 1, 3), COUNT.bad),
    "top_k": Values((0, 1, 4), (11, *COUNT.bad, None)),
    "grow_pool": COUNT + (None,),
    "head_type": Values(("token", "prompt"), ("bogus", None)),
    "batchwise_prompt": SWITCH,
}
DUALPROMPT = {
    "pool_size": Values((2, 10), (0, *COUNT.bad, None)),
    "general_length": COUNT + (0,),
    "expert_length": COUNT + (0,),
    "general_layers": Values(([], [1], [0, 1], (1,)), ([5], [-1], "0", None, [0, 0], [0.0], 1)),
    "expert_layers": Values(([0], [0, 1], (1,)), ([2], [-1], "1", None, [1, 1], ["1"], {})),
    "grow_pool": SWITCH,
    "copy_previous": SWITCH,
    "selection": Values(("key", "statistics", "mixture"), ("bogus", None)),
}
PROMPTS = {
    "pull_constraint_coeff": WEIGHT + (0,),
    "head": Values(("statistics", "statistics", "linear"), ("bogus", None)),
    "shrinkage": SHARE + (1, 1e-12),
    "interpolate_pos_encoding": SWITCH,
    "modules_to_save": Values((None, [], ["classifier"])),
}
PROJECTION = {
    "method": Values(("functional", "attention", "frozen", "none"), ("bogus", None)),
    "energy": SHARE + (0.999999, 1),
    "key_energy": SHARE + (None, 1.0),
    "value_energy": SHARE + (None, 1.0),
    "apply_to": Values(("update", "gradient", "both"), ("bogus", None)),
    "max_images": COUNT + (None,),
    "probes": Values((1, 3), (0, *COUNT.bad, None)),
    "probe_space": Values(("features", "logits", "statistics"), ("bogus", None)),
    "hold_key_norm": SWITCH,
    "ln_penalty": WEIGHT + (0,),
    "softness": WEIGHT + (0,),
    "equal_images": SWITCH,
    "all_keys": SWITCH,
    "bf16_probes": SWITCH,
}
METHODS: dict[str, dict[str, Values]] = {
    "fine_tuning": {},
    "joint": {},
    "lwf": {"strength": WEIGHT, "temperature": WEIGHT},
    "ewc": {
        "strength": WEIGHT,
        "gamma": SHARE,
        "mode": Values(("online", "separate"), ("bogus", None)),
        "labels": Values(("sampled", "exact", "true"), ("bogus", 1)),
        "max_images": COUNT,
    },
    "derpp": {
        "memory_size": COUNT + (0,),
        "alpha": WEIGHT,
        "beta": WEIGHT,
        "memory_stores": Values(("places", "images"), ("bogus", None)),
    },
    "icarl": {"memory_size": COUNT, "memory_per_class": COUNT},
    "bic": {"memory_size": COUNT, "validation_share": SHARE, "temperature": WEIGHT},
    "der_mcg": {
        "memory_size": COUNT,
        "combine": Values(("log", "multiply"), ("bogus", None)),
        "gate_epochs": Values((0, 1), COUNT.bad),
        "tuning_epochs": Values((0, 1), COUNT.bad),
        "gate_batch_size": COUNT,
    },
    "gpm": {"energy": SHARE, "max_images": COUNT},
    "null_space_adam": {"energy": SHARE, "a": WEIGHT + (30,)},
}
FIXED = {
    "bic": {"validation_share": 0.3},
    "der_mcg": {"gate_epochs": 1, "tuning_epochs": 1},
}  # of small classes, and quick
ARGUMENTS = {
    "num_train_epochs": Values((0.5, 1, 2), (0, -1, NAN, INF, None, "1")),
    "max_steps": Values((1, 3, -1), (0, 2.5, "2", None)),
    "per_device_train_batch_size": Values((1, 3, 100), (0, *COUNT.bad, None)),
    "per_device_eval_batch_size": Values((1, 3, 100), (0, *COUNT.bad, None)),
    "gradient_accumulation_steps": Values((2, 5), (0, *COUNT.bad, None)),
    "learning_rate": Values((0, 0.1, 1e-30), (-1, NAN, INF, None, "1e-3")),
    "later_prompt_learning_rate": WEIGHT + (0, None),
    "head_learning_rate": WEIGHT + (None,),
    "optim": Values(
        ("sgd", "adamw_torch", "adamw_torch_fused", "adafactor", "rmsprop", "adagrad"),
        ("lomo", "schedule_free_adamw", "bogus", None),
    ),
    "optim_args": none("bogus", "bogus=1"),
    "lr_scheduler_type": Values(
        ("linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"),
        ("cosine_with_min_lr", "reduce_lr_on_plateau", "bogus", None),
    ),
    "lr_scheduler_kwargs": Values(({}, None), ({"bogus": 1},)),
    "warmup_steps": Values((1, 5, 0.5, 100), (-1, NAN, INF, None)),
    "weight_decay": WEIGHT + (0,),
    "adam_beta1": SHARE + (0,),
    "adam_beta2": SHARE,
    "adam_epsilon": Values((1e-4,), (-1, NAN, None)),
    "max_grad_norm": Values((0, 0.1, INF), (-1, NAN, None)),
    "label_smoothing_factor": SHARE + (1, 0),
    "augmentation": Values(("none", "flip", "crop_flip"), ("bogus", None)),
    "crop_min_scale": SHARE + (1,),
    "crop_views": Values((1, 3, None), COUNT.bad),
    "exact_images": SWITCH,
    "process_on_device": SWITCH,
    "last_block": Values(("full", "read"), ("bogus", None)),
    "skip_fixed": SWITCH,
    "compile_trunk": Values((False,), SWITCH.bad),  # compiling takes long
    "train_mask": Values(("seen", "task"), ("bogus", None)),
    "eval_mask": Values(("seen", "none"), ("bogus", None)),
    "compensate_drift": SWITCH,
    "reinit_optimizer": SWITCH,
    "cache_queries": SWITCH,
    "query_cache_gb": Values((0, 1e-6, 0.5), (-1, NAN, INF, "x", None)),
    "verify_images": SWITCH,
    "bf16": SWITCH,
    "fp16": none(True),
    "bf16_full_eval": none(True),
    "activation_checkpointing": some(True, False),
    "auto_find_batch_size": SWITCH,
    "average_tokens_across_devices": SWITCH,
    "use_cache": SWITCH,
    "neftune_noise_alpha": none(5.0, -1),
    "torch_empty_cache_steps": COUNT,
    "save_strategy": Values(("no", "steps", "epoch"), ("best", "bogus", None)),
    "save_steps": Values((0.5, 1), ("x", None)),
    "save_total_limit": COUNT,
    "save_only_model": SWITCH,
    "eval_strategy": Values(("no", "steps", "epoch"), ("bogus",)),
    "eval_steps": Values((0.5, 1, None), ("x",)),
    "eval_delay": WEIGHT,
    "eval_on_start": SWITCH,
    "eval_accumulation_steps": COUNT,
    "eval_do_concat_batches": none(False),
    "eval_use_gather_object": SWITCH,
    "logging_strategy": Values(("no", "steps", "epoch"), ("bogus", None)),
    "logging_steps": Values((0.5, 1), ("x", None)),
    "logging_first_step": SWITCH,
    "load_best_model_at_end": Values((False,), (True, None)),
    "metric_for_best_model": some("eval_current_accuracy", "eval_mean_loss", "loss", "bogus"),
    "greater_is_better": Values((True, False, None), ("yes",)),
    "prediction_loss_only": Values((False,), (True, None)),
    "batch_eval_metrics": none(True),
    "include_for_metrics": some(["inputs"], ["loss"]),
    "label_names": some(["labels"], ["bogus"]),
    "seed": Values((0, 2**32 - 1), (2**40, -1, 1.5, None)),
    "data_seed": Values((0, 2**32 - 1), (2**40, -1, "x")),
    "train_sampling_strategy": Values(("sequential", "random"), ("group_by_length", "bogus")),
    "ignore_data_skip": none(True),
    "dataloader_drop_last": none(True),
    "dataloader_num_workers": none(-1, 1.5, None),
    "dataloader_persistent_workers": none(True),
    "dataloader_prefetch_factor": none(*COUNT.good, *COUNT.bad),
    "remove_unused_columns": none(True),
    "log_level": Values(("info", "passive"), ("loud", None)),
    "report_to": Values(("none",), ("bogus",)),
    "logging_nan_inf_filter": SWITCH,
    "figures": Values(("each", "last", "none"), ("bogus", None)),
    "keep_samples": Values((0, 2, 100), COUNT.bad),
    "save_full_weights": Values(("last", "all"), ("bogus", None)),
    "overwrite_output_dir": SWITCH,
    "hub_license": Values(("apache-2.0", None), ("Apache 2.0", 2)),
}
STREAM = {
    "num_tasks": Values((1, 3, 4), (0, 100, *COUNT.bad, None)),
    "scenario": Values(("task_incremental", "online"), ("bogus", None, ["online"])),
    "seed": Values((None, 3, 2**40), (-1, 1.5, "x")),
    "class_order": Values(([3, 2, 1, 0], (0, 2, 1, 3)), ([0, 1], [0, 0, 1, 2], "x", [0, 1, 2, 5], 3)),
    "shift": Values(("renderings", None), ("bogus", 1)),
    "test_fraction": SHARE,
    "train_val_split": Values((0.25, 0.5), SHARE.bad),
    "max_train_samples_per_class": COUNT + (None,),
    "max_eval_samples_per_class": COUNT + (None,),
}
MODELS = ["l2p", "l2p", "dualprompt", "full", "last:1", "head", "lora:2"]


@dataclass
class Configuration:
    """A model, how it learns what, and the settings that differ from those of a short run, by part and name."""

    model: str
    method: str
    given: dict[tuple[str, str], Any]

    def part(self, name: str) -> dict[str, Any]:
        """Return the settings of a part."""
        return {key: value for (part, key), value in self.given.items() if part == name}

    def is_named(self, message: str) -> bool:
        """Return whether an error names a setting that was given, or one by its value, the method or the model."""
        others = [name for table in tables(self.model, self.method).values() for name in table]
        named = [rf"\b{name}\b" for _, name in self.given] + [rf"\b{name}=" for name in others]
        return any(re.search(name, message) for name in (*named, repr(self.method), repr(self.model)))


def tables(model: str, method: str) -> dict[str, dict[str, Values]]:
    """Return the settings that a run with such a model can have, by part."""
    prompts = {"l2p": {**L2P, **PROMPTS}, "dualprompt": {**DUALPROMPT, **PROMPTS}}
    learned = {"adapter": prompts[model], "method": PROJECTION} if model in prompts else {"method": METHODS[method]}
    return {part: table for part, table in {**learned, "arguments": ARGUMENTS, "stream": STREAM}.items() if table}


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """Draw a configuration with up to four settings of its own, in every second of which one has a value that none can."""
    model = draw(st.sampled_from(MODELS))
    prompts = model in ("l2p", "dualprompt")
    method = "projected_prompts" if prompts else draw(st.sampled_from(sorted(METHODS)))
    parts = tables(model, method)
    given: dict[tuple[str, str], Any] = {}
    for bad in draw(st.sampled_from([(False,), (False, False, False, False), (True,), (False, False, True)])):
        part = draw(st.sampled_from(list(parts)))  # so that the many arguments of a `Trainer` do not hide the rest
        values = {name: one.bad if bad else one.good for name, one in parts[part].items()}
        name = draw(st.sampled_from([name for name, own in values.items() if own]))
        given[part, name] = draw(st.sampled_from(values[name]))
    return Configuration(model, method, given)


@cache
def images() -> Any:
    """Return the splits that all runs learn: four classes of four training images and two test images."""
    return tiny.data(classes=4, train=4, test=2)


class Started(TrainerCallback):
    """Notes whether a step was taken."""

    steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


@dataclass
class Run:
    """A run of a configuration; `end` says what became of it.

    Attributes:
        frozen: parameters that do not learn, as they were.
    """

    configuration: Configuration
    folder: Path
    started: Started = field(default_factory=Started)
    frozen: dict[str, Tensor] = field(default_factory=dict)

    def end(self) -> str:
        """Train and check what was trained, "trained", or be refused before training, "refused".

        Raises:
            AssertionError: neither.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                trainer = self._trained()
            except (TypeError, ValueError, ImportError) as error:
                assert not self.started.steps, f"refused after {self.started.steps} steps: {error}"
                assert not list(self.folder.rglob("results.json")), f"refused after a task: {error}"
                assert self.configuration.is_named(str(error)), f"no setting is named: {error}"
                return "refused"
            self._check(trainer)
        return "trained"

    def _trained(self) -> StreamTrainer:
        given, model = self.configuration, self.configuration.model
        set_seed(1)
        stream = TaskStream.from_dataset(images(), **{"num_tasks": 2, **given.part("stream")})
        base = tiny.backbone(num_labels=stream.num_classes, id2label=stream.id2label)
        arguments = {"num_train_epochs": 1, "learning_rate": 0.01, **given.part("arguments")}
        args = tiny.arguments(self.folder, **arguments)
        own = {"processing_class": tiny.processor(), "callbacks": [self.started]}
        trainer: StreamTrainer
        if given.method == "projected_prompts":
            projection = ProjectionConfig(**given.part("method"))
            learner = tiny.model(_adapter(model, given.part("adapter")), base)
            self._keep(learner)
            trainer = PGPTrainer(learner, args, stream, projection, **own)
        else:
            method = create(given.method, **{**FIXED.get(given.method, {}), **given.part("method")})
            plain = tiny.plain(model, base)
            self._keep(plain)
            trainer = StreamTrainer(plain, args, stream, method, **own)
        trainer.train()
        return trainer

    def _keep(self, model: torch.nn.Module) -> None:
        self.frozen = {name: one.detach().clone() for name, one in model.named_parameters() if not one.requires_grad}

    def _check(self, trainer: StreamTrainer) -> None:
        """Raise AssertionError unless a finished run is as it should be."""
        results, stream = trainer.results, trainer.stream
        assert results.first + len(results.matrix) == stream.num_tasks
        for name, value in trainer.model.named_parameters():
            assert torch.isfinite(value).all(), f"{name} is not finite"
            assert name not in self.frozen or torch.equal(value, self.frozen[name]), f"{name} has moved"
        for name, basis in load_file(self.folder / "projection.safetensors").items():
            product = basis.double().mT @ basis.double()
            own = torch.diag_embed((product.diagonal(dim1=-2, dim2=-1) > 0.5).double())  # others pad a batch of bases
            assert torch.allclose(product, own, rtol=0, atol=1e-6), f"the basis of {name} is not orthonormal"
        self._check_predictions(trainer)

    def _check_predictions(self, trainer: StreamTrainer) -> None:
        """Raise AssertionError unless a classifier that is loaded is as accurate as the results say."""
        given, stream = self.configuration, trainer.stream
        if trainer.args.bf16 or given.part("adapter").get("batchwise_prompt") or stream.scenario == "task_incremental":
            return  # which depend on precision, the batch and the task
        base = tiny.backbone(num_labels=stream.num_classes) if isinstance(trainer.model, PeftModel) else None
        loaded = load_pretrained(self.folder, backbone=base, eval_mask=trainer.args.eval_mask)
        for j, expected in enumerate(trainer.results.matrix[-1]):
            test = stream.test(j)
            found = loaded.predict([test[i]["image"] for i in range(len(test))])
            right = [
                one[0]["label"] == stream.label_names[label] for one, label in zip(found, test.labels, strict=True)
            ]
            assert abs(100 * np.mean(right) - expected) < 1e-6, f"task {j + 1}: {100 * np.mean(right)}, not {expected}"


def _adapter(model: str, given: dict[str, Any]) -> L2PConfig | DualPromptConfig:
    if model == "l2p":
        return L2PConfig(**{"pool_size": 4, "prompt_length": 2, "top_k": 2, **given})
    layers = {"general_layers": [0], "expert_layers": [1], "general_length": 2, "expert_length": 2}
    return DualPromptConfig(**{"pool_size": 4, **layers, **given})
