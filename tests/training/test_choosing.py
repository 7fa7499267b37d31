"""A checkpoint, an end of training and a learning rate are chosen on validation images, by names that exist."""

from __future__ import annotations

import logging

import pytest
import tiny
from transformers import EarlyStoppingCallback, TrainerCallback

from pgp_hf import StreamTrainer, TaskStream
from pgp_hf.methods import create
from pgp_hf.training.choosing import summarize

pytestmark = pytest.mark.usefixtures("without_figures")
EACH_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch"}
BEST = {**EACH_EPOCH, "load_best_model_at_end": True}
PLATEAU = {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau"}
FALLS = {"lr_scheduler_kwargs": {"mode": "max"}}


def held_out(**settings):
    return tiny.stream(train_val_split=0.25, **settings)


def test_the_current_task_and_the_mean_over_tasks():
    metrics = {
        "eval_task_1_accuracy": 80.0,
        "eval_task_1_loss": 1.0,
        "eval_task_1_runtime": 5.0,
        "eval_task_10_accuracy": 0.0,
        "eval_task_2_accuracy": 60.0,
        "eval_task_2_loss": 3.0,
        "eval_task_2_f1": 0.5,
        "epoch": 1.0,
    }
    assert summarize(metrics, ["task_2"], ["task_1", "task_2"], "eval") == {
        "eval_current_accuracy": 60.0,
        "eval_current_loss": 3.0,
        "eval_current_f1": 0.5,
        "eval_mean_accuracy": 70.0,  # not of task 10
        "eval_mean_loss": 2.0,
    }
    assert summarize(metrics, [], ["task_1"], "eval") == {"eval_mean_accuracy": 80.0, "eval_mean_loss": 1.0}


class Record(TrainerCallback):
    """Keeps what is logged of evaluations, by task."""

    def __init__(self):
        self.logged, self.task = [], None

    def on_task_begin(self, args, state, control, task, **kwargs):
        self.task = task

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "eval_mean_accuracy" in logs:
            self.logged.append((self.task, logs))


def test_the_best_checkpoint_of_each_task_is_kept(tmp_path):
    """By the accuracy on its validation images, which is what the results then have of it."""
    record = Record()
    trainer = tiny.trainer(
        tmp_path, stream=held_out(), **BEST, num_train_epochs=3, learning_rate=0.3, callbacks=[record]
    )
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_current_accuracy", True)
    trainer.train()
    for t in range(3):
        seen = [logs["eval_current_accuracy"] for task, logs in record.logged if task == t]
        assert len(seen) == 3 and trainer.results.matrix[t][t] == pytest.approx(max(seen))
    assert any(  # it mattered
        max(own) != own[-1]
        for own in ([logs["eval_current_accuracy"] for task, logs in record.logged if task == t] for t in range(3))
    )


@pytest.mark.parametrize("metric", tiny.some_of(["eval_mean_accuracy", "mean_loss"], "mean_loss"))
def test_training_stops_when_nothing_improves(tmp_path, caplog, metric):
    """In each task anew, and without a word of names that other tasks' evaluations have."""
    record, early = Record(), EarlyStoppingCallback(early_stopping_patience=1)
    settings = {**BEST, "metric_for_best_model": metric, "num_train_epochs": 6, "learning_rate": 0.0}
    trainer = tiny.trainer(tmp_path, stream=held_out(), **settings, callbacks=[early, record])
    with caplog.at_level(logging.WARNING, "transformers"):
        trainer.train()
    assert [task for task, _ in record.logged] == [0, 0, 1, 1, 2, 2]  # two of six epochs
    assert "early stopping" not in caplog.text


def test_the_learning_rate_falls_when_nothing_improves(tmp_path):
    settings = {**PLATEAU, "lr_scheduler_kwargs": {"mode": "max", "patience": 0, "factor": 0.5, "threshold": 200.0}}
    trainer = tiny.trainer(tmp_path, stream=held_out(num_tasks=1), **settings, num_train_epochs=4)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(
        0.01 / 8
    )  # the first of four evaluations is better


@pytest.mark.parametrize("settings", [BEST, {**EACH_EPOCH, "save_strategy": "best"}, {**PLATEAU, **FALLS}, "early"])
@pytest.mark.parametrize("stream", [tiny.stream, TaskStream.empty])
def test_test_images_are_not_chosen_by(tmp_path, settings, stream):
    early = settings == "early"
    callbacks = [EarlyStoppingCallback()] if early else []
    settings = {**EACH_EPOCH, "metric_for_best_model": "eval_current_loss"} if early else settings
    with pytest.raises(ValueError, match=r"would choose by test images, .*train_val_split=0.1.*--train_val_split 0.1"):
        tiny.trainer(tmp_path, stream=stream(), **settings, callbacks=callbacks)


@pytest.mark.parametrize(
    "settings",
    [
        {**BEST, "metric_for_best_model": name}
        for name in ("accuracy", "eval_loss", "eval_task_2_loss", "eval_current_f1")
    ],
)
def test_metrics_that_do_not_exist(tmp_path, settings):
    message = (
        "metric_for_best_model=.* is not measured in every task: choose one of eval_current_accuracy, eval_mean_acc"
    )
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, stream=held_out(), **settings)
    with pytest.raises(ValueError, match=message):  # whoever asks, since the name is looked up at each evaluation
        tiny.trainer(tmp_path, **{**settings, "load_best_model_at_end": False})


def test_the_users_own_metric(tmp_path):
    def f1(prediction):
        return {"f1": 0.5}

    settings = {**BEST, "metric_for_best_model": "eval_current_f1"}
    trainer = tiny.trainer(tmp_path, stream=held_out(num_tasks=1), **settings, compute_metrics=f1)
    trainer.train()
    assert trainer.state.best_metric == 0.5
    with pytest.raises(ValueError, match="metric_for_best_model='f1' .* or the same of a value that compute_metrics"):
        tiny.trainer(tmp_path, stream=held_out(), compute_metrics=f1, **{**BEST, "metric_for_best_model": "f1"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_strategy": "best"}, "save_strategy='best' needs evaluations .*eval_strategy='epoch'"),
        (PLATEAU, r"treats lower values of 'eval_current_accuracy' as better.*lr_scheduler_kwargs=\{'mode': 'max'\}"),
        (
            {**PLATEAU, **FALLS, "metric_for_best_model": "eval_mean_loss"},
            r"treats greater values of 'eval_mean_loss' as better.*\{'mode': 'min'\}",
        ),
    ],
)
def test_what_else_cannot_choose(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, stream=held_out(), **settings)


def test_an_early_stop_needs_a_metric(tmp_path):
    with pytest.raises(
        ValueError, match="EarlyStoppingCallback needs a metric: metric_for_best_model='eval_current_acc"
    ):
        tiny.trainer(tmp_path, stream=held_out(), **EACH_EPOCH, callbacks=[EarlyStoppingCallback()])


def test_a_task_that_was_appended_has_no_validation_images(tmp_path):
    data = tiny.data()
    known, new = (
        data.filter(lambda label, own=own: label in own, input_columns="label") for own in ([0, 1, 2], [3, 4])
    )
    stream = TaskStream.from_dataset(known, num_tasks=1, train_val_split=0.25)
    model = tiny.plain(base=tiny.backbone(num_labels=stream.num_classes, id2label=stream.id2label))
    trainer = StreamTrainer(
        model,
        tiny.arguments(tmp_path, **BEST),
        stream,
        create("fine_tuning"),
        processing_class=tiny.processor(),
    )
    trainer.train()
    with pytest.raises(ValueError, match="load_best_model_at_end=True would choose by test images"):
        trainer.learn(new)
    assert stream.num_tasks == 1


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_datasets_of_the_users_own_would_be_replaced(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is the stream's own"):
        tiny.trainer(tmp_path, **{name: tiny.stream().train(0)})
