"""Metrics without the matrix: those of a stream that keeps its last row alone are those of the whole matrix."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pgp_hf import metrics
from pgp_hf.metrics._running import Accuracies


def matrix(tasks: int, gone: tuple[int, ...] = (), first: int = 0, seed: int = 0) -> list[list[float | None]]:
    """Accuracies of `tasks` tasks; those in `gone` have no test images, and those before `first` no rows."""
    counts = np.random.default_rng(seed).integers(1, 400, tasks)
    rows = np.random.default_rng(seed + 1)
    made = [[float(100 * rows.integers(0, n + 1) / n) for n in counts[: i + 1]] for i in range(tasks)]
    return [
        [None if j in gone or i < first else value for j, value in enumerate(row)] + [None] * (tasks - 1 - i)
        for i, row in enumerate(made)
    ]


@pytest.mark.parametrize("gone", [(), (0,), (2, 4)], ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 7, 300])
def test_they_are_those_of_the_matrix_to_the_bit(tasks, gone):
    full, found = matrix(tasks, gone), Accuracies()
    for i in range(tasks):
        found.take(i, [0.5] * (i + 1))  # an evaluation that is repeated replaces its row
        found.take(i, full[i][: i + 1])
        if i in (0, 1, 5, tasks - 1):
            assert found.summary == metrics.summarize(full, i + 1)
            assert found.forgetting[-1] == metrics.summarize(full, i + 1)["forgetting"]
    assert found == Accuracies.of(full)


def test_tasks_that_are_learned_as_one_have_one_row():
    full, found = matrix(5, first=4), Accuracies()
    found.take(4, full[4])
    assert found.summary == metrics.summarize(full, 5)
    assert found.now == full[4] and found.averages[:4] == found.learned[:4] == [None] * 4


@pytest.mark.parametrize("gone", [(), (1,)], ids=str)
def test_a_run_goes_on_from_a_file_of_this_version_or_an_earlier_one(gone):
    full = matrix(6, gone)
    before = Accuracies.of(full[:4])
    content = json.loads(json.dumps(before.to_dict()))
    for saved in (content, {"accuracy_matrix": full[:4]}):
        again = Accuracies.load(saved, range(4))
        assert again == before
        for i in (4, 5):
            again.take(i, full[i][: i + 1])
        assert again.summary == metrics.summarize(full, 6)


@pytest.mark.parametrize("name", ["now", "when_learned", "best_before"])
@pytest.mark.parametrize("wrong", [[1.0], ["a"] * 4, [True] * 4, None], ids=str)
def test_lists_that_do_not_fit_are_refused(name, wrong):
    content = Accuracies.of(matrix(4)).to_dict()
    content["by_task"][name] = wrong
    with pytest.raises(TypeError, match="by_task"):
        Accuracies.load(content, range(4))


def test_what_is_kept_grows_linearly():
    sizes = [len(json.dumps(Accuracies.of(matrix(tasks)).to_dict())) for tasks in (50, 100, 200)]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])
