"""The rows without prompts."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from pgp_hf.baselines.frozen import SHRINKAGE, extract_features, frozen_matrices
from pgp_hf.images import ImageCollator


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
    matrix = frozen_matrices(stream, train, test)["nearest class mean"]
    assert matrix[2][0] == matrix[1][0] == matrix[0][0]


def test_a_task_of_one_class():
    stream = tiny.stream(num_tasks=6)
    train, test = ([np.random.default_rng(t).normal(size=(n, 4)) for t in range(6)] for n in (8, 4))
    for matrix in frozen_matrices(stream, train, test).values():
        assert matrix[0][0] == 100
