"""Runs that must agree: resumed and straight, paired twins, accumulated and whole batches, cached and live queries."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pgp_hf import ProjectionConfig
from pgp_hf.data.images import ImageCollator
from pgp_hf.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_figures")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class StopAt(TrainerCallback):
    """Ends the process's work, as a kill would, at a step of a task."""

    def __init__(self, task, step):
        self.task, self.step = task, step

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.task == self.task and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer = tiny.trainer(folder, augmentation="crop_flip")
    trainer.train()
    return trainer, folder


@pytest.mark.parametrize(("task", "step", "kwargs"), [(1, 6, {}), (0, 3, {"save_strategy": "steps", "save_steps": 2})])
def test_resumed_is_straight(straight, tmp_path, task, step, kwargs):
    """Stopped within a task, after an epoch's checkpoint or in the middle of one, and continued: the same to the bit."""
    stop = StopAt(task, step)
    trainer = tiny.trainer(tmp_path, augmentation="crop_flip", callbacks=[stop], **kwargs)
    stop.trainer = trainer
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert RunFolder(tmp_path).last_checkpoint(task) is not None
    torch.manual_seed(99)  # whatever the new process starts with
    resumed = tiny.trainer(tmp_path, augmentation="crop_flip", **kwargs)
    resumed.train(resume_from_checkpoint=True)
    reference, folder = straight
    for t in (1, 2, 3):
        assert equal(weights(tmp_path / f"task-{t}"), weights(folder / f"task-{t}"))
    bases, expected = (load_file(f / "projection.safetensors") for f in (tmp_path, folder))
    assert equal(bases, expected)
    assert tiny.same_results(resumed.results.to_dict(), reference.results.to_dict())


@pytest.mark.parametrize(
    ("task", "phase", "reinit"),
    [
        (0, "method.end_task", True),
        pytest.param(0, "evaluate_stream", False, marks=pytest.mark.slow),
        pytest.param(0, "_write_files", True, marks=pytest.mark.slow),
        (1, "evaluate_stream", True),
    ],
)
def test_the_same_trainer_goes_on_after_an_interruption(tmp_path, monkeypatch, task, phase, reinit):
    """Behind a task's last step: what its statistics had taken in is not counted twice, and projection goes on."""
    settings = {"augmentation": "flip", "num_train_epochs": 1, "reinit_optimizer": reinit}

    straight = tiny.trainer(tmp_path / "straight", model=tiny.model(head="statistics"), **settings)
    straight.train()
    trainer = tiny.trainer(tmp_path / "stopped", model=tiny.model(head="statistics"), **settings)
    owner, name = (trainer.method, "end_task") if phase == "method.end_task" else (trainer, phase)
    finish = getattr(owner, name)

    def interrupted(*args, **kwargs):
        finish(*args, **kwargs)
        if trainer.task == task:
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    for next_task in (task, task + 1):
        with pytest.raises(ValueError, match=f"this trainer has begun task {task + 1} and not finished it"):
            trainer.train_task(next_task)
    trainer.train(resume_from_checkpoint=True)
    assert tiny.same_results(trainer.results.to_dict(), straight.results.to_dict())
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))
    states = [each.projection.state() for each in (straight, trainer)]
    assert equal(states[0][0], states[1][0]) and states[0][1] == states[1][1]


def test_a_first_task_that_broke_off_without_a_checkpoint_needs_a_new_trainer(tmp_path):
    stop = StopAt(0, 2)
    stop.trainer = trainer = tiny.trainer(tmp_path, callbacks=[stop], save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(
        ValueError, match="has begun task 1 already: go on with train.resume_from_checkpoint=True., or"
    ):
        trainer.train()
    with pytest.raises(ValueError, match="has begun its first task and .* no checkpoint.*a new trainer"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", tiny.some_of(["l2p", "dualprompt"], "dualprompt"))
def test_resumed_in_the_first_task_by_a_process_that_was_seeded_otherwise(tmp_path, method):
    tiny.trainer(tmp_path / "straight", model=tiny.model(method, seed=1)).train()
    stop = StopAt(0, 6)
    stop.trainer = trainer = tiny.trainer(tmp_path / "stopped", model=tiny.model(method, seed=1), callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    tiny.trainer(tmp_path / "stopped", model=tiny.model(method, seed=2)).train(resume_from_checkpoint=True)
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))


def test_resume_in_another_folder_and_of_a_finished_run(straight, tmp_path):
    reference, folder = straight
    shutil.copytree(folder / "task-1", tmp_path / "a" / "task-1")
    shutil.copytree(folder / "features", tmp_path / "a" / "features")
    resumed = tiny.trainer(tmp_path / "b", augmentation="crop_flip")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a"))
    assert equal(weights(tmp_path / "b"), weights(folder))
    assert sorted(p.name for p in (tmp_path / "b").glob("task-*")) == ["task-1", "task-2", "task-3"]
    with pytest.raises(ValueError, match="holds an earlier run"):  # never a mix of two runs
        tiny.trainer(tmp_path / "b", augmentation="crop_flip").train(resume_from_checkpoint=str(tmp_path / "a"))
    finished = tiny.trainer(tmp_path / "b", augmentation="crop_flip")
    assert finished.train(resume_from_checkpoint=True).global_step == 0
    assert tiny.same_results(finished.results.to_dict(), reference.results.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed: 4, was 3"),
        ({"stream": lambda: tiny.stream(seed=1)}, "class_order|order"),
        ({"stream": lambda: tiny.stream(dataset=tiny.data(seed=5))}, "sha256|content|differ"),
        ({"projection": ProjectionConfig(energy=0.5)}, "energy=0.9"),
        ({"model": lambda: tiny.model(top_k=3)}, "has top_k=2, this one 3"),
        ({"reinit_optimizer": False}, "cannot be resumed exactly"),
    ],
)
def test_another_run_is_not_continued(straight, tmp_path, change, message):
    _, folder = straight
    before = (folder / "results.json").read_bytes()
    change = {k: v() if callable(v) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        shutil.copytree(folder, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "task-3")
        tiny.trainer(tmp_path / "run", augmentation="crop_flip", **change).train(resume_from_checkpoint=True)
    assert (folder / "results.json").read_bytes() == before


def test_twins_are_paired(tmp_path, straight):
    """With and without projection: the same run, to the bit, until a basis exists."""
    _, folder = straight
    twin = tiny.trainer(tmp_path, augmentation="crop_flip", projection=ProjectionConfig(method="none"))
    twin.train()
    assert equal(weights(tmp_path / "task-1"), weights(folder / "task-1"))
    assert not equal(weights(tmp_path / "task-2"), weights(folder / "task-2"))


def test_accumulated_batches_are_whole_batches(tmp_path):
    finals = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = tiny.trainer(
            tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        finals.append((weights(tmp_path / str(size)), trainer.results.drift))
    for name, whole in finals[0][0].items():
        assert torch.allclose(whole, finals[1][0][name], atol=1e-4), name
    assert finals[0][1] == pytest.approx(finals[1][1], abs=1e-3)


@pytest.mark.parametrize("augmentation", tiny.some_of(["none", "flip", "crop_flip"], "crop_flip"))
def test_cached_queries_are_live_queries(tmp_path, augmentation):
    results = {}
    for cached in (True, False):
        trainer = tiny.trainer(
            tmp_path / str(cached), cache_queries=cached, augmentation=augmentation, per_device_train_batch_size=8
        )
        trainer.train()
        queries = trainer.train_dataset.queries
        assert (queries is None) == (not cached or augmentation == "crop_flip")
        results[cached] = trainer
    kept, live = results[True], results[False]
    assert kept.results.matrix == live.results.matrix and kept.results.usage == live.results.usage
    assert kept.results.rank == live.results.rank and kept.results.changed == live.results.changed
    assert kept.results.drift == pytest.approx(live.results.drift, abs=1e-5)
    for t in range(3):
        np.testing.assert_allclose(
            kept.progress.references.features[t], live.progress.references.features[t], atol=1e-5
        )


def test_bases_do_not_depend_on_the_cache_under_autocast(tmp_path):
    """The key rows are the queries as training sees them: in bfloat16, whether kept or computed again."""
    bases = []
    for cached in (True, False):
        trainer = tiny.trainer(tmp_path / str(cached), cache_queries=cached, bf16=True, per_device_train_batch_size=8)
        trainer.train_task(0)
        bases.append(trainer.projection.bases)
    for name, basis in bases[0].items():
        assert torch.equal(basis.ranks, bases[1][name].ranks)
        projectors = [b[name].columns @ b[name].columns.mT for b in bases]
        assert torch.allclose(*projectors, atol=2e-2), name


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"num_train_epochs": 1}, False),  # two views of each image, of which training sees one and the projection one
        ({"num_train_epochs": 1, "augmentation": "none"}, True),
        ({"max_steps": 3}, False),
        ({"num_train_epochs": 2}, True),
    ],
)
def test_training_queries_are_kept_only_where_that_saves_work(tmp_path, settings, kept):
    trainer = tiny.trainer(tmp_path, **{"augmentation": "flip", **settings})
    trainer.train_task(0)
    assert (trainer.train_dataset.queries is not None) == kept


def test_a_collator_of_ones_own_gets_no_kept_training_queries(tmp_path):
    """It may augment, and a kept query would be that of another image."""
    trainer = tiny.trainer(tmp_path, augmentation="none")
    own = ImageCollator(tiny.processor())
    trainer.data_collator = lambda items: own(items)
    trainer.train_task(0)
    assert trainer.train_dataset.queries is None


def test_workers_change_nothing(tmp_path, straight):
    """Augmentation is a function of counters: two loader workers see what one process sees."""
    _, folder = straight
    trainer = tiny.trainer(tmp_path, augmentation="crop_flip", dataloader_num_workers=2)
    trainer.train_task(0)
    assert equal(weights(tmp_path / "task-1"), weights(folder / "task-1"))


def test_evaluation_batch_size_changes_nothing(tmp_path, straight):
    reference, _ = straight
    trainer = tiny.trainer(tmp_path, augmentation="crop_flip", per_device_eval_batch_size=3)
    trainer.train_task(0)
    assert trainer.results.matrix[0] == reference.results.matrix[0]
    features, expected = (each.progress.references.features[0] for each in (trainer, reference))
    assert np.allclose(features, expected, atol=1e-5)
