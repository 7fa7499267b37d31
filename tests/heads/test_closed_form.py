"""Classifiers in closed form on frozen features, against scikit-learn and formulas written out."""

from __future__ import annotations

import pickle
from dataclasses import asdict

import numpy as np
import pytest
import tiny
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

from pgp_hf.data.images import ImageCollator
from pgp_hf.heads.closed_form import (
    CLASSIFIERS,
    RIDGES,
    SHRINKAGE,
    NearestClassMean,
    RandomProjectionRidge,
    ShrinkageLDA,
    extract_features,
    frozen_matrices,
    stream_features,
)


def features_of(stream, spread, seed=0):
    """Class centres in ten dimensions with noise that is large along one of them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(stream.num_classes, 10))
    scale = np.ones(10)
    scale[0] = spread

    def draw(images):
        return centres[images.labels] + 0.5 * rng.normal(size=(len(images), 10)) * scale

    return [draw(stream.train(t)) for t in range(3)], [draw(stream.test(t)) for t in range(3)]


def test_features_are_the_frozen_backbones():
    """Also in training mode and with an adapter on top."""
    model = tiny.model().train()
    images, collator = tiny.stream().test(1), ImageCollator(tiny.processor())
    features = extract_features(model.base_model.frozen_features, images, collator, batch_size=3)
    batch = collator([images[i] for i in range(len(images))])
    with torch.no_grad():
        expected = tiny.backbone().eval().vit(batch["pixel_values"]).last_hidden_state[:, 0]
    assert np.allclose(features, expected.numpy(), atol=1e-5)


def test_features_of_a_stream_are_those_of_its_tasks():
    stream, collator = tiny.stream(), ImageCollator(tiny.processor())
    extract = tiny.model().base_model.frozen_features
    found = stream_features(extract, stream.test, stream.num_tasks, collator, batch_size=5)
    for t, features in enumerate(found):
        assert np.array_equal(features, extract_features(extract, stream.test(t), collator, batch_size=5))


def test_matrices_are_those_of_a_plain_computation():
    stream = tiny.stream()
    train, test = features_of(stream, spread=15.0)
    matrices = frozen_matrices(stream, train, test)
    for i in range(3):
        x = np.concatenate(train[: i + 1])
        y = np.concatenate([stream.train(t).labels for t in range(i + 1)])
        classes = np.unique(y)
        means = np.stack([x[y == c].mean(0) for c in classes])
        centred = x - means[np.searchsorted(classes, y)]
        covariance = centred.T @ centred / len(x)
        mixed = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / 10 * np.eye(10)
        for j in range(3):
            if j > i:
                assert matrices["nearest class mean"][i][j] is None
                continue
            z, labels = test[j], stream.test(j).labels
            near = classes[((z[:, None] - means) ** 2).sum(-1).argmin(1)]
            scores = z @ np.linalg.solve(mixed, means.T) - 0.5 * (means * np.linalg.solve(mixed, means.T).T).sum(1)
            assert matrices["nearest class mean"][i][j] == pytest.approx(100 * np.mean(near == labels))
            assert matrices["shrinkage LDA"][i][j] == pytest.approx(100 * np.mean(classes[scores.argmax(1)] == labels))
    assert np.mean(matrices["shrinkage LDA"][2]) > np.mean(matrices["nearest class mean"][2])


def test_task_incremental_is_among_the_tasks_own_classes():
    stream = tiny.stream(scenario="task_incremental", num_tasks=3)
    train, test = features_of(stream, spread=1.0)
    rng = np.random.default_rng(1)
    train, test = ([x + 2 * rng.normal(size=x.shape) for x in part] for part in (train, test))  # classes overlap
    few = {**CLASSIFIERS, "random-projection ridge": lambda: RandomProjectionRidge(width=40)}
    for name, matrix in frozen_matrices(stream, train, test, few).items():
        for j in range(3):
            model = few[name]()
            model.update(train[j], stream.train(j).labels)
            own = 100 * np.mean(model.predict(test[j]) == stream.test(j).labels)
            assert [matrix[i][j] for i in range(3)] == [None] * j + [own] * (3 - j), name


def test_a_task_of_one_class():
    stream = tiny.stream(num_tasks=6)
    train, test = ([np.random.default_rng(t).normal(size=(n, 4)) for t in range(6)] for n in (8, 4))
    for matrix in frozen_matrices(stream, train, test).values():
        assert matrix[0][0] == 100


# ---- from class statistics -------------------------------------------------------------------------------------------

LABELS = (7, 2, 40, 11, 5, 3)  # in the order of their arrival


def overlapping(count=400, dim=6, seed=0):
    """Features of six classes of unequal size that overlap, far from zero, in correlated dimensions; labels."""
    rng = np.random.default_rng(seed)
    y = rng.choice(LABELS, count, p=[0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
    centres = rng.normal(size=(50, dim))
    return 100 + centres[y] + rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)), y


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (NearestClassMean, NearestCentroid),
        *(
            (lambda a=a: ShrinkageLDA(a), lambda a=a: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=a))
            for a in (0.0, 0.1, 0.7, 1.0)
        ),
    ],
)
def test_predictions_are_those_of_scikit_learn_on_everything_so_far(ours, theirs, kind):
    """Task by task, some of them with classes that have been seen before."""
    (x, y), (z, _) = overlapping(), overlapping(seed=1)
    x, z, model = x.astype(kind), z.astype(kind), ours()
    learned = np.zeros(len(x), dtype=bool)
    for task in ([7, 2], [40], [11, 5, 3]):
        for half in (0, 1):
            new = np.isin(y, task) & (np.arange(len(y)) % 2 == half)
            model.update(x[new], y[new])
            learned |= new
            expected = theirs().fit(x[learned].astype(np.float64), y[learned]).predict(z.astype(np.float64))
            assert np.array_equal(model.predict(z), expected)
    assert set(np.unique(expected)) == set(LABELS)


@pytest.mark.parametrize("make", [NearestClassMean, ShrinkageLDA])
def test_a_first_task_of_one_class(make):
    (x, y), model = overlapping(), make()
    model.update(x[y == 7], y[y == 7])
    assert model.predict(x).tolist() == [7] * len(x)
    model.update(x[y != 7], y[y != 7])
    assert len(set(model.predict(x).tolist())) > 2


@pytest.mark.parametrize("make", [NearestClassMean, ShrinkageLDA])
def test_no_features_are_kept(make):
    sizes = []
    for count in (100, 5000):
        model = make()
        model.update(*overlapping(count))
        model.update(*overlapping(count, seed=2))
        sizes.append(len(pickle.dumps(model)))
    assert sizes[0] == sizes[1] < 5000


def test_without_shrinkage_the_covariance_needs_an_inverse():
    x, y = overlapping(dim=20)
    model = ShrinkageLDA(shrinkage=0)
    model.update(x[:15], y[:15])
    with pytest.raises(ValueError, match=r"shrinkage=0 .* 15 features .*\(rank \d+ in 20 dimensions\).* above 0"):
        model.predict(x)
    model.update(x[15:], y[15:])
    assert np.array_equal(model.predict(x), LinearDiscriminantAnalysis(solver="lsqr").fit(x, y).predict(x))


def test_a_benchmark_records_their_settings():
    assert asdict(NearestClassMean()) == {} and asdict(ShrinkageLDA(0.3)) == {"shrinkage": 0.3}
    assert asdict(RandomProjectionRidge(width=3)) == {"width": 3, "seed": 0}


# ---- random-projection ridge -----------------------------------------------------------------------------------------


def learned(width, tasks=3, per_task=24, seed=0, dim=6):
    """A ridge that has learned tasks of two classes each, with everything it was given."""
    rng, model, given = np.random.default_rng(seed), RandomProjectionRidge(width=width, seed=seed), []
    centres = rng.normal(size=(2 * tasks, dim))
    for t in range(tasks):
        y = rng.permutation(np.repeat([2 * t + 1, 2 * t], per_task // 2))
        given.append((centres[y] + 0.8 * rng.normal(size=(per_task, dim)), y))
        model.update(*given[-1])
    return model, given


# fewer images than random features to the end; more from the second task on; more from the first on
@pytest.mark.parametrize("width", [100, 30, 12])
def test_weights_are_those_of_ridge_regression(width):
    """Against scikit-learn on the same random features, all tasks at once."""
    model, given = learned(width)
    x, y = (np.concatenate(part) for part in zip(*given, strict=True))
    h = model.features(x).numpy()
    assert h.shape == (72, width) and h.min() == 0 and 0.3 < (h > 0).mean() < 0.7
    ridge = Ridge(alpha=model.ridge, fit_intercept=False).fit(h, (y[:, None] == model.classes).astype(float))
    z = np.random.default_rng(1).normal(size=(200, x.shape[1]))
    scores = model.features(z).numpy() @ model._weight.numpy()
    assert np.allclose(scores, ridge.predict(model.features(z).numpy()), rtol=1e-6, atol=1e-8)
    assert np.array_equal(model.predict(z), model.classes[scores.argmax(1)])
    assert sorted(model.classes) == list(range(6)) and len(np.unique(model.predict(z))) > 3


def test_many_images_and_few_give_the_same_weights():
    """The images' Gram matrix and that of the features are two ways to one solution, ridge and split included."""
    few, _ = learned(width=80)
    many = RandomProjectionRidge(width=80, seed=0)
    many._images, many._gram = False, torch.zeros(80, 80, dtype=torch.float64)
    many._y = torch.zeros(80, 0, dtype=torch.float64)
    for x, y in learned(width=80)[1]:
        many.update(x, y)
    assert few._images and many.ridge == few.ridge
    assert torch.allclose(many._weight, few._weight, rtol=1e-6, atol=1e-9)


def test_the_ridge_is_the_best_on_the_held_out_fifth():
    """Of the first task: of all 17, on images that the weights have not seen."""
    for seed in range(4):
        model, ((x, y),) = learned(width=50, tasks=1, per_task=50, seed=seed)
        order = np.random.default_rng(seed).permutation(50)  # the model's first random numbers
        h, targets = model.features(x[order]).numpy(), (y[order][:, None] == np.unique(y)).astype(float)
        errors = []
        for ridge in RIDGES:
            fitted = Ridge(alpha=ridge, fit_intercept=False, solver="svd").fit(h[:40], targets[:40])
            errors.append(np.square(fitted.predict(h[40:]) - targets[40:]).sum())
        assert model.ridge == RIDGES[int(np.argmin(errors))]
        assert 1e-3 < model.ridge < 1e5  # neither end of the range


def test_a_later_ridge_is_validated_on_the_new_task_with_all_sums():
    """From the last ridge downhill: no neighbour is better on a fifth of the second task."""
    model, given = learned(width=30, tasks=2, per_task=50, seed=5)
    rng = np.random.default_rng(5)
    rng.permutation(50), rng.standard_normal((6, 30))
    order = rng.permutation(50)
    x = np.concatenate([given[0][0], given[1][0][order]])
    y = np.concatenate([given[0][1], given[1][1][order]])
    h, targets = model.features(x).numpy(), (y[:, None] == model.classes).astype(float)

    def error(ridge):
        fitted = Ridge(alpha=ridge, fit_intercept=False, solver="svd").fit(h[:90], targets[:90])
        return np.square(fitted.predict(h[90:]) - targets[90:]).sum()

    assert error(model.ridge) < min(error(10 * model.ridge), error(model.ridge / 10))


def test_equal_seeds_are_equal_and_others_are_not():
    z = np.random.default_rng(3).normal(size=(5, 6))
    one, same, other = (learned(width=20, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one.features(z), same.features(z)) and torch.equal(one._weight, same._weight)
    assert not torch.allclose(one.features(z), other.features(z))


def test_it_bends_where_a_linear_boundary_fails():
    """Two classes in opposite quadrants each: linear classifiers guess, random features tell them apart."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    found = {}
    for model in (ShrinkageLDA(), RandomProjectionRidge(width=200)):
        model.update(x[::2], y[::2])
        found[type(model)] = np.mean(model.predict(x[1::2]) == y[1::2])
    assert found[RandomProjectionRidge] > 0.9 > 0.7 > found[ShrinkageLDA]


def test_repeated_images_and_single_ones():
    """Singular Gram matrices: ridges too weak for float64 are passed over."""
    model = RandomProjectionRidge(width=40)
    model.update(np.ones((1, 3)), np.array([7]))
    assert model.predict(np.zeros((2, 3))).tolist() == [7, 7]
    model.update(np.repeat([[1e4, 0, 0], [0, 1e4, 0]], 20, axis=0), np.repeat([2, 5], 20))
    assert model.predict(np.array([[1e4, 0, 0], [0, 1e4, 0]])).tolist() == [2, 5]
    assert torch.isfinite(model._weight).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomProjectionRidge(width=0), "width=0"),
        (lambda: ShrinkageLDA(shrinkage=1.5), r"shrinkage=1.5 is outside \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
