"""Growth: at a thousand tasks each file stays below its reader's limit, and all but the one matrix grows linearly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pgp_hf.methods import METHODS
from pgp_hf.runs import reading
from pgp_hf.runs.atomic import write_json
from pgp_hf.runs.checks import check_results_file
from pgp_hf.training.results import StreamResults

sys.path.append(str(Path(__file__).parents[1] / "contract"))

from pairs import PLAIN, TUNERS, make_method

pytestmark = [
    pytest.mark.usefixtures("without_figures"),
    pytest.mark.filterwarnings("ignore:EWC has nothing to hold"),
]

TASKS = 1000


def new(tasks: int, head: str = "statistics") -> StreamResults:
    return StreamResults(
        method="l2p_prompt",
        model="l2p",
        projection="pgp",
        head=head,
        scenario="class_incremental",
        num_tasks=tasks,
        seed=0,
        eval_mask="seen",
        batchwise_prompt=False,
    )


def learned(tasks: int, done: int) -> StreamResults:
    """The results of a stream with both heads, of which the first `done` tasks have ended; numbers have all digits."""
    chance, results = np.random.default_rng(0), new(tasks)
    for t in range(done):
        rows = (100 * chance.integers(0, 300, (4, t + 1)) / 300).tolist()
        results.matrix.append(rows[0])
        for which, row in zip((results.within, results.linear, results.linear_within), rows[1:], strict=True):
            which.take(t, row)
        results.drift.append(chance.random())
        results.changed.append(chance.random())
        results.rank.append(t)
    results.usage = [{str(entry): 3 for entry in range(10)} for _ in range(done)]
    return results


def test_results_of_a_thousand_tasks_are_read_again_a_tenth_below_the_limit(tmp_path):
    results, path = learned(TASKS, TASKS), tmp_path / "results.json"
    write_json(path, results.to_dict(), rows=True)
    assert path.stat().st_size < 0.9 * reading.MAX_JSON
    content = reading.read_json(path)
    assert check_results_file(content, {"scenario": results.scenario, "num_tasks": TASKS}, path) == TASKS
    again = new(TASKS)
    again.load(content)
    assert again == results


def size(content: object) -> int:
    return len(json.dumps(content))


def test_the_matrix_stands_once_and_all_else_is_linear(tmp_path):
    sizes = []
    for tasks in (100, 200, 300):
        content = learned(tasks, tasks).to_dict()
        matrix = content.pop("accuracy_matrix")
        assert len(matrix) == tasks and "accuracy_matrix" not in json.dumps(content)
        sizes.append(size(content))
    assert abs((sizes[2] - sizes[1]) - (sizes[1] - sizes[0])) < 0.02 * sizes[0]


def test_a_list_of_numbers_takes_a_line(tmp_path):
    content = {"a": [[1.5, None], [2, "x, [y]"]], "b": {"c": [], "d": {}, "é": [{"f": [1]}]}}
    write_json(tmp_path / "a.json", content, rows=True)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == content and '    [1.5,null],\n    [2,"x, [y]"]\n' in text
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": [float("nan")]}, rows=True)
    assert (tmp_path / "a.json").read_text() == text


def files(folder: Path) -> dict[str, int]:
    """The size of each file of a task, without the matrix, and without numbers whose count of digits varies."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            content.pop("accuracy_matrix", None)
            found[path.name] = size(content)
        elif path.suffix == ".safetensors":
            found[path.name] = path.stat().st_size
    return found


def make(model: str, head: str, tasks: int) -> Any:
    """Return a model for one class a task, with as many pool entries as tasks where entries belong to tasks."""
    name = model.removesuffix("_prompt")
    if model in PLAIN:
        return tiny.plain(model, tiny.backbone(num_labels=tasks))
    if name == "clip":
        tokens = [[38, 1 + c, 39] for c in range(tasks)]
        return tiny.model(name, head=head, class_tokens=tokens, id2label={c: f"class {c}" for c in range(tasks)})
    settings = {"pool_size": tasks} if name == "dualprompt" else {}
    return tiny.model(name, tiny.backbone(num_labels=tasks), head=head, **settings)


def check(folder: Path, head: str, model: str, method: str, tasks: int = 12) -> None:
    """Train a stream of one class a task; no file of a task may grow by more in the last third than in the second.

    A quadratic one grows by two thirds more. Where numbers have more digits later, some bytes come on top.
    """
    trainer = tiny.trainer(
        folder,
        model=make(model, head, tasks),
        method=make_method(method),
        stream=tiny.stream(dataset=tiny.data(classes=tasks, train=4, test=2), num_tasks=tasks),
        num_train_epochs=1,
        save_full_weights="all",
        save_strategy="no",
    )
    trainer.train()
    first, second, third = (files(folder / f"task-{t}") for t in (tasks // 3, 2 * tasks // 3, tasks))
    assert len(third) > 6
    for name, length in third.items():
        before, after = second[name] - first[name], length - second[name]
        assert after < 1.25 * max(before, 0) + 300, (name, first[name], second[name], length)


def test_no_file_grows_faster_than_the_tasks(tmp_path):
    check(tmp_path, "statistics", "dualprompt", "projected_prompts")


EVERY = [("linear", tuner, "projected_prompts") for tuner in TUNERS]
EVERY += [("linear", "full", method) for method in METHODS if method not in ("projected_prompts", "joint")]


@pytest.mark.slow
@pytest.mark.parametrize(("head", "model", "method"), EVERY)
def test_no_file_of_any_method_grows_faster_than_the_tasks(head, model, method, tmp_path):
    check(tmp_path, head, model, method)
