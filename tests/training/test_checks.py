"""Training arguments that no training can use are refused by name, when they are made and when a trainer is."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import numpy as np
import pytest
import tiny

from pgp_hf import PGPTrainer, PGPTrainingArguments
from pgp_hf.training import checks

pytestmark = pytest.mark.usefixtures("without_figures")
HINTS = get_type_hints(PGPTrainingArguments)
NUMBERS = sorted(one.name for one in fields(PGPTrainingArguments) if HINTS[one.name] in (int, float))
TRUTHS = sorted(one.name for one in fields(PGPTrainingArguments) if HINTS[one.name] is bool)


def made(**settings):
    return PGPTrainingArguments("unused", **{"use_cpu": True, **settings})


@pytest.mark.parametrize("value", [None, "3"])
@pytest.mark.parametrize("name", NUMBERS)
def test_none_or_text_where_a_number_belongs(name, value):
    """Of every argument of this and the installed version of transformers."""
    with pytest.raises(TypeError, match=rf"^{name}={value!r}.*: expected a (whole )?number"):
        made(**{name: value})


@pytest.mark.parametrize(
    "name", ["query_cache", "metric_for_best_model", "optim_args", "hub_model_id", "hub_base_model"]
)
def test_a_number_where_text_belongs(name):
    with pytest.raises(TypeError, match=f"^{name}=5: expected text, or None to leave it out"):
        made(**{name: 5})


@pytest.mark.parametrize("name", TRUTHS)
def test_text_where_a_truth_value_belongs(name):
    with pytest.raises(TypeError, match=rf"^{name}='False' is a str: expected True or False"):
        made(**{name: "False"})


@pytest.mark.parametrize("name", [name for name in NUMBERS if HINTS[name] is float])
def test_nan_is_not_a_number(name):
    with pytest.raises(ValueError, match=f"^{name}=nan is not a number"):
        made(**{name: float("nan")})


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("per_device_train_batch_size", [0, -1], [1, 1000]),
        ("per_device_eval_batch_size", [0, -1], [1]),
        ("gradient_accumulation_steps", [0, -2], [1]),
        ("eval_accumulation_steps", [0], [1, None]),
        ("save_total_limit", [0, -1], [1, None]),
        ("dataloader_num_workers", [-1], [0, 1]),
        ("seed", [-1, 2**32], [0, 2**32 - 1]),
        ("data_seed", [-1, 2**40], [0, None]),
        ("learning_rate", [-1, -1e-9, float("inf")], [0, 1e-30, 1.0]),
        ("later_prompt_learning_rate", [-1, float("inf")], [0, None]),
        ("head_learning_rate", [-1, float("nan")], [0.1, None]),
        ("num_train_epochs", [0, -1, float("inf")], [0.5, 3]),
        ("max_steps", [0, -2], [-1, 1]),
        ("warmup_steps", [-1, float("inf")], [0, 0.5, 100]),
        ("weight_decay", [-0.1, float("inf")], [0, 0.1]),
        ("adam_beta1", [-0.1, 1, 1.5], [0, 0.999]),
        ("adam_beta2", [1.0], [0.5]),
        ("adam_epsilon", [-1e-8], [0]),
        ("max_grad_norm", [-1], [0, 1, float("inf")]),
        ("label_smoothing_factor", [-0.1, 2], [0, 0.1, 1]),
        ("crop_min_scale", [0, 2], [1, 1e-6]),
        ("optim", ["bogus", None], ["sgd"]),
        ("lr_scheduler_type", ["bogus"], ["linear", "inverse_sqrt"]),
        ("save_strategy", ["bogus"], ["no"]),
        ("eval_strategy", ["bogus"], ["epoch"]),
        ("log_level", ["loud"], ["info"]),
        ("train_mask", ["bogus", None], ["seen"]),
        ("prediction_loss_only", [True], [False]),
        ("batch_eval_metrics", [True], [False]),
        ("ignore_data_skip", [True], [False]),
        ("train_sampling_strategy", ["group_by_length", "batch_rebalance"], ["sequential"]),
        ("neftune_noise_alpha", [5.0], [None]),
    ],
)
def test_values_out_of_range_are_named(name, wrong, right):
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name}="):
            made(**{name: value})
    for value in right:
        made(**{name: value})


def test_an_order_of_images_that_no_resume_finds_again():
    with pytest.raises(
        ValueError, match=r"^accelerator_config with use_seedable_sampler=False would draw another order"
    ):
        made(accelerator_config={"use_seedable_sampler": False})
    made(accelerator_config={"split_batches": True})


@pytest.mark.parametrize(
    ("name", "strategy"), [(f"{what}_steps", f"{what}_strategy") for what in ("eval", "save", "logging")]
)
def test_an_interval_is_a_number_of_steps_or_a_share_of_them(name, strategy):
    for wrong in (-1, 1.5, float("inf"), -0.5):
        with pytest.raises(ValueError, match=f"^{name}={wrong} is out of range: use a whole number"):
            made(**{name: wrong, strategy: "steps"})
    for right in (1, 0.5, 20):
        made(**{name: right, strategy: "steps"})
    made(**{name: -1, strategy: "no"})  # not used


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-30}, "lr_end"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"bogus": 1}}, "bogus"),
    ],
)
def test_a_schedule_that_cannot_be_made(settings, reason):
    name = settings["lr_scheduler_type"]
    with pytest.raises(ValueError, match=f"lr_scheduler_type='{name}' cannot be used with .*{reason}"):
        made(**settings)


def test_trackers_that_are_unknown_or_not_installed(monkeypatch):
    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: ["trackio"])
    assert made(report_to="trackio").report_to == ["trackio"]
    with pytest.raises(ValueError, match="report_to='bogus' is unknown: choose none, all, or some of azure_ml, "):
        made(report_to=["trackio", "bogus"])
    with pytest.raises(ImportError, match="report_to='wandb' needs a package that is not installed here"):
        made(report_to="wandb")


def test_a_license_is_checked_without_a_push():
    with pytest.raises(ValueError, match="hub_license=5 is not the id of a license"):
        made(hub_license=5)
    with pytest.raises(ValueError, match="hub_license='Foo!' is not the id of a license"):
        made(hub_license="Foo!")


def test_a_folder_that_safetensors_cannot_read():
    with pytest.raises(ValueError, match=r"the path 'out/\\udcff' is not UTF-8"):
        PGPTrainingArguments("out/\udcff", use_cpu=True)


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_a_file_in_the_place_of_a_folder(inside, tmp_path):
    file = tmp_path / "out"
    file.touch()
    with pytest.raises(ValueError, match=rf"output_dir=.*: {file} is a file"):
        PGPTrainingArguments(str(file / inside), use_cpu=True)


def test_numbers_of_numpy_are_taken(tmp_path):
    args = made(seed=np.int64(3), learning_rate=np.float32(0.5), bf16=np.bool_(False))
    assert (args.seed, args.learning_rate, args.bf16) == (3, 0.5, False)
    assert (type(args.seed), type(args.learning_rate), type(args.bf16)) == (int, float, bool)


@pytest.mark.parametrize(("name", "value"), [("learning_rate", -1.0), ("seed", None), ("prediction_loss_only", True)])
def test_what_was_set_since_is_refused_by_the_trainer(tmp_path, name, value):
    args = tiny.arguments(tmp_path / "run")
    setattr(args, name, value)
    with pytest.raises((TypeError, ValueError), match=f"^{name}="):
        PGPTrainer(tiny.model(), args, tiny.stream(), processing_class=tiny.processor())
    assert not (tmp_path / "run").exists()
