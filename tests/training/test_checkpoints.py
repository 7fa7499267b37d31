"""A run that was stopped and goes on is a run that was not: weights, states, counts, and not one step more."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from pgp_hf.methods import FineTuning
from pgp_hf.runs.checkpoint import SEAL
from pgp_hf.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_figures")

STEPS = {"save_strategy": "steps", "save_steps": 2}


class StopAt(TrainerCallback):
    """Ends the process's work, as a kill would, at a step of a task."""

    def __init__(self, step, task=0):
        self.step, self.task = step, task

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.trainer.task == self.task:
            raise KeyboardInterrupt


class Count(TrainerCallback):
    """Counts the steps of each task."""

    def __init__(self):
        self.steps = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[self.trainer.task] = self.steps.get(self.trainer.task, 0) + 1


def short(folder, **settings):
    """A trainer of one task of six classes, in six steps."""
    given = {"stream": tiny.stream(num_tasks=1), "max_steps": 6, **STEPS}
    return tiny.trainer(folder, **{**given, **settings})


def stop(trainer, step=5, task=0):
    stopping = StopAt(step, task)
    stopping.trainer = trainer
    trainer.add_callback(stopping)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def resume(trainer):
    """Continue a run; return the steps of each task."""
    count = Count()
    count.trainer = trainer
    trainer.add_callback(count)
    torch.manual_seed(99)  # whatever the new process starts with
    np.random.seed(99)
    random.seed(99)
    trainer.train(resume_from_checkpoint=True)
    return count.steps


def files(folder):
    """What a run has learned and counted, by file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
        elif path.name == "adapter_config.json":
            found[name] = json.loads(path.read_text())
        elif path.name == "results.json":
            results = json.loads(path.read_text())
            for measured in ("seconds", "train_images_per_second"):
                assert results.pop(measured)
            found[name] = results
    return found


def same_run(a, b):
    """Whether two runs have the same tensors and results, counts of images included."""
    a, b = files(a), files(b)
    return a.keys() == b.keys() and all(a[name] == b[name] for name in a) and len(a) > 3


def twice(tmp_path, make, step=5):
    """Train straight and with a stop; return both trainers, and the steps after the stop."""
    straight = make(tmp_path / "straight")
    straight.train()
    stop(make(tmp_path / "stopped"), step)
    resumed = make(tmp_path / "stopped")
    steps = resume(resumed)
    return straight, resumed, steps


# ---- optimizers and schedules ----------------------------------------------------------------------------------------


class Memory(Optimizer):
    """Keeps state in all forms that a file can hold: in its own precision, not finite, nested, of plain numbers."""

    def __init__(self, params, lr=0.01, dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr, "dtype": dtype, "schedule": (1.0, (0.5, [0.25])), "bound": math.inf})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=group["dtype"])
                    state["sum"] = torch.zeros_like(parameter, dtype=torch.float64)
                    state["least"] = torch.full_like(parameter, torch.inf)
                    state["count"], state["norms"], state["last"] = 0, [], None
                state["count"] += 1
                state["norms"].append(float(parameter.grad.norm()))
                state["last"] = {"norm": state["norms"][-1], 3: (state["count"],)}
                state["momentum"].mul_(0.9).add_(parameter.grad.to(group["dtype"]))
                state["sum"].add_(parameter.grad.double())
                torch.minimum(state["least"], parameter.grad.abs(), out=state["least"])
                scale = sum(state["norms"]) / len(state["norms"]) + state["last"][3][0]
                step = state["momentum"].float() + state["sum"].float() + state["least"]
                parameter.add_(step / scale, alpha=-group["lr"])


OPTIMIZERS = {
    **{
        name: {"optim": name}
        for name in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop")
    },
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "amsgrad": {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True})},
    **{
        name.lower(): {"optimizer_cls_and_kwargs": (getattr(torch.optim, name), {"lr": 0.01})}
        for name in ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop")
    },
    "tensor": {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": torch.tensor(0.01), "capturable": False})},
    "memory": {"optimizer_cls_and_kwargs": (Memory, {})},
}


@pytest.mark.parametrize("name", tiny.some_of(OPTIMIZERS, *list(OPTIMIZERS)[:2]))
def test_every_optimizer_goes_on_as_it_was(tmp_path, name):
    straight, resumed, steps = twice(tmp_path, lambda folder: short(folder, **OPTIMIZERS[name]))
    assert same_run(tmp_path / "straight", tmp_path / "stopped") and steps == {0: 2}
    for a, b in zip(*(each.optimizer.optimizer.state.values() for each in (straight, resumed)), strict=True):
        assert {k: getattr(v, "dtype", type(v)) for k, v in a.items()} == {
            k: getattr(v, "dtype", type(v)) for k, v in b.items()
        }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.optim.Adamax, {"lr": 0.01}), "optimizer .*Memory, and now it is .*Adamax: continue with the same"),
        ((Memory, {"lr": 0.02}), r"learning rates \[0.01, 0.01\], and now it is \[0.02, 0.02\]"),
    ],
)
def test_an_optimizer_of_another_kind_or_rate_is_refused(tmp_path, given, message):
    """The arguments do not tell them apart, and torch would take the state without a word."""
    stop(short(tmp_path, optimizer_cls_and_kwargs=(Memory, {"lr": 0.01})))
    with pytest.raises(ValueError, match=f"checkpoint-4 was trained with the {message}"):
        short(tmp_path, optimizer_cls_and_kwargs=given).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_rate_that_a_schedule_has_lowered_is_not_taken_for_another_one(tmp_path, name):
    def make(rate=0.01):
        return short(
            tmp_path,
            stream=tiny.stream(num_tasks=1, train_val_split=0.25),
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="eval_current_loss",
            greater_is_better=True,  # so that it never gets better
            lr_scheduler_type=name,
            lr_scheduler_kwargs={"mode": "max", "patience": 0, "factor": 0.5},
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": rate}),
        )

    stop(stopped := make())
    assert stopped.optimizer.param_groups[0]["lr"] != 0.01
    with pytest.raises(ValueError, match=r"learning rates \[0.01, 0.01\], and now it is \[0.02, 0.02\]"):
        make(0.02).train(resume_from_checkpoint=True)
    assert resume(make()) == {0: 2}


SCHEDULES = {
    **{name: {} for name in ("linear", "cosine", "polynomial", "constant", "inverse_sqrt")},
    "constant_with_warmup": {"warmup_steps": 3},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": 1},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 0.001}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 0.001}, "warmup_steps": 2},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 2}, "warmup_steps": 1},
}


@pytest.mark.parametrize("name", tiny.some_of(SCHEDULES, "cosine_with_restarts"))
def test_every_schedule_goes_on_as_it_was(tmp_path, name):
    settings = {"lr_scheduler_type": name, **SCHEDULES[name]}
    straight, resumed, _ = twice(tmp_path, lambda folder: short(folder, **settings))
    assert same_run(tmp_path / "straight", tmp_path / "stopped")
    assert straight.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()


def test_groups_with_learning_rates_of_their_own(tmp_path):
    def make(folder):
        model = tiny.plain("last:1")
        return short(folder, model=model, method=FineTuning(), head_learning_rate=0.1, lr_scheduler_type="linear")

    straight, resumed, _ = twice(tmp_path, make)
    assert same_run(tmp_path / "straight", tmp_path / "stopped")
    rates = [[group["initial_lr"] for group in each.optimizer.param_groups] for each in (straight, resumed)]
    assert rates[0] == rates[1] and len({*rates[0]}) == 2


@pytest.mark.parametrize("name", tiny.some_of(["full", "lora:2"], "full"))
def test_models_without_prompts_and_their_dropout(tmp_path, name):
    def make(folder):
        base = tiny.backbone(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
        return short(folder, model=tiny.plain(name, base), method=FineTuning())

    twice(tmp_path, make)
    assert same_run(tmp_path / "straight", tmp_path / "stopped")


def test_the_scale_of_gradients_goes_on_as_it_was(tmp_path):
    """As of float16, which a CPU does not train in; it doubles every third step, and clipping sees it."""

    def make(folder):
        trainer = short(folder, optim="sgd")
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
        return trainer

    straight, resumed, _ = twice(tmp_path, make)
    states = [trainer.accelerator.scaler.state_dict() for trainer in (straight, resumed)]
    assert states[0] == states[1] and states[0]["scale"] == 8.0
    assert same_run(tmp_path / "straight", tmp_path / "stopped")


# ---- where a run stops -----------------------------------------------------------------------------------------------


class Draws(TrainerCallback):
    """Draws from every generator at each step, and notes what comes."""

    def __init__(self):
        self.seen = {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen[state.global_step] = random.gauss(0, 1), np.random.normal(), float(torch.rand(()))


@pytest.mark.parametrize("step", tiny.some_of([3, 5, 7], 5))
def test_random_numbers_go_on_as_they_were(tmp_path, step):
    """Within an epoch and at its ends; an odd number of normal ones leaves a half of a pair behind."""

    def make(folder):
        return short(folder, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=12, callbacks=[Draws()])

    straight, resumed = (each.callback_handler.callbacks for each in twice(tmp_path, make, step)[:2])
    (a,), (b,) = ([one.seen for one in callbacks if isinstance(one, Draws)] for callbacks in (straight, resumed))
    assert len(b) >= 2 and all(a[step] == drawn for step, drawn in b.items())


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"max_steps": 4}, 4),  # the end of an epoch
        ({"num_train_epochs": 1.5, "save_strategy": "epoch"}, 6),
        ({"num_train_epochs": 1.75, "gradient_accumulation_steps": 2}, 4),
        pytest.param({"max_steps": 7}, 7, marks=pytest.mark.slow),
        pytest.param({"num_train_epochs": 1.5}, 6, marks=pytest.mark.slow),
        pytest.param({"num_train_epochs": 0.5}, 2, marks=pytest.mark.slow),
        pytest.param({"num_train_epochs": 2}, 8, marks=pytest.mark.slow),
        pytest.param({"max_steps": 7, "save_strategy": "epoch"}, 7, marks=pytest.mark.slow),
        pytest.param({"num_train_epochs": 2, "gradient_accumulation_steps": 3}, 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("task", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_task_that_has_ended_takes_no_further_step(tmp_path, monkeypatch, settings, last, task):
    """Stopped behind the last step, in the task's statistics: what is left to do is done, and no step more."""
    settings = {"stream": tiny.stream(num_tasks=2, dataset=tiny.data(4)), **STEPS, **settings}
    model = {"num_labels": 4}
    straight = tiny.trainer(tmp_path / "straight", model=tiny.model(base=tiny.backbone(**model)), **settings)
    straight.train()
    assert straight.state.global_step == last
    trainer = tiny.trainer(tmp_path / "stopped", model=tiny.model(base=tiny.backbone(**model)), **settings)
    measure = trainer.evaluate_stream

    def interrupted():
        measure()
        if trainer.task == task:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "evaluate_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert RunFolder(tmp_path / "stopped").last_checkpoint(task).name == f"checkpoint-{last}"
    resumed = tiny.trainer(tmp_path / "stopped", model=tiny.model(base=tiny.backbone(**model)), **settings)
    assert resume(resumed) == ({1: last} if task == 0 else {})
    assert same_run(tmp_path / "straight", tmp_path / "stopped")


class EndAfter(TrainerCallback):
    """Ends a task early, as an early stop does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_a_task_that_a_callback_has_ended_takes_no_further_step(tmp_path, monkeypatch):
    def make(folder):
        return short(folder, max_steps=-1, num_train_epochs=1, callbacks=[EndAfter(4)])

    make(tmp_path / "straight").train()
    trainer = make(tmp_path / "stopped")

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "evaluate_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert resume(make(tmp_path / "stopped")) == {}
    assert same_run(tmp_path / "straight", tmp_path / "stopped")


class EndEpoch(TrainerCallback):
    """Ends an epoch after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop |= state.global_step == self.step


@pytest.mark.parametrize("last", [5, 6])
def test_an_epoch_that_a_callback_has_ended_is_not_gone_on_with(tmp_path, last):
    """Steps and epochs are no longer multiples of each other."""

    def make(folder):
        return short(folder, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=8, callbacks=[EndEpoch(4)])

    _, _, steps = twice(tmp_path, make, last)
    assert same_run(tmp_path / "straight", tmp_path / "stopped")
    assert steps == {0: 10 - (4 if last == 5 else 6) + (2 if last == 6 else 0)}


class Patience(TrainerCallback, ExportableState):
    """Counts something that decides later, such as how long an early stop has waited."""

    def __init__(self):
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1
        control.should_training_stop |= self.count == 5

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


def test_callbacks_go_on_with_what_they_knew(tmp_path):
    make = lambda folder: short(folder, callbacks=[Patience()])  # noqa: E731
    straight, resumed, steps = twice(tmp_path, make, 5)
    assert straight.state.global_step == resumed.state.global_step == 5 and steps == {0: 1}
    assert same_run(tmp_path / "straight", tmp_path / "stopped")


def test_the_size_of_images_that_earlier_steps_have_seen_is_known(tmp_path):
    """As after images of several sizes, in a checkpoint and in a finished task."""
    stop(tiny.trainer(tmp_path, num_train_epochs=1, **STEPS), step=3, task=1)
    for folder in (tmp_path / "task-1", RunFolder(tmp_path).last_checkpoint(1)):
        resumed = tiny.trainer(tmp_path, num_train_epochs=1, **STEPS)
        assert json.loads((folder / "adapter_config.json").read_text())["image_size"] == [20, 20]
        if folder.name == "task-1":
            resumed._resumer().resume(True)
        else:
            resumed._load_from_checkpoint(str(folder))
        assert resumed.stream_model.adapter_config.image_size == [20, 20]


def test_images_and_seconds_are_counted_on(tmp_path):
    straight, resumed, _ = twice(tmp_path, short)
    assert straight.results.images_trained == resumed.results.images_trained == 24
    noted = json.loads((tmp_path / "straight" / "results.json").read_text())
    assert noted["images_trained"] == 24 and resumed.results.seconds["train"] > 0


def test_time_before_a_checkpoint_counts(tmp_path):
    stop(short(tmp_path))
    folder = RunFolder(tmp_path).last_checkpoint(0)
    noted = json.loads((folder / "progress.json").read_text())
    assert noted["images_trained"] == 16 and noted["seconds"]["train"] > 0 and noted["step"] == 4
    alter(folder, "progress.json", lambda content: content["seconds"].update(train=1000.0))
    resumed = short(tmp_path)
    resume(resumed)
    assert 1000 < resumed.results.seconds["train"] < 1100


# ---- damage ----------------------------------------------------------------------------------------------------------


def alter(folder, name, change):
    """Change a JSON file of a checkpoint, whose seal then fits it."""
    from pgp_hf.runs.checkpoint import seal

    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    best = json.loads((folder / SEAL).read_text())["best"]
    (folder / SEAL).unlink()
    seal(folder, best)


@pytest.mark.parametrize(
    ("damaged", "left"),
    [
        ((4,), 4),
        ((2, 4), 6),
        pytest.param((2,), 2, marks=pytest.mark.slow),
    ],  # steps that are left: from the checkpoint before, from the start, from the newest
)
def test_a_damaged_checkpoint_gives_way_and_the_run_is_the_same(tmp_path, damaged, left):
    short(tmp_path / "straight").train()
    stop(short(tmp_path / "stopped"))
    for step in damaged:
        path = tmp_path / "stopped" / "checkpoints" / "task-1" / f"checkpoint-{step}" / "optimizer.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    resumed = short(tmp_path / "stopped")
    if 4 in damaged:
        with pytest.warns(
            UserWarning, match="checkpoint-4/optimizer.safetensors is damaged or was altered: it has .* The checkpoint"
        ):
            steps = resume(resumed)
    else:
        steps = resume(resumed)
    assert steps == {0: left}
    assert same_run(tmp_path / "straight", tmp_path / "stopped") and resumed.results.images_trained == 24


def test_the_checkpoint_of_a_later_task_gives_way_to_the_tasks_start(tmp_path):
    tiny.trainer(tmp_path / "straight", num_train_epochs=1).train()
    trainer = tiny.trainer(tmp_path / "stopped", num_train_epochs=1, **STEPS)
    stop(trainer, step=3, task=1)
    (RunFolder(tmp_path / "stopped").last_checkpoint(1) / "random.safetensors").unlink()
    for again in (trainer, tiny.trainer(tmp_path / "stopped", num_train_epochs=1, **STEPS)):
        folder = shutil.copytree(tmp_path / "stopped", tmp_path / f"copy-{again is trainer}")
        again.args.output_dir, again.folder = str(folder), RunFolder(folder)
        again.callback_handler.callbacks = [
            one for one in again.callback_handler.callbacks if not isinstance(one, StopAt)
        ]
        with pytest.warns(UserWarning, match="random.safetensors is missing"):
            again.train(resume_from_checkpoint=True)
        assert same_run(tmp_path / "straight", folder)


def test_a_checkpoint_that_is_asked_for_by_name_is_checked(tmp_path):
    stop(short(tmp_path))
    folder = RunFolder(tmp_path).last_checkpoint(0)
    (folder / "scheduler.json").write_text("{}")
    with pytest.raises(ValueError, match="scheduler.json is damaged"):
        short(tmp_path / "new").train_task(0, resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("where", [("checkpoint-4",), ()])
def test_a_checkpoint_in_place_of_its_run_says_which_folder_to_pass(tmp_path, where):
    stop(short(tmp_path / "run"))
    folder = (tmp_path / "run" / "checkpoints" / "task-1").joinpath(*where)
    with pytest.raises(ValueError, match=f"expected a run's folder.* inside the run {tmp_path / 'run'}: pass that"):
        short(tmp_path / "new").train(resume_from_checkpoint=str(folder))


def test_a_step_that_is_reached_again_replaces_its_checkpoint_and_those_behind_it(tmp_path):
    stop(short(tmp_path))
    four = RunFolder(tmp_path).last_checkpoint(0)
    six = shutil.copytree(four, four.with_name("checkpoint-6"))
    for folder in (four, six):
        (folder / "method.json").write_text("")
    (four / "notes.txt").write_text("mine")
    again = short(tmp_path)
    with pytest.warns(UserWarning, match="method.json is damaged"), pytest.raises(KeyboardInterrupt):
        again.add_callback(stopping := StopAt(5))
        stopping.trainer = again
        again.train(resume_from_checkpoint=True)
    assert RunFolder(tmp_path).last_checkpoint(0) == four and not six.exists()
    assert (four / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("limit", "kept"), [(None, {2, 4, 6}), (1, {6}), (2, {4, 6})])
def test_save_total_limit_keeps_the_newest(tmp_path, limit, kept):
    stop(short(tmp_path, max_steps=8, save_total_limit=limit), step=7)
    found = {int(path.name.partition("-")[2]) for path in (tmp_path / "checkpoints" / "task-1").iterdir()}
    assert found == kept


def test_a_kill_within_a_checkpoint_leaves_none_of_its_name(tmp_path, monkeypatch):
    short(tmp_path / "straight").train()
    trainer = short(tmp_path / "stopped")
    write = trainer._write_checkpoint

    def interrupted(folder, states):
        write(folder, states)
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints" / "task-1").iterdir()] == ["checkpoint-2"]
    assert resume(short(tmp_path / "stopped")) == {0: 4}
    assert same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_model_alone_is_not_gone_on_from(tmp_path):
    short(tmp_path / "straight").train()
    stop(short(tmp_path / "stopped", save_only_model=True))
    with pytest.warns(
        UserWarning, match="holds the model alone .save_only_model=True., without the optimizer's state"
    ):
        assert resume(short(tmp_path / "stopped", save_only_model=True)) == {0: 6}
    assert same_run(tmp_path / "straight", tmp_path / "stopped")


# ---- the best checkpoint ---------------------------------------------------------------------------------------------


def choosing(folder, **settings):
    """A run that goes back to the first of its checkpoints, which is the worst, when its task ends."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_current_loss", "greater_is_better": True}
    held_out = tiny.stream(num_tasks=1, train_val_split=0.25)
    return short(folder, stream=held_out, eval_strategy="steps", eval_steps=2, **best, **settings)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chosen")
    trainer = choosing(folder)
    trainer.train()
    assert trainer.state.best_global_step == 2 and trainer.state.global_step == 6
    return folder


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_best_checkpoint_is_kept_and_found_again_by_a_run_that_has_moved(tmp_path, chosen, limit):
    stop(choosing(tmp_path / "before", save_total_limit=limit))
    shutil.move(tmp_path / "before", tmp_path / "after")
    found = {path.name for path in (tmp_path / "after" / "checkpoints" / "task-1").iterdir()}
    assert found == {"checkpoint-2", "checkpoint-4"}
    assert resume(choosing(tmp_path / "after", save_total_limit=limit)) == {0: 2}
    assert same_run(chosen, tmp_path / "after")


def test_the_best_checkpoint_comes_along_to_another_folder(tmp_path):
    """Where the run is stopped again, and goes on by itself."""
    choosing(tmp_path / "straight", max_steps=8).train()
    stop(choosing(tmp_path / "first", max_steps=8))
    again = choosing(tmp_path / "second", max_steps=8)
    again.add_callback(stopping := StopAt(7))
    stopping.trainer = again
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=str(tmp_path / "first"))
    shutil.rmtree(tmp_path / "first")
    assert resume(choosing(tmp_path / "second", max_steps=8)) == {0: 2}
    assert same_run(tmp_path / "straight", tmp_path / "second")


class Damage(TrainerCallback):
    """Cuts a file of the first checkpoint before the last step."""

    def __init__(self, folder):
        self.path = folder / "checkpoints" / "task-1" / "checkpoint-2" / "adapter_model.safetensors"

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.path.write_bytes(self.path.read_bytes()[:-3])


def test_a_best_checkpoint_that_is_damaged_is_not_loaded_and_trained_again(tmp_path, chosen):
    trainer = choosing(tmp_path, callbacks=[Damage(tmp_path)])
    with pytest.raises(
        ValueError, match="best checkpoint cannot be loaded: .*adapter_model.safetensors is damaged.*Go on"
    ):
        trainer.train()
    with pytest.warns(UserWarning, match="checkpoint-6 goes back to the best checkpoint when training ends, and"):
        assert resume(choosing(tmp_path)) == {0: 6}
    assert same_run(chosen, tmp_path)


# ---- what a checkpoint cannot hold, and what no file holds -----------------------------------------------------------


class Sets(Memory):
    """Keeps in its state, from the first step on, what no file can hold."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["seen"] = {1, 2}


class Stubborn(Sets):
    """Takes no step on anything but its own parameters."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.own = {id(parameter) for group in self.param_groups for parameter in group["params"]}

    def step(self, closure=None):
        assert all(id(parameter) in self.own for group in self.param_groups for parameter in group["params"])
        super().step(closure)


@pytest.mark.parametrize(("kind", "steps"), [(Sets, 0), (Stubborn, 1)])
def test_state_that_no_file_can_hold_is_refused_before_training(tmp_path, kind, steps):
    trainer = short(tmp_path, optimizer_cls_and_kwargs=(kind, {}))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"state of {kind.__name__} with LambdaLR: optimizer.state.0.seen is a set.*Choose"
    ):
        trainer.train()
    same = all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.state.global_step == steps and same == (steps == 0)
    assert not (tmp_path / "checkpoints").exists()


def test_settings_of_an_optimizer_that_no_file_can_hold_are_refused(tmp_path):
    trainer = short(tmp_path, optimizer_cls_and_kwargs=(Memory, {"dtype": torch.float32}))
    create = trainer.create_optimizer

    def with_function(model=None):
        made = create(model)
        made.param_groups[0]["schedule"] = lambda step: step
        return made

    trainer.create_optimizer = with_function
    with pytest.raises(ValueError, match="optimizer.param_groups.0.schedule is a function"):
        trainer.train()
    assert trainer.state.global_step == 0


class Secretive(TrainerCallback, ExportableState):
    def state(self):
        return {"args": {}, "attributes": {"seen": {1, 2}}}


def test_a_callback_whose_state_is_not_json_is_refused(tmp_path):
    trainer = short(tmp_path, callbacks=[Secretive()])
    with pytest.raises(ValueError, match="the state of the callback Secretive: .*set.*what JSON can hold"):
        trainer.train()
    assert trainer.state.global_step == 0


class Noisy(Memory):
    """Draws random numbers in its steps."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(torch.randn_like(parameter), alpha=1e-3 * random.random() * np.random.rand())


def test_the_trial_before_training_draws_no_random_number(tmp_path, monkeypatch):
    noisy = {"optimizer_cls_and_kwargs": (Noisy, {})}
    short(tmp_path / "tried", **noisy).train()
    monkeypatch.setattr("pgp_hf.training.checkpoints.CheckpointTrainer._check_states", lambda self: None)
    short(tmp_path / "untried", **noisy).train()
    assert same_run(tmp_path / "tried", tmp_path / "untried")


def test_no_pickle_is_written_or_read(tmp_path, monkeypatch):
    """Neither in a run that stops and goes on, nor by save_model; and no file holds the Hub's token."""

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle")

    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr("pickle.dump", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    stop(short(tmp_path / "run", hub_token="hf_a_secret"))
    short(tmp_path / "other", hub_token="hf_a_secret").save_model(str(tmp_path / "saved"))
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in found} == {".json", ".safetensors", ".md"} and len(found) > 20
    assert not [path for path in found if b"hf_a_secret" in path.read_bytes()]
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"),
        *("method.json", "method.safetensors"),
    }
    resume(short(tmp_path / "run", hub_token="hf_a_secret"))


def test_a_checkpoint_of_an_earlier_version_is_not_read_and_the_task_starts_anew(tmp_path):
    """As a `Trainer` writes them: files of the model beside pickles, which nobody opens."""
    short(tmp_path / "straight").train()
    stop(short(tmp_path / "stopped"))
    for folder in (tmp_path / "stopped" / "checkpoints" / "task-1").iterdir():
        for path in folder.iterdir():
            if path.name.startswith(("optimizer", "scheduler", "random", "checkpoint", "settings", "progress")):
                path.unlink()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / name).write_bytes(b"never read")
    with pytest.warns(UserWarning, match="checkpoint-4 was written by an earlier version"):
        assert resume(short(tmp_path / "stopped")) == {0: 6}
    assert same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.slow
def test_each_of_two_processes_goes_on_with_its_own_random_numbers(tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    script = str(Path(__file__).with_name("stopped_in_two_processes.py"))
    done = subprocess.run(
        [sys.executable, *launch, script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    draws = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for straight, resumed in draws:
        assert sorted(resumed) == ["4", "5"] and all(straight[step] == drawn for step, drawn in resumed.items())
    assert draws[0][0]["4"] != draws[1][0]["4"]
    assert same_run(tmp_path / "straight", tmp_path / "stopped")
