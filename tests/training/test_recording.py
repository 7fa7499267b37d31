"""Test images are passed through the model again only when what its head reads of them may have changed."""

from __future__ import annotations

import pytest
import tiny
import torch

from pgp_hf import ProjectionConfig
from pgp_hf.methods import FineTuning
from pgp_hf.training import recording

DATA = {"dataset": tiny.data(train=3, test=3), "num_tasks": 3}


def run(folder, monkeypatch=None, **settings):
    """Train; return the trainer and the number of images of each batch that evaluation has passed through the model."""
    passed = []
    if monkeypatch is not None:
        monkeypatch.setattr(recording, "reusing", lambda learner: None)
    with tiny.without_figures():
        trainer = tiny.trainer(
            folder, stream=tiny.stream(**DATA), num_train_epochs=1, per_device_eval_batch_size=4, **settings
        )
        step = trainer.prediction_step

        def noting(model, inputs, *args, **kwargs):
            passed.append(len(inputs["pixel_values"]))
            return step(model, inputs, *args, **kwargs)

        trainer.prediction_step = noting
        trainer.train()
    return trainer, passed


def settings_of(kind):
    frozen = {"projection": ProjectionConfig(method="frozen")}
    return {
        "l2p": lambda: {**frozen, "model": tiny.model(head="statistics")},
        "dualprompt": lambda: {**frozen, "model": tiny.model("dualprompt")},
        "clip": lambda: {**frozen, "model": tiny.model("clip")},
        "clip with statistics": lambda: {**frozen, "model": tiny.model("clip", head="statistics")},
        "head": lambda: {"model": tiny.plain("head"), "method": FineTuning()},
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    tiny.some_of(["l2p", "dualprompt", "clip", "clip with statistics", "head"], "l2p", "dualprompt", "clip", "head"),
)
def test_nothing_changes_but_what_is_computed(tmp_path, monkeypatch, kind):
    kept, passed = run(tmp_path / "kept", **settings_of(kind))
    anew, all_passed = run(tmp_path / "anew", monkeypatch, **settings_of(kind))
    assert tiny.same_results(kept.results.to_dict(), anew.results.to_dict())
    for t in range(3):
        a, b = kept.progress.references.tensors(t), anew.progress.references.tensors(t)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert sum(all_passed) == 6 + 12 + 18
    # keys of new experts may win images of older tasks, whose features change then; else each image is seen once
    assert 18 <= sum(passed) < 36 if kind == "dualprompt" else sum(passed) == 18


def test_features_that_move_are_computed_again(tmp_path, monkeypatch):
    trainer, passed = run(tmp_path)
    assert sum(passed) == 6 + 12 + 18  # prompts of L2P that all tasks share
    passed.clear()
    first = trainer.evaluate_stream()
    assert not passed  # nothing has moved since
    prompt = trainer.tuner.layer.l2p_prompt["default"]
    used = {entry for j in range(3) for entry in trainer._record(j).selected.flatten().tolist()}
    with torch.no_grad():
        for entry in set(range(len(prompt))) - used:
            prompt[entry] += 1  # nobody selects it
        assert trainer.evaluate_stream()["accuracy_matrix"] == first["accuracy_matrix"] and not passed
        prompt[min(used)] += 1
    trainer.evaluate_stream()
    assert 0 < sum(passed) <= 18
    passed.clear()
    monkeypatch.setattr(type(trainer.method), "predict_logits", lambda self, model, inputs, logits, features: logits)
    trainer.evaluate_stream()
    assert sum(passed) == 18  # a method with a pass of its own sees all images


def test_all_tasks_are_predicted_at_once_each_in_its_own_batches(tmp_path, monkeypatch):
    trainer, _ = run(tmp_path)
    asked, states = [], type(trainer.tuner).feature_states
    count = lambda self, batches: asked.append(len(batches)) or states(self, batches)  # noqa: E731
    monkeypatch.setattr(type(trainer.tuner), "feature_states", count)
    trainer.evaluate_stream()
    assert asked == [6]  # of an evaluation, not of a task
    monkeypatch.setattr(recording, "reusing", lambda learner: None)
    calls, batches, predict = [], [], trainer.predict
    step = trainer.prediction_step

    def noting(model, inputs, *args, **kwargs):
        batches.append(inputs["task"].tolist())
        return step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "prediction_step", noting)
    monkeypatch.setattr(trainer, "predict", lambda *args, **kwargs: calls.append(args) or predict(*args, **kwargs))
    trainer.evaluate_stream()
    assert len(calls) == 1 and batches == [[0] * 4, [0] * 2, [1] * 4, [1] * 2, [2] * 4, [2] * 2]
    monkeypatch.setattr(recording, "GROUP", 13)
    trainer.evaluate_stream()
    assert len(calls) == 3  # 12 images, and then 6


@torch.no_grad()
def test_what_learns_between_backbone_and_head_counts():
    base = tiny.backbone()
    base.neck = torch.nn.Linear(24, 24)  # as a model of the user's own has it
    tuner = tiny.model(base=base, modules_to_save=["neck", "classifier"]).base_model
    queries = [tuner.query(tiny.images())]
    first = tuner.feature_states(queries)
    tuner.model.classifier.modules_to_save["default"].weight.add_(1)  # which is applied anew to what is kept
    assert tuner.feature_states(queries) == first != [None]
    tuner.model.neck.modules_to_save["default"].weight.add_(1)
    assert tuner.feature_states(queries) != first
