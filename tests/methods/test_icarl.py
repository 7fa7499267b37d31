"""iCaRL: its loss, its exemplars, and the nearest mean that predicts."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pgp_hf.heads.nearest_mean import nearest_mean_scores, unit_means
from pgp_hf.methods import ExemplarConfig, ICaRL, MethodState, create
from pgp_hf.methods.icarl import binary_cross_entropy
from pgp_hf.methods.memory import herd

pytestmark = pytest.mark.usefixtures("without_figures")


class Recording(ICaRL):
    """Keeps what each step saw and cost."""

    name = "icarl_for_tests"

    def __init__(self, config=None):
        super().__init__(config)
        self.steps, self.quotas = [], []

    def loss(self, context, batch, output, losses):
        found = super().loss(context, batch, output, losses)
        auxiliary = context.model.auxiliary_loss(output)
        own = found if auxiliary is None else found - auxiliary
        self.steps.append((context, batch, context.model.class_logits(output).detach(), own.detach()))
        return found

    def end_task(self, context):
        super().end_task(context)
        self.quotas.append({label: rows[:, :2].tolist() for label, rows in self.memory.kept.items()})


@pytest.fixture(scope="module", params=["l2p", "full"])
def run(request, tmp_path_factory, without_figures):
    """A run of two of three tasks, in the third of which nothing has happened yet."""
    folder = tmp_path_factory.mktemp("icarl")
    model = tiny.plain() if request.param == "full" else tiny.model()
    own = tiny.trainer(folder, method=Recording(ExemplarConfig(memory_size=14)), model=model)
    own.train_task(0)
    own.train_task(1)
    return own


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_worked_numbers():
    taught, z = torch.tensor([[1.0, -1.0, 9.0, 9.0]]), torch.tensor([[0.5, -0.5, 2.0, -2.0]])
    label = torch.tensor([2])
    found = binary_cross_entropy(z, label, [2, 3], [0, 1], taught)
    assert found.tolist() == pytest.approx([1.47095], abs=1e-5)  # the mean over classes would be .36774
    for new, old, term in (([2], [], 0.12693), ([3], [], 0.12693), ([], [0], 0.60855), ([], [1], 0.60855)):
        assert binary_cross_entropy(z, label, new, old, taught if old else None).item() == pytest.approx(
            term, abs=1e-5
        )
    exemplar = binary_cross_entropy(
        z, torch.tensor([0]), [2, 3], [0, 1], taught
    )  # of an old class: no new one is right
    assert exemplar.item() == pytest.approx(2 * 0.60855 + 2.12693 + 0.12693, abs=1e-5)


def test_what_agrees_with_the_teacher_has_no_gradient_to_the_bit():
    taught = 5 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    z = taught.clone().requires_grad_()
    binary_cross_entropy(z, torch.full((8,), 5), [4, 5], [2, 0, 1, 3], taught).sum().backward()
    assert (z.grad[:, :4] == 0).all() and (z.grad[:, 4:] != 0).all()


def test_the_loss_of_a_stream(run):
    first, second = (list(task.classes) for task in run.stream.tasks[:2])
    context, batch, logits, found = run.method.steps[7]  # the last step of the first task
    assert context.task == 0
    one_hot = F.one_hot(batch.labels, 6)[:, first].float()
    expected = F.binary_cross_entropy_with_logits(logits[:, first], one_hot, reduction="none").sum(-1)  # no old terms
    torch.testing.assert_close(found, expected)

    context, batch, logits, found = run.method.steps[-1]
    assert context.task == 1
    taught = run.stream_model.class_logits(context.forward(batch, run.method.teacher))
    targets = torch.cat([taught[:, first].sigmoid(), F.one_hot(batch.labels, 6)[:, second].float()], 1)
    expected = F.binary_cross_entropy_with_logits(logits[:, [*first, *second]], targets, reduction="none").sum(-1)
    torch.testing.assert_close(found, expected)


# ---- exemplars -------------------------------------------------------------------------------------------------------


def test_exemplars_are_trained_on_in_every_epoch(run):
    seen = [
        (context.task, *place)
        for context, batch, *_ in run.method.steps
        for place in zip(batch.tasks.tolist(), batch.indices.tolist(), strict=True)
    ]
    kept = [place for places in run.method.quotas[0].values() for place in places]
    assert len(kept) == 14 and sorted(seen[:32]) == sorted(2 * [(0, 0, i) for i in range(16)])
    assert sorted(seen[32:]) == sorted(2 * ([(1, 1, i) for i in range(16)] + [(1, *place) for place in kept]))


def test_a_quota_that_shrinks_keeps_the_first(run):
    first, second = run.method.quotas
    (a, b), (c, d) = (list(task.classes) for task in run.stream.tasks[:2])
    assert {label: len(places) for label, places in first.items()} == {a: 7, b: 7}
    assert {label: len(places) for label, places in second.items()} == {a: 3, b: 3, c: 3, d: 3}  # 14 // 4
    assert all(second[label] == first[label][:3] for label in (a, b))
    for label, places in second.items():
        assert all(run.stream.train(task).labels[index] == label for task, index in places)


def test_exemplars_are_chosen_by_the_trained_features(run):
    context = run.method.steps[-1][0]
    images = run.stream.train(1)
    for label in run.stream.tasks[1].classes:
        places = [[1, i] for i in range(16) if images.labels[i] == label]
        order = herd(context.observe(places).features, 3)
        assert run.method.quotas[1][label] == [places[i] for i in order]


def test_what_is_written(run):
    folder = run.folder.root / "task-2"
    tensors, content = load_file(folder / "method.safetensors"), json.loads((folder / "method.json").read_text())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "labels": (12,), "places": (12, 2), "sizes": (12,), "means": (6, 24)
    }  # fmt: skip
    assert content["state"] == {"images": 12, "bytes": 12 * 3 * tiny.SIDE**2}
    card = (folder / "README.md").read_text()
    assert "kept 12 images (14 at most; 14,400 bytes as uncompressed images)" in card
    assert "iCaRL" in card and "not rehearsal-free" in card and "without keeping old images" not in card


# ---- prediction ------------------------------------------------------------------------------------------------------


def test_the_nearest_mean():
    angles = torch.deg2rad(torch.tensor([20.0, 55.0, 90.0]))
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[4.0], [0.5], [2.0]])
    means = unit_means(features, torch.tensor([1, 1, 3]), 4)
    assert means[1].tolist() == pytest.approx([0.79335, 0.60876], abs=1e-5) and means[3].tolist() == pytest.approx(
        [0, 1], abs=1e-6
    )
    assert means.norm(dim=-1).tolist() == pytest.approx([0, 1, 0, 1])
    images = 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    scores = nearest_mean_scores(images, means)
    assert torch.isneginf(scores[:, [0, 2]]).all() and scores[:, [1, 3]].abs().max() <= 1 + 1e-6
    distances = torch.cdist(F.normalize(images, dim=-1), means[[1, 3]])
    assert torch.equal(scores.argmax(-1), torch.tensor([1, 3])[distances.argmin(-1)])


def test_predictions_are_those_of_the_nearest_mean(run):
    test, seen = run.stream.test(1), run.stream.seen_classes(1)
    scores = torch.as_tensor(run.predict(test).predictions)
    batch = run.data_collator([test[i] for i in range(len(test))])
    context, kept = run.method.steps[-1][0], run.method.memory
    features = F.normalize(read(run, batch))
    exemplars = F.normalize(context.observe(kept.places()).features)
    for label in range(tiny.CLASSES):
        if label not in seen:
            assert (scores[:, label] < -1).all()
            continue
        mean = F.normalize(exemplars[kept.labels() == label].mean(0), dim=0)
        torch.testing.assert_close(scores[:, label], features @ mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def read(run, batch):
    """What the head reads."""
    found = []
    watch = run.stream_model.watch_features(found.append)
    run.model.eval()(pixel_values=batch["pixel_values"])
    watch.remove()
    return found[0]


def test_means_follow_the_features(run):
    earlier = load_file(run.folder.root / "task-1" / "method.safetensors")["means"]
    first, second = (list(task.classes) for task in run.stream.tasks[:2])
    assert earlier[first].norm(dim=-1).tolist() == pytest.approx([1, 1]) and not earlier[second].any()
    now = run.method.means
    assert now[[*first, *second]].norm(dim=-1).tolist() == pytest.approx([1] * 4)
    assert not torch.allclose(now[first], earlier[first], atol=1e-3)


class Looking(ICaRL):
    """Looks how it would predict within a task."""

    name = "looking_for_tests"

    def loss(self, context, batch, output, losses):
        logits = context.model.class_logits(output)
        self.trained = self.adjust_logits(logits, torch.randn(len(logits), 24)) is logits
        return super().loss(context, batch, output, losses)


def test_while_a_task_is_learned_the_trained_head_predicts(tmp_path):
    method = Looking(ExemplarConfig(memory_per_class=2))
    own = tiny.trainer(tmp_path, method=method, num_train_epochs=1)
    logits = torch.randn(3, 6)
    assert method.adjust_logits(logits, torch.randn(3, 24)) is logits  # before the first mean
    for task in range(2):
        own.train_task(task)
        assert method.trained and not torch.equal(method.adjust_logits(logits, torch.randn(3, 24)), logits)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_numbers_of_exemplars():
    assert ICaRL().settings() == {"memory_size": 2000, "memory_per_class": None, "memory_stores": "places"}
    quotas = [ExemplarConfig().quota(classes) for classes in range(10, 101, 10)]
    assert quotas == [200, 100, 66, 50, 40, 33, 28, 25, 22, 20]
    assert 30 * ExemplarConfig(memory_size=1000).quota(30) == 990
    assert ExemplarConfig(memory_per_class=5).quota(90) == 5
    assert create("icarl", **ICaRL(ExemplarConfig(memory_per_class=5)).settings()).config.memory_size is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_size": 0}, "memory_size=0 is out of range: this method needs exemplars"),
        ({"memory_per_class": -1}, "memory_per_class=-1 is out of range"),
        ({"memory_size": 10, "memory_per_class": 2}, "memory_size=10 and memory_per_class=2 are mutually exclusive"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        create("icarl", **settings)


def test_a_memory_that_is_too_small_for_the_stream(tmp_path):
    with pytest.raises(
        ValueError, match="memory_size=5 leaves no exemplar for some of the 6 classes: set it to at least 6"
    ):
        tiny.trainer(tmp_path, method=create("icarl", memory_size=5))
    tiny.trainer(tmp_path, method=create("icarl", memory_size=6))


def test_another_head(tmp_path):
    with pytest.raises(ValueError, match="head='statistics' of this l2p adapter: set head='linear'"):
        tiny.trainer(tmp_path, method=create("icarl"), model=tiny.model(head="statistics"))


def test_a_state_of_another_method():
    with pytest.raises(ValueError, match="it is another's"):
        ICaRL().load_state(MethodState({"0.fisher.x": torch.zeros(3)}, {}))
    with pytest.raises(ValueError, match=r"means of shape \(3,\)"):
        ICaRL().load_state(MethodState({"means": torch.zeros(3)}, {}))
