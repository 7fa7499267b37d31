"""Every formula against matrices worked out by hand, and against slow loops written straight from the equations."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pgp_hf import metrics

N = None

# Worked out by hand, in percent. Columns are tasks.
HAND = {
    # FOR: (max(90, 80) - 85 + 95 - 75) / 2; BWT: (85 - 90 + 75 - 95) / 2
    "plain": (
        [[90, 20, N], [80, 95, 30], [85, 75, 70]],
        {
            "average_accuracy": 230 / 3,
            "forgetting": 12.5,
            "forgetting_clipped": 12.5,
            "backward_transfer": -12.5,
            "learning_accuracy": 85.0,
            "per_task_average_accuracy": [90.0, 87.5, 230 / 3],
        },
    ),
    # both tasks end at their best: Eq. 36 is negative, the released code says 0
    "negative": (
        [[60, N, N], [50, 80, N], [70, 90, 75]],
        {
            "average_accuracy": 235 / 3,
            "forgetting": -10.0,
            "forgetting_clipped": 0.0,
            "backward_transfer": 10.0,
            "learning_accuracy": 215 / 3,
            "per_task_average_accuracy": [60.0, 65.0, 235 / 3],
        },
    ),
    # one task gains ten, the other loses twenty; the best of task 0 is in the middle row
    "mixed": (
        [[50, N, N], [60, 80, N], [70, 60, 90]],
        {
            "average_accuracy": 220 / 3,
            "forgetting": 5.0,
            "forgetting_clipped": 10.0,
            "backward_transfer": 0.0,
            "learning_accuracy": 220 / 3,
            "per_task_average_accuracy": [50.0, 70.0, 220 / 3],
        },
    ),
    # Eq. 36 as it is printed is -21.5 here, and the tables of the paper have its magnitude
    "of the paper's sign": (
        [[90, N, N], [70, 88, N], [60, 75, 85]],
        {
            "average_accuracy": 220 / 3,
            "forgetting": 21.5,
            "forgetting_clipped": 21.5,
            "backward_transfer": -21.5,
            "learning_accuracy": 263 / 3,
            "per_task_average_accuracy": [90.0, 79.0, 220 / 3],
        },
    ),
    "one task": (
        [[88.5]],
        {
            "average_accuracy": 88.5,
            "forgetting": 0.0,
            "forgetting_clipped": 0.0,
            "backward_transfer": 0.0,
            "learning_accuracy": 88.5,
            "per_task_average_accuracy": [88.5],
        },
    ),
}


@pytest.mark.parametrize("case", HAND)
def test_hand_computed(case):
    matrix, expected = HAND[case]
    summary = metrics.summarize(matrix)
    assert list(summary) == list(expected)
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value), name
        assert getattr(metrics, name)(matrix) == pytest.approx(value), name


def test_forward_transfer_by_hand():
    matrix, _ = HAND["plain"]
    assert metrics.forward_transfer(matrix, [N, 12, 14]) == pytest.approx((20 - 12 + 30 - 14) / 2)
    assert metrics.forward_transfer(matrix[:2], [10, 12, N]) == pytest.approx(8)
    assert metrics.forward_transfer([[90]], [50]) == 0.0


def random_matrix(seed: int, tasks: int) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(0, 100, (tasks, tasks))
    return np.where(np.tri(tasks, dtype=bool), values, np.nan)


@pytest.mark.parametrize("tasks", [2, 3, 7, 20])
def test_agrees_with_loops_over_the_equations(tasks):
    a = random_matrix(tasks, tasks)
    last = tasks - 1
    best = [max(a[j][i] for j in range(i, last)) for i in range(last)]
    assert metrics.average_accuracy(a) == pytest.approx(sum(a[last][j] for j in range(tasks)) / tasks)
    assert metrics.forgetting(a) == pytest.approx(sum(best[i] - a[last][i] for i in range(last)) / last)
    assert metrics.forgetting_clipped(a) == pytest.approx(
        sum(max(best[i] - a[last][i], 0) for i in range(last)) / last
    )
    assert metrics.backward_transfer(a) == pytest.approx(sum(a[last][i] - a[i][i] for i in range(last)) / last)


@pytest.mark.parametrize("seed", range(5))
def test_relations_that_always_hold(seed):
    a = random_matrix(seed, 6)
    full = metrics.summarize(a)
    assert full["forgetting_clipped"] >= max(full["forgetting"], 0)
    assert full["forgetting"] >= -full["backward_transfer"]
    assert full["per_task_average_accuracy"][-1] == full["average_accuracy"]
    # accuracies on tasks not yet trained change nothing
    assert metrics.summarize(np.where(np.isnan(a), 3.0, a)) == full
    # a fraction gives a fraction
    assert metrics.summarize(a / 100)["forgetting"] == pytest.approx(full["forgetting"] / 100)
    # None and NaN are the same, lists and arrays too
    assert metrics.summarize([[N if math.isnan(v) else v for v in row] for row in a]) == full


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_run_under_way_counts_its_finished_tasks_only(rows):
    a = random_matrix(0, 5)
    cut = a[:rows]
    padded = np.vstack([cut, np.full((5 - rows, 5), np.nan)])
    square = metrics.summarize(a[:rows, :rows])
    assert metrics.summarize(cut) == metrics.summarize(padded) == square
    assert square["per_task_average_accuracy"] == metrics.per_task_average_accuracy(a)[:rows]


def test_results_are_plain_python_numbers():
    for value in metrics.summarize(random_matrix(0, 3)).values():
        assert type(value) is float or all(type(v) is float for v in value)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "non-empty"),
        ([[]], "non-empty"),
        ([1.0, 2.0], "non-empty list of non-empty rows"),
        (None, "non-empty"),
        ([[90], [80, 95]], r"ragged.*\[1, 2\]"),
        ([[90, N], [80, 95], [70, 60]], "3 rows but only 2 columns"),
        ([[N, N], [N, N]], "no value at all"),
        ([[90, N], [N, 95]], r"no value at \[1\]\[0\]"),
        ([[N, 20], [80, 95]], r"no value at \[0\]\[0\]"),
        ([[90, N, N], [N, N, N], [70, 80, 90]], r"\[1\]\[0\], \[1\]\[1\]"),
        ([[90, N], [-1, 95]], r"\[1\]\[0\] is -1"),
        ([[101]], r"\[0\]\[0\] is 101"),
        ([[math.inf]], "inf"),
    ],
)
def test_bad_matrices_are_named(matrix, message):
    for name in ("average_accuracy", "forgetting", "per_task_average_accuracy", "summarize"):
        if name == "summarize" and message.startswith((r"no value at \[", r"\[1\]\[0\], ")):
            continue  # the summary alone has nothing against entries that are missing
        with pytest.raises(ValueError, match=message):
            getattr(metrics, name)(matrix)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_a_summary_lacks_what_needs_a_missing_entry_and_nothing_else(tasks):
    full, t = random_matrix(tasks, tasks), tasks - 1
    expected = metrics.summarize(full)
    for i, j in zip(*np.tril_indices(tasks), strict=True):
        matrix = full.copy()
        matrix[i, j] = np.nan
        lacking = {
            "average_accuracy": i == t,
            "forgetting": j < t,
            "forgetting_clipped": j < t,
            "backward_transfer": j < t and i in (j, t),
            "learning_accuracy": i == j,
        }
        averages = [None if row == i else value for row, value in enumerate(expected["per_task_average_accuracy"])]
        known = {name: None if lacks else expected[name] for name, lacks in lacking.items()}
        assert metrics.summarize(matrix, tasks) == {**known, "per_task_average_accuracy": averages}
        with pytest.raises(ValueError, match=rf"no value at \[{i}\]\[{j}\]|no value at all"):
            metrics.average_accuracy(matrix)


def test_a_summary_of_trained_tasks_of_which_none_was_measured():
    names = ("average_accuracy", "learning_accuracy")
    found = metrics.summarize([[N, N], [N, N]], 2)
    assert all(found[name] is None for name in names) and found["per_task_average_accuracy"] == [N, N]
    found = metrics.summarize([[90, N], [N, N]], 2)  # the last task has no test images, and the first one's are gone
    assert found["average_accuracy"] is None and found["per_task_average_accuracy"] == [90, N]
    assert metrics.summarize([[90, N], [80, 70]], 1) == metrics.summarize([[90]])
    for tasks in (0, 3):
        with pytest.raises(ValueError, match=f"tasks={tasks}: expected 1 to 2"):
            metrics.summarize([[90, N], [80, 70]], tasks)


def test_tasks_that_were_learned_as_one_have_no_forgetting():
    undefined = dict.fromkeys(["forgetting", "forgetting_clipped", "backward_transfer", "learning_accuracy"])
    found = metrics.summarize([[N, N, N], [N, N, N], [70, 60, 95]])
    assert found == {"average_accuracy": 75, **undefined, "per_task_average_accuracy": [N, N, 75]}
    found = metrics.summarize([[N, N, N], [80, 90, N], [70, 60, 95]])  # two as one, then another
    assert found == {"average_accuracy": 75, **undefined, "per_task_average_accuracy": [N, 85, 75]}
    for name in HAND["plain"][1]:  # one metric alone is a number, or an error
        with pytest.raises(ValueError, match=r"no value at \[0\]\[0\], \[1\]\[0\]"):
            getattr(metrics, name)([[N, N, N], [N, N, N], [70, 60, 95]])


def test_entries_that_are_no_numbers():
    with pytest.raises(TypeError, match="must hold numbers"):
        metrics.average_accuracy([["good"]])


def test_forward_transfer_names_what_is_missing():
    matrix, _ = HAND["plain"]
    without = [row[:] for row in matrix]
    without[1][2] = None
    with pytest.raises(ValueError, match=r"accuracy_matrix\[1\]\[2\]"):
        metrics.forward_transfer(without, [10, 12, 14])
    with pytest.raises(ValueError, match=r"baseline\[2\]"):
        metrics.forward_transfer(matrix, [10, 12, N])
    with pytest.raises(ValueError, match="shape"):
        metrics.forward_transfer(matrix, [10, 12])
    with pytest.raises(ValueError, match=r"baseline\[1\] is 120"):
        metrics.forward_transfer(matrix, [10, 120, 14])


def test_no_deep_learning_library_is_imported():
    """On their own, so that what the rest of the package imports does not matter."""
    code = """
import importlib.util, sys
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "metrics", folder + "/__init__.py", submodule_search_locations=[folder]
)
sys.modules["metrics"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.forgetting([[90, None], [80, 95]]) == 10
print(sorted({"torch", "transformers", "peft", "evaluate", "datasets"} & set(sys.modules)))
"""
    folder = str(Path(metrics.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
