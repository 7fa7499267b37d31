"""Class statistics: their sums, the classifier that follows from them, and the gathering of a task's."""

from __future__ import annotations

import copy

import processes
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from pgp_hf.heads.statistics import ClassStatistics, gather_task

C, D = 5, 7


def sample(n=120, seed=0, mean=0.0, classes=C):
    """Features (N, D), float64, of classes of unequal size with correlated dimensions; labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator) * torch.randint(0, 2, (n,), generator=generator)
    mixing = torch.randn(D, D, generator=generator, dtype=torch.float64)
    centres = torch.randn(classes, D, generator=generator, dtype=torch.float64)
    features = centres[labels] + torch.randn(n, D, generator=generator, dtype=torch.float64) @ mixing
    return features + mean, labels


def gathered(features, labels, batch=16, **kwargs):
    statistics = ClassStatistics(kwargs.pop("classes", C), D, **kwargs)
    for at in range(0, len(labels), batch):
        statistics.update(features[at : at + batch], labels[at : at + batch])
    return statistics


def same(a, b, **tolerance):
    return all(
        torch.allclose(getattr(a, n).double(), getattr(b, n).double(), **tolerance)
        for n in ("counts", "means", "scatter")
    )


@pytest.mark.parametrize("shrinkage", [0.1, 0.7, 1.0])
def test_equals_scikit_learn(shrinkage):
    features, labels = sample()
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features.numpy(), labels.numpy())
    logits = gathered(features, labels, shrinkage=shrinkage)(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(-1), torch.from_numpy(reference.predict(features.numpy())))
    expected = torch.from_numpy(reference.predict_log_proba(features.numpy())).float()
    assert torch.allclose(logits.log_softmax(-1), expected, atol=1e-5)


def test_equals_the_formula_written_out_and_unseen_classes_never_win():
    features, labels = sample()
    n, means, scatter = len(labels), torch.zeros(C, D, dtype=torch.float64), 0
    for c in range(C):
        own = features[labels == c]
        means[c] = own.mean(0)
        scatter = scatter + (own - means[c]).T @ (own - means[c])
    sigma = 0.9 * scatter / n + 0.1 * torch.trace(scatter / n) / D * torch.eye(D)
    inverse = torch.linalg.inv(sigma)
    bias = -0.5 * torch.einsum("cd,de,ce->c", means, inverse, means) + torch.log(torch.bincount(labels) / n)
    expected = (features @ inverse @ means.T + bias).log_softmax(-1)
    statistics = gathered(features, labels, classes=C + 2)
    logits = statistics(features)
    assert torch.allclose(logits[:, :C].log_softmax(-1), expected.float(), atol=1e-5)
    assert torch.isneginf(logits[:, C:]).all()
    assert statistics.seen.tolist() == [True] * C + [False] * 2


def test_a_mean_far_from_zero_loses_no_digits():
    features, labels = sample()
    near, far = gathered(features, labels), gathered(features + 1e4, labels)
    assert torch.allclose(near.scatter, far.scatter, rtol=1e-9)
    assert torch.allclose(near(features), far(features + 1e4), atol=1e-5)


def test_batches_and_order_change_nothing():
    features, labels = sample()
    whole, order = gathered(features, labels, batch=1000), torch.randperm(len(labels))
    for other in (gathered(features, labels, batch=1), gathered(features[order], labels[order], batch=13)):
        assert same(whole, other, rtol=1e-10)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_processes_together_are_one(mean):
    features, labels = sample(mean=mean)
    one, order = gathered(features, labels), labels.argsort()  # so that a process lacks classes

    def work(rank, reduce, gather, broadcast):
        own = order[rank * 40 : (rank + 1) * 40]
        return gathered(features[own], labels[own]).reduce(reduce)

    many = processes.run(3, work)
    assert all(same(one, each, rtol=1e-9) for each in many)
    assert torch.allclose(one(features), many[0](features), atol=1e-5)


def test_a_finished_class_stays_to_the_bit():
    features, labels = sample()
    old, new = labels < 3, labels >= 3
    statistics = gathered(features[old], labels[old])
    before = statistics.means.clone()
    statistics.merge(gathered(features[new], labels[new]))
    assert torch.equal(statistics.means[:3], before[:3])
    assert same(statistics, gathered(features, labels), rtol=1e-10)


def test_one_image_a_class_is_the_nearest_mean():
    features = torch.eye(D)[:3] * 4
    statistics = ClassStatistics(C, D).update(features, torch.arange(3))
    points = torch.randn(50, D)
    assert torch.equal(statistics(points).argmax(-1), torch.cdist(points, features).argmin(-1))


def test_the_solution_follows_the_buffers():
    features, labels = sample()
    statistics = gathered(features, labels)
    first = statistics(features)
    solved = statistics.solve()
    assert all(a is b for a, b in zip(solved, statistics.solve(), strict=True))  # not computed again
    twin = copy.deepcopy(statistics)
    for changed in (statistics, twin):
        changed.update(features[:9] + 1, labels[:9].flip(0))
        assert torch.equal(changed(features), gathered_again(changed)(features))
        assert not torch.equal(changed(features), first)
    other = gathered(*sample(seed=1))
    for assign in (False, True):
        statistics.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(statistics(features), other(features))
        other.means += 1e-3
    with torch.inference_mode():
        lent = gathered(features, labels)
        assert torch.equal(lent(features), first)
        lent.means.mul_(0)
        assert not torch.equal(lent(features), first)


def gathered_again(statistics):
    """The same buffers in an object that has solved nothing."""
    fresh = statistics.fresh()
    fresh.load_state_dict(statistics.state_dict())
    return fresh


def test_precision_is_kept():
    features, labels = sample(mean=1e4)
    statistics = gathered(features, labels)
    expected = statistics(features)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()):
        assert torch.equal(cast(statistics)(features), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(statistics(features), expected)
    assert statistics.to("meta").means.device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s(torch.zeros(1, D)), "knows no class yet"),
        (lambda s: s.update(torch.zeros(2, D + 1), torch.zeros(2)), r"shape \(2, 8\).*expected \(N, 7\) and \(N,\)"),
        (lambda s: s.update(torch.zeros(2, D), torch.zeros(3)), r"labels of shape \(3,\)"),
        (lambda s: s.update(torch.zeros(2, D), torch.tensor([0, 5])), r"0..5: expected 0..4"),
        (lambda s: s.update(torch.zeros(2, D), torch.tensor([-1, 2])), r"-1..2: expected 0..4"),
        (lambda s: s.update(torch.full((2, D), torch.nan), torch.zeros(2)), r"not finite \(14 of 14\)"),
        (lambda s: ClassStatistics(-1, 3), "num_classes=-1, dim=3: they must be at least 0 and 1"),
        (lambda s: ClassStatistics(2, 0), "dim=0"),
        (lambda s: ClassStatistics(3, 3, shrinkage=-0.1), r"shrinkage=-0.1 is outside \[0, 1\]"),
        (lambda s: ClassStatistics(3, 3, shrinkage=1.1), r"shrinkage=1.1 is outside \[0, 1\]"),
    ],
)
def test_refusals(call, message):
    statistics = ClassStatistics(C, D)
    with pytest.raises(ValueError, match=message):
        call(statistics)
    assert int(statistics.counts.sum()) == 0 and not statistics.means.any()


def test_a_scatter_that_is_none_is_refused():
    statistics = gathered(*sample())
    statistics.scatter -= 1000 * torch.eye(D)
    with pytest.raises(ValueError, match="damaged"):
        statistics(torch.zeros(1, D))


def test_no_features_leave_statistics_alone():
    features, labels = sample()
    statistics = gathered(features, labels)
    before = copy.deepcopy(statistics)
    statistics.update(features[:0], labels[:0])
    assert same(before, statistics, atol=0, rtol=0)


# ---- gathering a task ------------------------------------------------------------------------------------------------


def batches(features, labels, size=16):
    return zip(features.split(size), labels.split(size), strict=True)


def test_a_task_is_gathered_apart_from_the_earlier_ones():
    features, labels = sample()
    earlier = gathered(*sample(seed=1))
    kept = copy.deepcopy(earlier)
    task = gather_task(earlier, batches(features, labels))
    assert same(earlier, kept, rtol=0, atol=0) and same(task, gathered(features, labels), rtol=0, atol=0)
    assert task.shrinkage == earlier.shrinkage and not task.scatter.requires_grad


def test_an_earlier_mean_follows_the_drift_before_the_task_is_merged():
    earlier, (features, labels) = gathered(*sample(seed=1)), sample()
    expected = copy.deepcopy(earlier).compensate_drift(features - 2, features)
    task = gather_task(earlier, batches(features, labels), before=features - 2)
    assert same(earlier, expected, rtol=0, atol=0)
    assert same(task, gathered(features, labels), rtol=0, atol=0)


def test_features_rendered_as_before_decide_the_drift_and_come_after_the_batches():
    earlier, (features, labels) = gathered(*sample(seed=1)), sample()
    expected = copy.deepcopy(earlier).compensate_drift(features, features + 5)
    calls = []

    def given():
        for batch in batches(features, labels):
            calls.append("batch")
            yield batch

    def as_before():
        calls.append("as before")
        return features + 5

    gather_task(earlier, given(), before=features, as_before=as_before)
    assert same(earlier, expected, rtol=0, atol=0)
    assert calls.count("as before") == 1 and calls[-1] == "as before"
    gather_task(earlier, given(), as_before=as_before)  # without compensation nobody asks
    assert calls.count("as before") == 1


def test_processes_gather_one_task_together():
    features, labels = sample()
    old = sample(seed=1)
    whole = gathered(*old)
    expected = gather_task(whole, batches(features, labels), before=features * 0.5)

    def work(rank, reduce, gather, broadcast):
        earlier, own = gathered(*old), slice(rank, None, 2)
        task = gather_task(earlier, batches(features[own], labels[own]), reduce, before=features[own] * 0.5)
        return earlier, task

    for earlier, task in processes.run(2, work):
        assert same(earlier, whole, rtol=1e-9) and same(task, expected, rtol=1e-9)


# ---- classes that come later -----------------------------------------------------------------------------------------


def test_classes_that_come_later_are_classes_known_before():
    generator = torch.Generator().manual_seed(4)
    batches = [(torch.randn(12, D, generator=generator), torch.arange(12) % count) for count in (2, 3, 5)]
    known = ClassStatistics(5, D)
    grown = ClassStatistics(0, D)
    for (features, labels), count in zip(batches, (2, 1, 2), strict=True):
        assert grown.add_classes(count) is grown
        for statistics in (known, grown):
            statistics.merge(statistics.fresh().update(features, labels))
    for name, value in known.state_dict().items():
        assert torch.equal(grown.state_dict()[name], value)
    assert torch.equal(grown(batches[0][0]), known(batches[0][0]))


def test_classes_that_come_later_leave_the_scores_before():
    features = torch.randn(30, D, generator=torch.Generator().manual_seed(4))
    statistics = ClassStatistics(3, D).update(features, torch.arange(30) % 3)
    before, scatter = statistics(features), statistics.scatter
    assert torch.equal(statistics(features), before)  # the solution is kept, and made anew below
    statistics.add_classes(4)
    after = statistics(features)
    assert torch.equal(after[:, :3].argmax(-1), before.argmax(-1)) and torch.isneginf(after[:, 3:]).all()
    assert (after[:, :3] - before).abs().max() <= 1e-6 * before.abs().max() and statistics.scatter is scatter
    assert statistics.fresh().means.shape == (7, D) and statistics.counts.dtype == torch.int64


def test_without_any_class_there_is_nothing_to_say():
    empty = ClassStatistics(0, D)
    with pytest.raises(ValueError, match="knows no class yet"):
        empty(torch.zeros(2, D))
    with pytest.raises(ValueError, match="labels in 0..0: expected 0..-1"):
        empty.update(torch.zeros(1, D), torch.zeros(1, dtype=torch.int64))
