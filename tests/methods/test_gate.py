"""The multi-centroid gate and the stages that train it and the heads: worked numbers, matching, draws."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pgp_hf.methods.gate import Gate, combine, log_shares, match, positives, task_scores
from pgp_hf.methods.stages import descend, steps, tune_heads


def numbers():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def made(sizes=(2, 3), width=4, per_class=1.0):
    gate = Gate(per_class)
    for task, size in enumerate(sizes):
        gate.grow(size, width, (5, task))
    return gate


# ---- worked numbers --------------------------------------------------------------------------------------------------


def test_adjustment_by_frequencies():
    s, positive = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0])  # two centroids of one task, one of another
    assert F.cross_entropy(s, positive).item() == pytest.approx(0.4076, abs=5e-5)
    a = log_shares(torch.tensor([0.2, 0.8])).repeat_interleave(torch.tensor([2, 1]))
    assert F.cross_entropy(s + a, positive).item() == pytest.approx(0.9581, abs=5e-5)
    assert torch.equal(log_shares(torch.tensor([10, 40])), log_shares(torch.tensor([0.2, 0.8])))
    assert log_shares(torch.tensor([0, 4]))[0].item() == pytest.approx(
        np.log(1e-5), abs=1e-3
    )  # no image: not infinite


def test_weights_of_tasks():
    for temperature, expected in ((12.0, [0.5208, 0.4792]), (1.0, [0.7311, 0.2689])):
        log_weights = (torch.tensor([[2.0, 1.0]]) / temperature).log_softmax(-1)
        found = combine(torch.ones(1, 2), log_weights, "multiply")[0]
        assert found.tolist() == pytest.approx(expected, abs=5e-5) and found.sum().item() == pytest.approx(1)


def test_products_raise_negative_scores():
    logits, w = torch.tensor([[-3.0, -2.0, -1.0, -4.0]]), torch.tensor([[0.9, 0.9, 0.1, 0.1]])
    products, sums = (combine(logits, w.log(), rule)[0] for rule in ("multiply", "log"))
    assert products.tolist() == pytest.approx([-2.7, -1.8, -0.1, -0.4]) and products.argmax() == 2
    assert sums.tolist() == pytest.approx([-3.1, -2.1, -3.3, -6.3], abs=0.01) and sums.argmax() == 1


@pytest.mark.parametrize("rule", ["multiply", "log"])
def test_equal_scores_of_tasks_keep_the_ranking(rule):
    logits = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    weights = torch.full((50, 3), 7.0).log_softmax(-1)[:, [0, 0, 1, 1, 2, 2]]
    assert torch.equal(combine(logits, weights, rule).argsort(-1), logits.argsort(-1))


def test_hungarian_matching():
    table = torch.tensor([[0.9, 0.8], [0.85, 0.1]])  # the largest first would give both classes the same centroid
    found = match(table, torch.eye(2))
    assert found.tolist() == [1, 0] and table[[0, 1], found].sum().item() == pytest.approx(1.65)


def test_the_score_of_a_task_is_that_of_its_best_centroid():
    assert task_scores(torch.tensor([[1.0, 5.0, 2.0, -3.0, -4.0]]), [2, 1, 2]).tolist() == [[5.0, 2.0, -3.0]]


# ---- matching --------------------------------------------------------------------------------------------------------


def test_classes_get_different_centroids_of_their_own_task():
    generator = torch.Generator().manual_seed(1)
    centroids = [torch.randn(3, 4, generator=generator), torch.randn(4, 4, generator=generator)]
    labels = torch.tensor([0, 4, 1, 4, 3, 0, 5, 3, 3])  # of classes 0 to 2 and 3 to 5; there is no image of class 2
    features = torch.randn(9, 4, generator=generator)
    found = positives(features, labels, [3, 3], centroids)
    means = torch.stack([features[labels == label].mean(0) for label in (0, 1, 3, 4, 5)])
    for classes, rows, own, first in (([0, 1], [0, 1], centroids[0], 0), ([3, 4, 5], [2, 3, 4], centroids[1], 3)):
        chosen = [found[labels == label].unique().tolist() for label in classes]
        assert all(len(one) == 1 and first <= one[0] < first + len(own) for one in chosen)
        table = means[rows] @ own.mT
        best = max(
            itertools.permutations(range(len(own)), len(rows)),
            key=lambda order, table=table: sum(table[i, j].item() for i, j in enumerate(order)),
        )
        assert [one[0] - first for one in chosen] == list(best)


# ---- what it keeps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_class", "sizes"), [(1.0, [2, 3]), (1.5, [3, 5]), (2.0, [4, 6])])
def test_there_are_as_many_centroids_as_classes_at_least(per_class, sizes):
    gate = made((2, 3), per_class=per_class)
    assert gate.sizes == sizes and [own.shape[1] for own in gate.centroids] == [4, 4]
    assert gate.weight.shape == (5, sum(sizes)) and gate.bias.shape == (5,)


def test_a_new_task_leaves_what_is_known():
    gate, state = made((2, 3)), numbers()
    gate.bias += 1
    before = {name: tensor.clone() for name, tensor in gate.tensors().items()}
    gate.grow(2, 4, (5, 2))
    assert numbers() == state
    assert all(torch.equal(gate.tensors()[f"centroids.{task}"], before[f"centroids.{task}"]) for task in (0, 1))
    assert torch.equal(gate.weight[:5, :5], before["weight"]) and gate.bias.tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert torch.equal(made((2, 3, 2)).centroids[2], gate.centroids[2])  # a function of its key
    assert not torch.equal(gate.centroids[0], gate.centroids[2])


def test_the_loss():
    gate, generator = made((2, 3), per_class=2.0), torch.Generator().manual_seed(2)
    features, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 4, 4])
    taught, counts = torch.randn(6, 5, generator=generator), torch.tensor([2, 2, 8, 8, 8])
    with torch.no_grad():
        found = gate.loss(features, labels, taught, counts, [2, 3])
    s = features @ torch.cat(gate.centroids).T
    shares = torch.tensor([4 / 4, 24 / 6])  # images for each centroid
    a = (shares / shares.sum() + 1e-5).log().repeat_interleave(torch.tensor([4, 6]))
    own = F.cross_entropy(s + a, positives(features, labels, [2, 3], gate.centroids)) / 2
    p, q = taught.softmax(-1), (s @ gate.weight.T + gate.bias + (counts / 28 + 1e-5).log()).softmax(-1)
    kept = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(found, own + kept)


def test_a_gate_of_another_kind():
    gate, other = made((2, 3)), Gate()
    gate.backbone = {"x": torch.zeros(1)}
    other.load(gate.tensors(), 2)
    assert other.tensors().keys() == gate.tensors().keys() and other.sizes == [2, 3]
    Gate().load({"backbone.x": torch.zeros(1)}, 0)
    tensors = gate.tensors()
    for wrong in (
        {**tensors, "other": torch.zeros(1)},
        {name: tensor for name, tensor in tensors.items() if name != "centroids.1"},
        {**tensors, "centroids.1": torch.zeros(3, 5)},
        {**tensors, "bias": torch.zeros(4)},
        {name: tensor for name, tensor in tensors.items() if not name.startswith("backbone.")},
    ):
        with pytest.raises(ValueError, match="a gate of 2 tasks has a backbone.*it is another's"):
            Gate().load(wrong, 2)


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_steps_go_over_all_images_in_each_epoch():
    optimizer, state = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5), numbers()
    found = [(rows.tolist(), optimizer.param_groups[0]["lr"]) for rows in steps(optimizer, 7, 3, 3, (1, 2))]
    assert numbers() == state and [len(rows) for rows, _ in found] == [3, 3, 1] * 3
    assert [rate for _, rate in found] == [0.5] * 6 + [0.05] * 3
    orders = [sum((rows for rows, _ in found[i : i + 3]), []) for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(7)) for order in orders) and orders[0] != orders[1] != orders[2]


def test_a_step_is_along_the_gradient():
    a, b, unused = (torch.full((1,), 2.0, requires_grad=True) for _ in range(3))
    optimizer = torch.optim.SGD([a, b, unused], lr=0.1)
    descend(optimizer, (a * a + 3 * b).sum(), "this")
    assert [a.item(), b.item(), unused.item()] == pytest.approx([1.6, 1.7, 2.0])
    with pytest.raises(FloatingPointError, match="the loss of this became nan: lower its learning rate"):
        descend(optimizer, (a * float("nan")).sum(), "this")


def test_tuned_heads_classify_side_by_side():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(5).repeat(8)
    patterns = [torch.randn(5, 6, generator=generator) for _ in range(2)]  # what two experts make of five classes
    features = [own[labels] + 0.1 * torch.randn(40, 6, generator=generator) for own in patterns]
    state = numbers()
    heads = tune_heads(features, labels, [2, 3], True, 200, 0.1, (0,))
    assert numbers() == state and [[tuple(part.shape) for part in head] for head in heads] == [
        [(2, 6), (2,)], [(3, 6), (3,)]
    ]  # fmt: skip
    scores = torch.cat([F.linear(own, *head) for own, head in zip(features, heads, strict=True)], 1)
    assert torch.equal(scores.argmax(-1), labels)
    assert F.cross_entropy(scores / 5, labels) < 0.3  # from log 5 = 1.6
    assert [len(head) for head in tune_heads(features, labels, [2, 3], False, 1, 0.05, (0,))] == [1, 1]
    assert not any(part.requires_grad for head in heads for part in head)
