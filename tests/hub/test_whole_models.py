"""Whole models on the Hub: every tag has its weights, and the machine keeps them only as long as it must."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import tiny

from pgp_hf.methods import create

TRAIN = """
import tiny
from pgp_hf.methods import create
from pathlib import Path
from pgp_hf import StreamCallback

class Watch(StreamCallback):
    def on_task_begin(self, args, state, control, task, **kwargs):
        seen.append([(Path(args.output_dir) / f"task-{k}" / "model.safetensors").exists() for k in (1, 2, 3)])

seen = []
arguments = {"push_to_hub": True, "hub_model_id": "me/run", "num_train_epochs": 1, **settings}
with tiny.without_figures():
    trainer = tiny.trainer(folder, model=tiny.plain(), method=create("fine_tuning"), callbacks=[Watch()], **arguments)
    trainer.train(resume_from_checkpoint=resume)
result = [trainer.results.to_dict(), seen]
"""
PUSH = "from pgp_hf import hub; pushed = hub.push(folder, 'me/run', say=print); result = [pushed.uploaded, pushed.present, pushed.left_out]"
LOAD = """
import tiny, torch
from pgp_hf import load_pretrained
classifier = load_pretrained(where, **options)
with torch.no_grad():
    result = classifier.model(pixel_values=tiny.images(3)).logits.tolist()
"""
TASKS = ("task-1", "task-2", "task-3")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, dict]:
    """A run that keeps the weights of every task and pushes nothing: its folder and its results."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    with tiny.without_figures():
        made = tiny.trainer(
            folder, model=tiny.plain(), method=create("fine_tuning"), num_train_epochs=1, save_full_weights="all"
        )
        made.train()
    return folder, made.results.to_dict()


def kept(folder: Path) -> list[bool]:
    return [(folder / task / "model.safetensors").exists() for task in TASKS]


def test_a_run_shares_all_weights_and_keeps_the_last(hub, python, plain, tmp_path):
    results, _ = python(TRAIN, folder=str(tmp_path / "run"), resume=None, settings={}).value
    repo = hub.repos["me/run"]
    assert list(repo.tags) == list(TASKS) and kept(tmp_path / "run") == [False, False, True]
    assert tiny.same_results(results, plain[1])
    for task in TASKS:
        assert repo.files(task)["model.safetensors"] == (plain[0] / task / "model.safetensors").read_bytes()
        assert json.loads(repo.files(task)["config.json"])["model_type"] == "vit"
    # the same again changes nothing, although two tasks have no weights here any more
    state = (repo.main, dict(repo.tags))
    assert python(PUSH, folder=str(tmp_path / "run")).value == [[], list(TASKS), []]
    assert (repo.main, dict(repo.tags)) == state


def test_weights_stay_until_the_hub_has_them(hub, python, tmp_path):
    gate = threading.Event()
    hub.fail(r"POST .*/commit/main", gate=gate)
    python.start(TRAIN, folder=str(tmp_path / "run"), resume=None, settings={"hub_wait": 60.0})
    while not (tmp_path / "run" / "task-3").exists():
        assert not gate.wait(0.02)
    assert kept(tmp_path / "run") == [True, True, True]
    gate.set()
    _, seen = python.answer().value
    assert seen == [[False, False, False], [True, False, False], [True, True, False]]
    assert list(hub.repos["me/run"].tags) == list(TASKS) and kept(tmp_path / "run") == [False, False, True]


def test_what_the_hub_never_got_is_kept(hub, python, tmp_path):
    hub.fail(r"POST .*/commit/main", status=403, times=None)
    answer = python(TRAIN, folder=str(tmp_path / "run"), resume=None, settings={"hub_wait": 5.0})
    assert "Not on the Hub: task-1, task-2, task-3" in answer.out and kept(tmp_path / "run") == [True, True, True]
    hub.faults.clear()
    assert python(PUSH, folder=str(tmp_path / "run")).value == [list(TASKS), [], []]


def test_tasks_without_weights_are_left_out_and_named(hub, python, tmp_path):
    with tiny.without_figures():
        tiny.trainer(tmp_path / "run", model=tiny.plain(), method=create("fine_tuning"), num_train_epochs=1).train()
    answer = python(PUSH, folder=str(tmp_path / "run"))
    assert answer.value == [["task-3"], [], ["task-1", "task-2"]]
    assert "task-1 left out, since the run has not kept its weights" in answer.out
    assert list(hub.repos["me/run"].tags) == ["task-3"]


def test_a_run_that_is_resumed_says_what_it_left_out(hub, python, tmp_path):
    with tiny.without_figures():
        made = tiny.trainer(tmp_path / "run", model=tiny.plain(), method=create("fine_tuning"), num_train_epochs=1)
        made.train_task(0)
        made.train_task(1)
    answer = python(TRAIN, folder=str(tmp_path / "run"), resume=True, settings={"disable_tqdm": False})
    assert list(hub.repos["me/run"].tags) == ["task-2", "task-3"]
    assert "All 3 tasks are on the Hub, but task-1, whose weights the run has not kept" in answer.out


def test_every_tag_loads_and_goes_on(hub, python, plain, tmp_path):
    folder, results = plain
    python(PUSH, folder=str(folder))
    for task in TASKS:
        options = {"revision": task, "cache_dir": str(tmp_path / "cache")}
        there = python(LOAD, where="me/run", options=options).value
        assert there == python(LOAD, where=str(folder), options={"revision": task}).value
        hub.requests.clear()
        assert python(LOAD, where="me/run", options={**options, "local_files_only": True}).value == there
        assert not hub.requests
    settings = {"push_to_hub": False}
    again = python(TRAIN, folder=str(tmp_path / "on"), resume="me/run@task-1", settings=settings).value[0]
    assert tiny.same_results(again, results)
    assert kept(tmp_path / "on") == [False, False, True]


def test_an_adapters_repository_may_hold_a_model(hub, python, tmp_path):
    """Files that only a whole model's run has are the user's in the repository of an adapter."""
    with tiny.without_figures():
        tiny.trainer(tmp_path / "run", num_train_epochs=1).train_task(0)
    assert python(PUSH, folder=str(tmp_path / "run")).value[0] == ["task-1"]
    repo = hub.repos["me/run"]
    repo.edit(**{"config.json": b"{}", "model.safetensors": b"merged by hand"})
    with tiny.without_figures():
        made = tiny.trainer(tmp_path / "run", num_train_epochs=1)
        made.train(resume_from_checkpoint=True)
    assert python(PUSH, folder=str(tmp_path / "run")).value == [["task-2", "task-3"], ["task-1"], []]
    assert repo.files("task-3")["model.safetensors"] == b"merged by hand"
