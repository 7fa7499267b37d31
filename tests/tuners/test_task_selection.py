"""Experts selected by class statistics of the frozen queries, instead of by keys."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pgp_hf import PGPTrainer, TaskStream, load_pretrained
from pgp_hf.heads.statistics import ClassStatistics
from pgp_hf.tuners.dualprompt.selection import TaskStatistics

pytestmark = pytest.mark.usefixtures("without_figures")

LAYERS = {"general_layers": [0], "expert_layers": [1]}


def make(selection="statistics", **kwargs):
    return tiny.model("dualprompt", **{**LAYERS, "selection": selection, **kwargs})


def of(classes, count=6, dim=5, seed=0):
    """Return class statistics of features drawn around the classes' numbers, of 4 classes."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes).repeat_interleave(count)
    return ClassStatistics(4, dim).update(torch.randn(len(labels), dim, generator=rng) + labels[:, None], labels)


def test_the_posterior_of_tasks_is_bayes_rule():
    tasks, queries = TaskStatistics(4, 3, 5), torch.randn(7, 5)
    for task, classes in enumerate([[0, 1], [2, 1], [3]]):  # class 1 comes twice
        tasks.add_task(task, of(classes, seed=task, count=6 + 6 * task))
    plain = ClassStatistics(4, 5)
    for task, classes in enumerate([[0, 1], [2, 1], [3]]):
        plain.merge(of(classes, seed=task, count=6 + 6 * task))
    by_class = plain(queries).softmax(-1)
    share = torch.tensor([[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 1, 0], [0, 0, 1]])
    assert torch.allclose(tasks.posterior(queries, 3), by_class @ share, atol=1e-6)
    two = tasks.posterior(queries, 2)  # of the first tasks, the others' own classes are out of the question
    expected = by_class[:, :3] @ share[:3, :2]
    assert torch.allclose(two, expected / expected.sum(-1, keepdim=True), atol=1e-6)
    tasks.calibration += torch.arange(len(tasks.calibration)).flip(0)  # the last temperature fits best
    assert tasks.temperature > 1
    assert torch.allclose(
        tasks.posterior(queries, 3), (plain(queries) / tasks.temperature).softmax(-1) @ share, atol=1e-6
    )


def test_room_for_classes_and_tasks_changes_nothing():
    tasks, queries = TaskStatistics(4, 2, 5).add_task(0, of([0, 2])).add_task(1, of([1, 3], seed=1)), torch.randn(7, 5)
    before = tasks.posterior(queries, 2)
    tasks.add_classes(3).make_room(5).make_room(1)
    assert tasks.tasks.shape == (7, 5) and len(tasks.counts) == 7
    assert torch.equal(tasks.posterior(queries, 2), before)
    assert torch.allclose(tasks.posterior(queries, 5), torch.cat([before, torch.zeros(7, 3)], 1))


def test_without_queries_there_is_an_error():
    model = make()
    model(tiny.images())  # before the first task, by key
    model.base_model.begin_task(0)
    with pytest.raises(ValueError, match="there are no statistics of queries to select experts by"):
        model(tiny.images())


def test_keys_have_no_statistics():
    assert make("key").base_model.query_statistics is None
    assert not [name for name in make("key").state_dict() if "queries" in name]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run by statistics, in which two of three tasks were trained before it was stopped and resumed."""
    folder = tmp_path_factory.mktemp("run")
    with tiny.without_figures():
        tiny.trainer(folder / "straight", model=make(head="statistics"), compensate_drift=True).train()
        stopped = tiny.trainer(folder / "run", model=make(head="statistics"), compensate_drift=True)
        stopped.train_task(0)
        stopped.train_task(1)
        trainer = tiny.trainer(folder / "run", model=make(head="statistics"), compensate_drift=True)
        trainer.train(resume_from_checkpoint=True)
    return folder, trainer


def test_resumed_is_straight(run):
    folder, _ = run
    a, b = (load_file(folder / name / "adapter_model.safetensors") for name in ("straight", "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert sum("dualprompt_queries" in key for key in a) == 5


def test_images_select_the_task_that_their_queries_are_most_likely_of(run):
    _, trainer = run
    tuner, stream = trainer.model.base_model, trainer.stream
    known = ClassStatistics(tiny.CLASSES, 24)
    with torch.no_grad():
        for t in range(3):
            images = stream.train(t)
            pixels = trainer.data_collator([images[i] for i in range(len(images))])["pixel_values"]
            known.update(tuner.query(pixels), torch.from_numpy(images.labels))
        trainer.model(pixels := tiny.images(12))
        by_class = (known(tuner.query(pixels)) / tuner.query_statistics.temperature).softmax(-1)
    of_task = torch.stack([by_class[:, list(task.classes)].sum(1) for task in stream.tasks], 1)
    assert torch.equal(tuner.selected_prompts[:, 0], of_task.argmax(1))
    assert tuner.query_statistics.tasks.sum(0).tolist() == [len(stream.train(t)) for t in range(3)]


def test_saved_is_loaded(run):
    folder, trainer = run
    images = tiny.images()
    expected = trainer.model(images).logits
    again = PeftModel.from_pretrained(tiny.backbone(), folder / "run")
    assert torch.equal(again(images).logits, expected)
    clf = load_pretrained(folder / "run", backbone=tiny.backbone())
    assert torch.allclose(clf.model(images).logits * trainer.tuner.statistics.temperature, expected)
    first = load_pretrained(folder / "run" / "task-1", backbone=tiny.backbone())
    first.model(images)
    assert not first.model.base_model.selected_prompts.any()  # the one expert there is
    assert "found by class statistics of the query" in (folder / "run" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_exported_is_the_same(run):
    folder, _ = run
    clf = load_pretrained(folder / "run", backbone=tiny.backbone())
    clf.export(folder / "classifier.pt2", format="torch")  # which compares scores with the classifier's


def test_learning_on_makes_room(run, tmp_path):
    folder, _ = run
    data = tiny.data(classes=8)
    trainer = PGPTrainer.from_pretrained(
        folder / "run", args=tiny.arguments(tmp_path / "on"), backbone=tiny.backbone()
    )
    before = trainer.model.base_model.query_statistics.tasks.clone()
    labels = data["train"].features["label"]
    new = data["train"].filter(lambda row: labels.int2str(row["label"]) not in trainer.stream.label_names)
    trainer.learn(new)
    after = trainer.model.base_model.query_statistics.tasks
    assert torch.equal(after[: len(before), :3], before)
    assert after[len(before) :, 3].tolist() == trainer.model.base_model.statistics.counts[len(before) :].tolist()
    again = PeftModel.from_pretrained(tiny.backbone(), tmp_path / "on")
    assert torch.equal(again(tiny.images()).logits, trainer.model(tiny.images()).logits)


def test_a_mixture_weighs_the_experts_by_the_posterior():
    model = make("mixture", expert_length=3, general_length=0, general_layers=[])
    tuner = model.base_model
    tuner.begin_task(2)
    tuner.model.eval()
    layer = tuner.backbone.layers[1].attention
    images = tiny.images(4)
    for classes in ([0, 1], [2, 3]):
        task = classes[0] // 2
        own = ClassStatistics(tiny.CLASSES, 24).update(tuner.query(images[:2] + task), torch.tensor(classes))
        tuner.query_statistics.add_task(task, own)
    model(images)
    weights = tuner.query_statistics.posterior(tuner.query(images), 3)
    key, value = layer._prefix(4)
    for found, experts in ((key, layer.dualprompt_expert_key), (value, layer.dualprompt_expert_value)):
        each = experts["default"].transpose(0, 1)  # (M, H, L, dh)
        assert torch.allclose(found, (weights[:, :, None, None, None] * each).sum(1), atol=1e-6)
    assert torch.equal(tuner.selected_prompts[:, 0], weights.argmax(1))
    model.train()
    model(images)
    assert layer.mixture is None and (tuner.selected_prompts == 2).all()


def test_an_empty_stream(tmp_path):
    model = tiny.model("dualprompt", **LAYERS, selection="statistics", head="statistics")
    trainer = tiny.trainer(tmp_path, model=model, stream=TaskStream.empty(), num_train_epochs=1)
    trainer.learn(tiny.data(classes=2))
    assert trainer.model.base_model.query_statistics.tasks.sum(1).tolist() == [8, 8]
