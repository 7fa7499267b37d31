"""What a run measures where test images of some tasks are absent, and what its file says of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from pgp_hf.data.stream import TaskStream
from pgp_hf.runs.checks import check_results_file, finished_tasks, first_task
from pgp_hf.runs.revision import Revision
from pgp_hf.training.display import _figures
from pgp_hf.training.evaluation import Recorded, References, measure, summary_logs
from pgp_hf.training.results import StreamResults

N = None
TASKS = [(0, 1), (2,), (3, 4, 5), (6,)]  # of unequal size


def new(head="statistics", first=0, **others) -> StreamResults:
    settings = {"seed": 0, "eval_mask": "seen", "batchwise_prompt": False, "first": first, **others}
    return StreamResults("l2p", "l2p", "pgp", head, "class_incremental", len(TASKS), **settings)


def learn(results: StreamResults, here, selects=True, start=0) -> References:
    """Measure a run; `here(t, j)` says whether the test images of task j are there after task t."""
    references = References()
    for t in range(max(start, results.first), len(TASKS)):

        def record(tasks, t=t):
            for j in tasks:
                assert here(t, j), f"task {j} has no test images"
                rng = np.random.default_rng([t, j])  # the same whichever other tasks are measured
                labels = rng.choice(TASKS[j], 6)
                selected = rng.integers(0, 5, (6, 2)) if selects else None
                linear = rng.normal(size=(6, 7)) if results.head == "statistics" else None
                yield Recorded(labels, rng.normal(size=(6, 7)), rng.normal(size=(6, 4)), linear, selected)

        tasks = [SimpleNamespace(classes=classes) for classes in TASKS]
        stream = SimpleNamespace(tasks=tasks, has_test=lambda j, t=t: here(t, j))
        measure(results, references, t, record, 5, stream)
        results.rank.append(t)
        summary_logs(results)
    return references


def check(results: StreamResults, **settings) -> dict:
    """The file, which is valid JSON and may be read again by a run with the same settings."""
    content = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    manifest = {"scenario": results.scenario, "num_tasks": results.num_tasks}
    assert check_results_file(content, manifest, "results.json") == results.first + len(results.matrix)
    again = new(results.head, results.first, **settings)
    again.load(content)
    kept = "continues matrix within linear linear_within drift changed rank usage drift_lacks"
    for name in kept.split():
        assert getattr(again, name) == getattr(results, name), name
    return content


PATTERNS = {
    "all": lambda t, j: True,
    "none": lambda t, j: False,
    "a run that goes on without the old images": lambda t, j: t < 2 or j >= 2,
    "no images of the first task": lambda t, j: j > 0,
    "no images of the last task": lambda t, j: j < 3,
    "own images alone": lambda t, j: t == j,
    "old images alone": lambda t, j: t != j,
}


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("head", ["linear", "statistics"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_file_has_null_where_images_were_absent_and_the_same_numbers_elsewhere(pattern, head, first):
    here, results, full = PATTERNS[pattern], new(head, first), new(head, first)
    learn(results, here)
    learn(full, PATTERNS["all"])
    content, complete = check(results), check(full)
    assert (finished_tasks(content), first_task(content)) == (len(TASKS), first)
    for i, (row, of) in enumerate(zip(content["accuracy_matrix"], complete["accuracy_matrix"], strict=True)):
        seen = [value if j <= i and here(i, j) else N for j, value in enumerate(of)]
        assert row == (seen if i >= first else [N] * len(TASKS))
    pairs = [(content, complete), (content["task_incremental"], complete["task_incremental"])]
    if head == "statistics":
        pairs += [(content["heads"][name], complete["heads"][name]) for name in ("linear", "statistics")]
    for found, whole in pairs:
        if "by_task" in whole:
            now = [value if here(3, j) else N for j, value in enumerate(whole["by_task"]["now"])]
            learned = [
                value if j >= first and here(j, j) else N for j, value in enumerate(whole["by_task"]["when_learned"])
            ]
            assert (found["by_task"]["now"], found["by_task"]["when_learned"]) == (now, learned)
        averages = [all(here(i, j) for j in range(i + 1)) and i >= first for i in range(len(TASKS))]
        assert [value is not None for value in found["per_task_average_accuracy"]] == averages
        assert (found["average_accuracy"] is None) is not averages[-1]
    usage = content.get("prompt_usage") or [N] * len(TASKS)
    assert [row is not None for row in usage] == [here(3, j) for j in range(4)]


@pytest.mark.parametrize("selects", [True, False])
def test_drift_is_that_of_the_tasks_which_were_measured_then_and_now(selects):
    full, gone, own = new(), new(), new()
    learn(full, PATTERNS["all"], selects)
    learn(gone, PATTERNS["a run that goes on without the old images"], selects)
    learn(own, PATTERNS["own images alone"], selects)
    assert gone.drift[:2] == full.drift[:2] and gone.drift[2] is None and gone.drift[3] is not None
    assert own.drift == [0.0, N, N, N] and not gone.drift_lacks
    for results in (full, gone, own):  # a value per finished task, or none at all
        assert len(results.changed) == (4 if selects else 0)
        assert [value is None for value in results.changed] == [
            value is None for value in results.drift[: 4 * selects]
        ]
    nothing = new()
    learn(nothing, PATTERNS["none"], selects)
    assert (nothing.drift, nothing.changed, nothing.usage) == ([0.0, N, N, N], [], None)


def test_selections_are_known_from_the_first_task_with_images_on():
    results = new()
    learn(results, lambda t, j: t > 1 and j > 0)
    assert results.changed[:3] == [0.0, N, N] and len(results.changed) == 4
    # images of task 2 came after it had ended: what it looked like then is not known
    assert results.drift_lacks == [1] and results.drift[2] is None and results.drift[3] is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logs_and_lines_hold_numbers_alone(pattern):
    results = new()
    learn(results, PATTERNS[pattern])
    logs, content = summary_logs(results), results.to_dict()
    assert all(type(value) in (int, float) for value in logs.values())
    assert {f"eval_task_{j + 1}_accuracy" in logs for j in range(4) if PATTERNS[pattern](3, j)} <= {True}
    assert ("eval_average_accuracy" in logs) is (content["average_accuracy"] is not None)
    line = ", ".join(_figures(content, 3))
    assert "None" not in line and ("drift" in line) is (results.drift[-1] is not None)
    starts = {"all": "average accuracy ", "none": "accuracy not measured", "own images alone": "accuracy on task 4 "}
    assert line.startswith(starts.get(pattern, "accuracy "))


def test_a_stream_that_goes_on_keeps_its_rows_and_takes_other_settings():
    results = new()
    results.num_tasks = 2
    for t in range(2):
        results.matrix.append([50.0] * (t + 1))
        results.within.take(t, [60.0] * (t + 1))
        results.linear.take(t, [40.0] * (t + 1))
        results.linear_within.take(t, [45.0] * (t + 1))
        results.drift.append(0.1 * t)
        results.rank.append(t)
    earlier = json.loads(json.dumps(results.to_dict()))
    settings = {"seed": 5, "eval_mask": "none", "batchwise_prompt": True, "compensate_drift": True}
    assert earlier["num_tasks"] == earlier["finished_tasks"] == 2 and not {"first_task", "continues", "training"} & {
        *earlier
    }
    going_on = new(
        continues={"repo": N, "revision": "task-2", "commit": N, "tasks": 2}, training={"learning_rate": 0.1}
    )
    for name, value in settings.items():
        setattr(going_on, name, value)
        with pytest.raises(ValueError, match="the earlier run has"):
            going_on.load(earlier)
    origin = going_on.continues
    going_on.load(earlier, going_on=True)
    assert going_on.continues is None and not going_on.training  # those of the earlier run
    going_on.continues, going_on.training = origin, {"learning_rate": 0.1}
    assert {name: getattr(going_on, name) for name in settings} == settings and going_on.num_tasks == len(TASKS)
    learn(going_on, lambda t, j: j >= 2, start=2)
    content = check(going_on, **settings)
    assert [row[:2] for row in content["accuracy_matrix"]] == [[50.0, N], [50.0, 50.0], [N, N], [N, N]]
    assert content["continues"] == origin and content["training"] == {"learning_rate": 0.1}
    for name, value in (
        ("method", "ewc"),
        ("head", "linear"),
        ("projection", "none"),
        ("scenario", "online"),
        ("model", "x"),
    ):
        other = new()
        setattr(other, name, value)
        with pytest.raises(ValueError, match=f"the earlier run has {name}="):
            other.load(earlier, going_on=True)


@pytest.mark.parametrize("head", tiny.some_of(["linear", "statistics"], "statistics"))
def test_a_run_without_test_images_of_its_first_task(tmp_path, monkeypatch, without_figures, head):
    runs = {}
    for name, least in (("whole", 0), ("gaps", 1)):
        monkeypatch.setattr(TaskStream, "has_test", lambda stream, t, least=least: t >= least)
        with tiny.seeded(3):
            run = tiny.trainer(tmp_path / name, model=tiny.model(head=head))
        run.train()
        runs[name] = run.results
        assert all(value is not None for value in run.state.log_history[-1].values())
    whole, gaps = runs["whole"], runs["gaps"]
    assert gaps.matrix == [[None, *row[1:]] for row in whole.matrix]
    assert gaps.rank == whole.rank and gaps.drift[:2] == [0.0, None]
    for t in range(3):
        folder = tmp_path / "gaps" / f"task-{t + 1}"
        revision = Revision.read(folder, f"task-{t + 1}")
        assert (revision.tasks, revision.learned, len(revision.seen_classes)) == (t + 1, t + 1, 2 * (t + 1))
        assert "not measured" in (folder / "README.md").read_text()
    drawn = [path.name for path in without_figures(revision.results, tmp_path / "figures")]
    assert drawn == ["accuracy_matrix.png", "forgetting_by_task.png", "stability.png", "prompt_usage.png"]
