"""A task's images pass through the model once for what a projection and the class statistics keep of them, to the bit."""

from __future__ import annotations

import pytest
import tiny
import torch

from pgp_hf import ProjectionConfig
from pgp_hf.methods import ProjectedPrompts
from pgp_hf.training import sharing, task_trainer

pytestmark = pytest.mark.usefixtures("without_figures")

SAME = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 6, "num_train_epochs": 1, "max_steps": 1}


class Separate(sharing.HeadInputs):
    """Let every pass be its own."""

    def noting(self, context):
        return context


def learned(folder, adapter, projection, **settings):
    """Train a task; return its trainer, and how often the head has read images at its end."""
    model = tiny.model(adapter, head="statistics")
    trainer = tiny.trainer(folder, model=model, projection=projection, **{**SAME, **settings})
    passes, end = [], trainer._learn_from_trained

    def counting(context, before):
        watch = trainer.tuner.watch_features(lambda features: passes.append(len(features)))
        end(context, before)
        watch.remove()

    trainer._learn_from_trained = counting
    trainer.train_task(0)
    return trainer, sum(passes)


def state(trainer):
    statistics = trainer.tuner.statistics
    return {**trainer.projection.state()[0], **dict(statistics.named_buffers())}


@pytest.mark.parametrize(
    ("adapter", "method", "shared", "apart"),
    [
        ("l2p", "functional", 16, 32),
        pytest.param("dualprompt", "functional", 16, 32, marks=pytest.mark.slow),
        pytest.param("clip", "functional", 16, 32, marks=pytest.mark.slow),
        ("dualprompt", "pgp", 16, 32),
        pytest.param("l2p", "pgp", 16, 16, marks=pytest.mark.slow),  # whose rows are those of the embeddings
    ],
)
def test_one_pass_gives_the_same_bits(tmp_path, monkeypatch, adapter, method, shared, apart):
    projection = ProjectionConfig(method=method, energy=0.9, key_energy=0.9)
    one, passed = learned(tmp_path / "one", adapter, projection)
    monkeypatch.setattr(task_trainer, "HeadInputs", Separate)
    two, twice = learned(tmp_path / "two", adapter, projection)
    assert (passed, twice) == (shared, apart)
    a, b = state(one), state(two)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert tiny.same_results(one.results.to_dict(), two.results.to_dict())


@pytest.mark.parametrize(
    ("settings", "projection"),
    [
        ({"per_device_eval_batch_size": 5}, {}),  # batches of other sizes round differently
        ({}, {"max_images": 8}),
        pytest.param({}, {"bf16_probes": True}, marks=pytest.mark.slow),
        pytest.param({"bf16": True}, {}, marks=pytest.mark.slow),
    ],
)
def test_passes_that_differ_stay_apart(tmp_path, monkeypatch, settings, projection):
    monkeypatch.setattr(task_trainer, "HeadInputs", None)
    config = ProjectionConfig(method="functional", energy=0.9, key_energy=0.9, **projection)
    _, passed = learned(tmp_path, "l2p", config, **settings)
    assert passed == 16 + projection.get("max_images", 16)


class Noisy(ProjectedPrompts):
    """End a task by passes of its own, which are not those of evaluation."""

    def end_task(self, context):
        for batch, _ in context.views(None):
            context.model.model(**{**batch.inputs, "pixel_values": torch.zeros_like(batch.inputs["pixel_values"])})


def test_a_subclass_with_passes_of_its_own_changes_no_statistics(tmp_path, monkeypatch):
    config = ProjectionConfig(method="functional", energy=0.9, key_energy=0.9)
    model = tiny.model("l2p", head="statistics")
    own = tiny.trainer(tmp_path / "own", model=model, method=Noisy(config), **SAME)
    own.train_task(0)
    usual, _ = learned(tmp_path / "usual", "l2p", config)
    for (name, a), b in zip(
        own.stream_model.statistics.named_buffers(), usual.tuner.statistics.buffers(), strict=True
    ):
        assert torch.equal(a, b), name


def test_probes_in_the_metric_of_the_head_wait_for_it(tmp_path):
    """The class statistics know the task before its probes are drawn."""
    config = ProjectionConfig(method="functional", energy=0.9, key_energy=0.9, probe_space="statistics")
    _, passed = learned(tmp_path, "l2p", config)
    assert passed == 32
