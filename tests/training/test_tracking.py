"""Trackers see one run over all tasks; what is shown in a terminal is short."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
from transformers import TrainerCallback

from pgp_hf.training import tracking
from pgp_hf.training.callbacks import StreamCallback
from pgp_hf.training.display import in_words
from pgp_hf.training.results import _steps

STEPS = 8  # of a tiny task: two epochs of 16 images in batches of four


class Tracker(TrainerCallback):
    """Notes what a tracker gets."""

    def __init__(self):
        self.events, self.logged, self.saved = [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(("begin", state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", state.global_step))

    def on_predict(self, args, state, control, **kwargs):
        self.events.append(("predict", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, logs))

    def steps(self, name):
        return [(step, logs["task"]) for step, logs in self.logged if name in logs]


class StopAt(StreamCallback):
    """Interrupts a task, counted from 0, at a step."""

    def __init__(self, task, step):
        self.task, self.step, self.now = task, step, None

    def on_task_begin(self, args, state, control, task, **kwargs):
        self.now = task

    def on_step_end(self, args, state, control, **kwargs):
        if (self.now, state.global_step) == (self.task, self.step):
            raise KeyboardInterrupt


@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setattr(tracking, "_TRACKERS", (Tracker,))
    return Tracker()


@pytest.mark.usefixtures("without_figures")
def test_a_stream_is_one_run(tmp_path, tracker, capsys):
    trainer = tiny.trainer(tmp_path, callbacks=[tracker], logging_steps=4, num_train_epochs=2)
    trainer.train()
    assert tracker.events == [("begin", 0), ("end", 3 * STEPS)]
    assert tracker.steps("loss") == [(4, 1), (8, 1), (12, 2), (16, 2), (20, 3), (24, 3)]
    assert tracker.steps("eval_average_accuracy") == [(8, 1), (16, 2), (24, 3)]
    assert tracker.saved == [4, 8] * 3  # by which checkpoints are named
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == [STEPS] * 3
    assert trainer.state.global_step == STEPS and "task" not in trainer.state.log_history[0]  # a Trainer's own
    trainer.predict(trainer.stream.test(0))  # which the user asks for
    assert tracker.events[2:] == [("predict", 3 * STEPS)]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  step 4 of 8: loss ") for line in lines) == 3
    assert not [line for line in lines if "{" in line or len(line) > 100 and "->" not in line]


@pytest.mark.usefixtures("without_figures")
def test_steps_go_on_in_a_resumed_run_and_with_new_classes(tmp_path, tracker):
    settings = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(tmp_path, callbacks=[StopAt(1, 5)], **settings).train()
    trainer = tiny.trainer(tmp_path, callbacks=[tracker], **settings)
    trainer.train(resume_from_checkpoint=True)
    assert tracker.events == [("begin", STEPS + 3), ("end", 3 * STEPS)]
    assert [step for step, _ in tracker.steps("loss")] == list(range(STEPS + 4, 3 * STEPS + 1))
    more = type(trainer).from_pretrained(
        tmp_path, args=tiny.arguments(tmp_path / "more"), backbone=tiny.backbone(), callbacks=[tracker]
    )
    more.learn(tiny.data(classes=8, test=2).filter(lambda row: row["label"] > 5)["train"])
    end = 3 * STEPS + more.state.global_step
    assert tracker.events[2:] == [("begin", 3 * STEPS), ("end", end)]
    assert tracker.steps("train_loss")[-1] == (end, 4) and more.state.global_step > 0


@pytest.mark.usefixtures("without_figures")
def test_tasks_that_are_trained_one_by_one_are_one_run_as_well(tmp_path, tracker):
    trainer = tiny.trainer(tmp_path, callbacks=[tracker], num_train_epochs=1)
    trainer.train_task(0)
    trainer.train_task(1)
    assert tracker.events == [("begin", 0), ("end", 4), ("begin", 4), ("end", 8)]


def test_other_processes_open_nothing(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("this is for the first process alone")

    monkeypatch.setattr(tracking, "_TRACKERS", (Tracker,))
    for name in ("_prepare", "_show"):
        monkeypatch.setattr(tracking, name, refuse)
    tracker = Tracker()
    handler = SimpleNamespace(**dict.fromkeys(("model", "processing_class", "optimizer", "lr_scheduler"), None))
    handler.callbacks, handler.train_dataloader, handler.eval_dataloader = [tracker], None, None
    progress = SimpleNamespace(step=lambda within: 10 + within, task=0)
    made = tracking.StreamHandler(handler, progress)
    state = SimpleNamespace(is_world_process_zero=False, global_step=2, max_steps=5)
    control = SimpleNamespace()
    args = tiny.arguments(tmp_path)
    made.fire("on_stream_begin", args, state, control)
    made.on_train_begin(args, state, control)
    made.fire("on_task_end", args, state, control, task=0, folder=tmp_path, results={})
    assert tracker.events == [("begin", 12)] and (state.global_step, state.max_steps) == (2, 5)
    with pytest.raises(AssertionError, match="first process alone"):
        state.is_world_process_zero = True
        made.fire("on_task_end", args, state, control, task=0, folder=tmp_path, results={})


def test_steps_of_runs_that_did_not_count_them():
    earlier = {"finished_tasks": 3, "images_trained": 100, "training": {"images_per_step": 8}}
    assert _steps(earlier) == [0, 0, 12] and _steps({**earlier, "training": {}}) == [0, 0, 0]
    assert _steps({**earlier, "steps": [4, 5, 6]}) == [4, 5, 6]


def test_the_loss_is_logged_by_default(tmp_path):
    assert tiny.arguments(tmp_path).logging_steps == 10


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        ({"loss": 0.123456, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 1.0}, "loss 0.1235"),
        ({"eval_task_1_accuracy": 90.0, "eval_task_1_runtime": 1.0, "epoch": 1.0}, ""),
        (
            {"eval_current_accuracy": 90.126, "eval_mean_accuracy": 80.0, "eval_mean_loss": 0.5, "epoch": 1.0},
            "accuracy 90.13, mean accuracy 80, mean loss 0.5",
        ),
        ({"eval_stream_task_1_accuracy": 1.0, "eval_stream_forgetting": 2.5}, "forgetting 2.5"),
        ({"note": "a\x1b[0m"}, "note a\\x1b[0m"),
    ],
)
def test_logs_in_words(logs, words):
    assert in_words(logs) == words
