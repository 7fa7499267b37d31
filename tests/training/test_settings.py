"""A run goes on with the settings that it was begun with; each that differs is named, unless nothing depends on it."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pytest
import tiny
from transformers import TrainerCallback

from pgp_hf import ProjectionConfig
from pgp_hf.methods import create
from pgp_hf.projection.config import ADDED
from pgp_hf.runs.checkpoint import SEAL, seal
from pgp_hf.training.settings import BEFORE, check_same_settings, differing, recorded_settings

pytestmark = pytest.mark.usefixtures("without_figures")
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}


class Stop(TrainerCallback):
    """Ends training, as a kill would, after the third step of a task."""

    def __init__(self, task):
        self.at, self.task = task, None

    def on_task_begin(self, args, state, control, task, **kwargs):
        self.task = task

    def on_step_end(self, args, state, control, **kwargs):
        if (self.task, state.global_step) == (self.at, 3):
            raise KeyboardInterrupt


def stopped(folder, task, **settings):
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(folder, **CHECKPOINTS, callbacks=[Stop(task)], **settings).train()
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory, without_figures):
    """A run that was stopped inside its first task."""
    return stopped(tmp_path_factory.mktemp("first"), 0)


@pytest.fixture(scope="module")
def second(tmp_path_factory, without_figures):
    """A run that was stopped inside its second task, without a checkpoint of it."""
    folder = stopped(tmp_path_factory.mktemp("second"), 1)
    shutil.rmtree(folder / "checkpoints")
    return folder


TRAINING = [
    ("seed", 4),
    ("data_seed", 1),
    ("num_train_epochs", 3),
    ("max_steps", 7),
    ("per_device_train_batch_size", 8),
    ("gradient_accumulation_steps", 2),
    ("learning_rate", 0.02),
    ("later_prompt_learning_rate", 0.02),
    ("lr_scheduler_type", "linear"),
    ("warmup_steps", 2),
    ("optim", "sgd"),
    ("optim_args", "fused=False"),
    ("weight_decay", 0.1),
    ("adam_beta1", 0.8),
    ("max_grad_norm", 0.5),
    ("label_smoothing_factor", 0.1),
    ("bf16", True),
    ("augmentation", "none"),
    ("crop_min_scale", 0.5),
    ("train_mask", "seen"),
    ("eval_mask", "none"),
    ("train_sampling_strategy", "sequential"),
]
NAMES = {"per_device_train_batch_size": "images_per_step", "gradient_accumulation_steps": "images_per_step"}


@pytest.mark.parametrize("where", ["first", "second"])
@pytest.mark.parametrize(("name", "value"), TRAINING)
def test_a_changed_setting_is_named(request, where, name, value):
    """Inside the first task by its checkpoint, in a later one by the finished task's results."""
    folder = request.getfixturevalue(where)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    trainer = tiny.trainer(folder, **CHECKPOINTS, **{name: value})
    with pytest.raises(ValueError, match=rf"other settings, .* {NAMES.get(name, name)}: .*, was ") as refused:
        trainer.train(resume_from_checkpoint=True)
    assert "recorded ones, or start a new run in another output_dir. Free to change are" in str(refused.value)
    assert "micro-batches (unless batchwise_prompt is set)" in str(refused.value)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


OTHERS = [
    ("model.pull_constraint_coeff", lambda: {"model": tiny.model(pull_constraint_coeff=0.5)}),
    ("model.top_k", lambda: {"model": tiny.model(top_k=1)}),
    ("projection.energy", lambda: {"projection": ProjectionConfig(energy=0.5, key_energy=0.9)}),
    ("num_tasks", lambda: {"stream": tiny.stream(num_tasks=4)}),  # the first has the same images
    ("max_train_samples_per_class", lambda: {"stream": tiny.stream(max_train_samples_per_class=7)}),
]


@pytest.mark.parametrize(("name", "make"), OTHERS, ids=[name for name, _ in OTHERS])
def test_a_changed_model_projection_or_stream_is_named(first, name, make):
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: "):
        tiny.trainer(first, **CHECKPOINTS, **make()).train(resume_from_checkpoint=True)


def test_a_changed_method_is_named(tmp_path):
    def method(strength):
        return {"method": create("lwf", strength=strength), "model": tiny.plain()}

    stopped(tmp_path, 0, **method(1.0))
    with pytest.raises(ValueError, match=r"method.strength: 2.0, was 1.0"):
        tiny.trainer(tmp_path, **CHECKPOINTS, **method(2.0)).train(resume_from_checkpoint=True)


def test_all_that_differs_is_named_at_once(first):
    changed = {"seed": 9, "learning_rate": 0.5, "model": tiny.model(top_k=1)}
    with pytest.raises(ValueError, match=r"seed: 9, was 3; learning_rate: 0.5, was 0.01; model.top_k: 1, was 2\."):
        tiny.trainer(first, **CHECKPOINTS, **changed).train(resume_from_checkpoint=True)


def test_what_nothing_depends_on_may_change(first, tmp_path):
    """And the results are those of a run that was never stopped."""
    straight = tiny.trainer(tmp_path / "straight")
    straight.train()
    shutil.copytree(first, tmp_path / "run")
    free = {
        "save_strategy": "no",
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "per_device_eval_batch_size": 3,
        "cache_queries": False,
        "verify_images": False,
        "save_full_weights": "all",
        "report_to": "none",
    }
    trainer = tiny.trainer(tmp_path / "run", **free)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.results.matrix == straight.results.matrix


def test_the_division_into_micro_batches_may_change(second, tmp_path):
    shutil.copytree(second, tmp_path / "run")
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = tiny.trainer(tmp_path / "run", **CHECKPOINTS, **halves)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.results.training == recorded_settings(tiny.arguments(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore:batchwise_prompt")
def test_unless_the_images_of_a_micro_batch_share_their_prompts(tmp_path):
    stopped(tmp_path, 0, model=tiny.model(batchwise_prompt=True))
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = tiny.trainer(tmp_path, model=tiny.model(batchwise_prompt=True), **CHECKPOINTS, **halves)
    with pytest.raises(ValueError, match="per_device_train_batch_size: 2, was 4"):
        trainer.train(resume_from_checkpoint=True)


def test_a_finished_run_is_taken_over_and_the_difference_is_printed(tmp_path, capsys):
    """No task is left to train; what is learned after it may have settings of its own."""
    tiny.trainer(tmp_path, stream=tiny.stream(num_tasks=1), num_train_epochs=1).train()
    later = tiny.trainer(tmp_path, stream=tiny.stream(num_tasks=1), num_train_epochs=2, learning_rate=0.02)
    capsys.readouterr()
    later.train(resume_from_checkpoint=True)
    shown = capsys.readouterr().out
    assert "num_train_epochs: 2, was 1" in shown and "learning_rate: 0.02, was 0.01" in shown


def test_a_run_of_an_earlier_version_is_continued(second, tmp_path):
    """It recorded fewer settings, or none."""
    for kept in ({"seed": 3, "learning_rate": 0.01}, None):
        folder = tmp_path / ("none" if kept is None else "fewer")
        shutil.copytree(second, folder)
        for path in folder.rglob("results.json"):
            results = json.loads(path.read_text())
            results.pop("training") if kept is None else results.update(training=kept)
            path.write_text(json.dumps(results))
        for path in folder.rglob("digests.json"):
            path.unlink()
        tiny.trainer(folder, **CHECKPOINTS).train(resume_from_checkpoint=True)


def test_files_without_settings_of_today_go_on_within_a_task(tmp_path):
    """Their values are what an adapter, a projection and a trainer did before there was a choice."""
    run, kwargs = tmp_path / "run", {"projection": ProjectionConfig(method="functional", energy=0.9)}

    def model():
        return tiny.model("dualprompt")

    stopped(run, 1, model=model(), **kwargs)
    later = {*ADDED, *BEFORE, "selection", "head_input"}
    for path in run.rglob("*.json"):
        if path.name in ("digests.json", SEAL):
            path.unlink()
            continue
        content = json.loads(
            path.read_text(), object_hook=lambda own: {k: v for k, v in own.items() if k not in later}
        )
        path.write_text(json.dumps(content))
    for checkpoint in run.rglob("checkpoint-*"):
        seal(checkpoint, None)
    shutil.copytree(run, tmp_path / "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # about a checkpoint that is left out
        tiny.trainer(run, **CHECKPOINTS, model=model(), **kwargs).train(resume_from_checkpoint=True)
    other = tiny.trainer(
        tmp_path / "other", **CHECKPOINTS, model=tiny.model("dualprompt", selection="mixture"), **kwargs
    )
    with pytest.raises(ValueError, match="selection='key', this one 'mixture'"):
        other.train(resume_from_checkpoint=True)


def test_settings_are_what_json_gives_back(tmp_path):
    args = tiny.arguments(tmp_path, max_grad_norm=float("inf"), lr_scheduler_kwargs={"power": 2.0})
    found = recorded_settings(args)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["max_grad_norm"] == "inf" and found["lr_scheduler_type"] == "constant"
    assert not differing(found, recorded_settings(args))
    check_same_settings({"training": found, "model": None}, {"training": found, "model": {"a": 1}}, tmp_path)
