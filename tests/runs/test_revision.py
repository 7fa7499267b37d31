"""What a revision holds of the method and of its results, read from folders made by hand."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from pgp_hf import metrics
from pgp_hf.runs import sources
from pgp_hf.runs.atomic import write_json, write_tensors
from pgp_hf.runs.checks import check_results_file, check_stream_file, finished_tasks, first_task
from pgp_hf.runs.folder import METHOD, METHOD_STATE
from pgp_hf.runs.revision import Revision
from pgp_hf.runs.sources import REVISION_FILES, RUN_FILES, locate

N = None
CONTENT = {"name": "ewc", "settings": {"strength": 5.0}, "state": {"tasks": 2}, "card": {"title": "EWC", "limits": []}}


@pytest.fixture
def folder(tmp_path):
    """An adapter of some kind, which `locate` takes for a revision."""
    write_json(tmp_path / "adapter_config.json", {"peft_type": "SOMETHING"})
    write_tensors(tmp_path / "adapter_model.safetensors", {"prompt": torch.ones(2)})
    return tmp_path


def test_the_methods_files_are_read_back(folder):
    state = {"fisher": torch.randn(3, 2), "of no length": torch.zeros(0, 4)}
    write_json(folder / METHOD, CONTENT)
    write_tensors(folder / METHOD_STATE, state)
    tensors, content = Revision.read(locate(folder)).method()
    assert content == CONTENT and tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], value) for name, value in state.items())


def test_a_method_may_remember_nothing(folder):
    write_json(folder / METHOD, {"name": "fine_tuning", "settings": {}})
    write_tensors(folder / METHOD_STATE, {})
    assert Revision.read(folder).method() == ({}, {"name": "fine_tuning", "settings": {}})


def test_a_run_of_before_there_were_such_files_has_none(folder):
    assert Revision.read(folder).method() is None
    assert {METHOD, METHOD_STATE} <= set(REVISION_FILES) and not {METHOD, METHOD_STATE} & set(RUN_FILES)


@pytest.mark.parametrize(("there", "lacking"), [(METHOD, METHOD_STATE), (METHOD_STATE, METHOD)])
def test_one_file_without_the_other_is_refused(folder, there, lacking):
    write_json(folder / METHOD, CONTENT)
    write_tensors(folder / METHOD_STATE, {})
    (folder / lacking).unlink()
    with pytest.raises(ValueError, match=f"has {there}, but no {lacking}"):
        Revision.read(folder).method()


@pytest.mark.parametrize(
    ("rows", "tasks", "first"),
    [
        ([[90, N, N], [N, N, N], [N, N, N]], 1, 0),
        ([[90, N, N], [80, 95, N], [85, 75, 70]], 3, 0),
        ([[N, N, N], [N, N, N], [85, 75, 70]], 3, 2),
        ([[N, N, N], [80, 95, N], [N, N, N]], 2, 1),
        ([[90, 5, N], [N, N, N], [N, N, N]], 1, 0),
    ],
)
def test_a_matrix_tells_how_many_tasks_have_ended_and_how_many_were_learned_alone(folder, rows, tasks, first):
    manifest = {"scenario": "online", "num_tasks": 3, "num_classes": 3, "label_names": ["a", "b", "c"]}
    results = {"scenario": "online", "num_tasks": 3, "accuracy_matrix": rows}
    results |= {"drift": [0.0] * tasks, "projection_rank": [0] * tasks}
    assert check_results_file(results, manifest, folder / "results.json") == finished_tasks(results) == tasks
    assert first_task(results) == first
    found = Revision(folder, {}, {**manifest, "tasks": [{"classes": [label]} for label in (2, 0, 1)]}, results)
    assert (found.tasks, found.learned, found.seen_classes) == (tasks, tasks - first, [2, 0, 1][:tasks])


@pytest.mark.parametrize(
    "rows",
    [
        [[N, N, N], [N, 95, N], [85, 75, 70]],
        [[N, N, N], [80, 95, N], [85, N, 70]],
        [[N, 5, N], [80, 95, N], [85, 75, 70]],
        [[N, 5, N], [N, N, N], [N, N, N]],
        [[90, N, N], [N, N, N], [85, 75, 70]],
        [[N, N, N], [N, N, N], [N, 75, 70]],
    ],
)
def test_a_matrix_with_holes_is_refused(folder, rows):
    results = {
        "scenario": "online",
        "num_tasks": 3,
        "accuracy_matrix": rows,
        "drift": [0] * 3,
        "projection_rank": [0] * 3,
    }
    with pytest.raises(
        ValueError, match="accuracy_matrix lacks entries: row i has .*only the first rows may be missing"
    ):
        check_results_file(results, {"scenario": "online", "num_tasks": 3}, folder / "results.json")


def told(rows, **others) -> dict:
    """The results of a run that says how many tasks have ended."""
    tasks = others.get("finished_tasks", len(rows))
    drift = [0.1 if i and any(value is not None for value in row[:i]) else N for i, row in enumerate(rows[:tasks])]
    return {
        "scenario": "online",
        "num_tasks": len(rows),
        "finished_tasks": tasks,
        "accuracy_matrix": rows,
        "per_task_average_accuracy": metrics.summarize(rows, tasks)["per_task_average_accuracy"],
        "drift": [0.0, *drift[1:]],
        "projection_rank": [0] * tasks,
        **others,
    }


MANIFEST = {"scenario": "online", "num_tasks": 3}


@pytest.mark.parametrize(
    "rows",
    [
        [[90, N, N], [80, 95, N], [N, N, 70]],  # a run that goes on without the old test images
        [[90, N, N], [N, 95, N], [N, N, N]],
        [[N, N, N], [N, 95, N], [85, N, 70]],  # the first task's came later
        [[N, N, N], [N, N, N], [N, N, N]],
        [[90, 5, N], [80, 95, N], [85, 75, 70]],
    ],
)
def test_test_images_may_be_absent_from_any_task_of_a_run_that_tells_how_many_have_ended(rows):
    results = told(rows)
    assert check_results_file(results, MANIFEST, "results.json") == finished_tasks(results) == 3
    assert first_task(results) == 0 and Revision("folder", {}, MANIFEST, results).learned == 3
    del results["finished_tasks"]
    if any(N in row[: i + 1] for i, row in enumerate(rows)):
        with pytest.raises(ValueError, match="lacks entries|is not .* numbers from 0"):
            check_results_file(results, MANIFEST, "results.json")


GAPS = [[90, N, N], [80, 95, N], [N, N, 70]]
ORIGIN = {"repo": "me/run", "revision": "task-2", "commit": "abc1234", "tasks": 2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"finished_tasks": 2}, "values outside the rows 0 to 1"),
        ({"finished_tasks": 4}, "finished_tasks=4, first_task=0: expected"),
        ({"finished_tasks": 0}, "finished_tasks=0"),
        ({"finished_tasks": True}, "finished_tasks=True"),
        ({"finished_tasks": "3"}, "finished_tasks='3'"),
        ({"first_task": 3}, "first_task=3"),
        ({"first_task": 1}, "values outside the rows 1 to 2"),
        ({"first_task": None}, "first_task=None"),
        ({"accuracy_matrix": [[90, N, N], [80, N, N], [N, N, 70]]}, "lacks entries in row 1, .* expected null"),
        ({"accuracy_matrix": [[90, N, N], [80, 95, N], [1, 1, 70]]}, "lacks no entry in row 2, .* their mean"),
        ({"per_task_average_accuracy": [90, 85]}, "per_task_average_accuracy=.90, 85. is not 3 values"),
        ({"per_task_average_accuracy": None}, "per_task_average_accuracy=None is not 3 values"),
        ({"drift": [0.0, 0.1]}, "drift=.0.0, 0.1. is not 3 numbers"),
        ({"drift": [0.0, 0.1, 0.1]}, "drift.2.=0.1, but no accuracy of an earlier task"),
        ({"drift": [N, 0.1, N]}, "drift=.None, 0.1, None. is not 3 numbers"),
        ({"projection_rank": [0, 1, N]}, "projection_rank=.* is not 3 numbers"),
        ({"continues": {**ORIGIN, "tasks": 3}}, "continues=.*expected repo"),
        ({"continues": {**ORIGIN, "tasks": 0}}, "continues="),
        ({"continues": {**ORIGIN, "repo": 5}}, "continues="),
        ({"continues": {**ORIGIN, "revision": "a) [b](c"}}, "continues="),
        ({"continues": {**ORIGIN, "commit": "no commit"}}, "continues="),
        ({"continues": {**ORIGIN, "continues": ORIGIN}}, "from 1 to below 2"),
        ({"continues": ["me/run"]}, "continues="),
    ],
)
def test_gaps_that_contradict_the_rest_of_the_file_are_refused(changed, message):
    results = told(GAPS, continues={**ORIGIN, "continues": {**ORIGIN, "repo": N, "commit": N, "tasks": 1}})
    assert check_results_file(results, MANIFEST, "results.json") == 3
    with pytest.raises(ValueError, match=message):
        check_results_file({**results, **changed}, MANIFEST, "results.json")


@pytest.mark.parametrize("kind", [None, 3, ["L2P"], {"a": 1}])
def test_the_kind_of_an_adapter_is_a_word(folder, kind):
    write_json(folder / "adapter_config.json", {"peft_type": kind})
    with pytest.raises(ValueError, match="adapter_config.json has peft_type=.*expected the name of a kind of adapter"):
        Revision.read(folder)


# ---- stream.json ----------------------------------------------------------------------------------------------------


def stream_file(tasks, names=6, order=None):
    """A manifest as far as a revision reads it; `tasks` are classes, with those that are new where they differ."""
    entries = [{"classes": own} if not isinstance(own, tuple) else dict(zip(KEYS, own, strict=True)) for own in tasks]
    new = [c for entry in entries for c in entry.get("new_classes", entry["classes"])]
    return {
        "num_tasks": len(tasks),
        "num_classes": names,
        "label_names": [str(c) for c in range(names)],
        "class_order": new if order is None else order,
        "tasks": entries,
    }


KEYS = ("classes", "new_classes")


@pytest.mark.parametrize(
    "manifest",
    [
        stream_file([[4, 1], [0], [3, 2, 5]]),
        stream_file([[4, 1], [0], [3, 2, 5]], order=[0, 1, 2, 3, 4, 5]),  # older files are read by their tasks alone
        stream_file([[0, 1, 2], ([1, 3], [3]), ([0, 2], []), [5, 4]]),
        stream_file([[0, 1], ([1, 3], [3])]),  # the names of 2, 4 and 5 are kept for later
    ],
)
def test_streams_that_a_revision_may_have(manifest):
    names = manifest["label_names"]
    check_stream_file(manifest, {"id2label": {str(c): name for c, name in enumerate(names)}}, Path("stream.json"))
    check_stream_file(manifest, {"id2label": {str(c): f"LABEL_{c}" for c in range(len(names))}}, Path("stream.json"))
    other = {str(c): name for c, name in enumerate([names[1], names[0], *names[2:]])}
    for config, file in (({}, "config.json"), ({"peft_type": "L2P"}, "adapter_config.json")):
        with pytest.raises(ValueError, match=f"names class 0 '.*', but id2label in {file} names it '.*'"):
            check_stream_file(manifest, {**config, "id2label": other}, Path("stream.json"))


@pytest.mark.parametrize(
    "manifest",
    [
        stream_file([[0, 1], []]),
        stream_file([[0, 1], ([1, 3], [1, 3])]),
        stream_file([[0, 1], ([1, 3], [])]),
        stream_file([[0, 1], ([3, 3], [3])]),
        stream_file([[0, 1], ([1], [3])]),
        stream_file([[0, 1], [1, 3]]),
        stream_file([[0, 1], [6]]),
        stream_file([[0, 1], [-1]]),
        stream_file([[0, 1], ["2"]]),
        stream_file([[0, 1], [True]]),
        stream_file([[0, 1], [2, 3]], order=[0, 1, 2, 3, 4, 5]),  # a task is missing
        stream_file([[0, 1], [2, 3]], order=[]),
    ],
)
def test_streams_that_contradict_themselves(manifest):
    with pytest.raises(ValueError, match="stream.json has num_classes=6: expected tasks with the classes 0 to"):
        check_stream_file(manifest, {}, Path("stream.json"))


def test_a_model_of_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="has 7 classes, but id2label in config.json has another number"):
        check_stream_file(stream_file([[0, 1]], names=7), {"id2label": {0: "0", 1: "1"}}, Path("stream.json"))


def test_seen_classes_are_named_once(folder):
    manifest = stream_file([[4, 1], ([1, 0], [0]), ([4], [])])
    rows = [[1.0, N, N], [1.0, 1.0, N], [1.0, 1.0, 1.0]]
    for done, seen in ((1, [4, 1]), (2, [4, 1, 0]), (3, [4, 1, 0])):
        matrix = rows[:done] + [[N] * 3] * (3 - done)
        assert Revision(folder, {}, manifest, {"accuracy_matrix": matrix}).seen_classes == seen


@pytest.mark.parametrize(("kind", "told"), [(RepositoryNotFoundError, True), (GatedRepoError, False)])
def test_a_repository_that_is_not_there_may_be_a_folder_that_is_not(kind, told, monkeypatch):
    def refuse(*args):
        raise kind("refused", response=mock.MagicMock())

    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_listing", refuse)
    with pytest.raises(kind) as error:
        sources.locate("me/nothing")
    assert ("There is no folder me/nothing here either." in str(error.value)) is told
