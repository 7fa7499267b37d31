"""The files of a run: whole or absent."""

from __future__ import annotations

import json
import os

import pytest
import torch

from pgp_hf.runs.atomic import write_json, write_tensors
from pgp_hf.runs.folder import RunFolder
from pgp_hf.runs.reading import read_json, read_tensors


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "deep" / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert os.listdir(path.parent) == ["results.json"]


def test_tensors_round_trip_even_when_they_share_memory(tmp_path):
    path = tmp_path / "bases.safetensors"
    shared = torch.randn(4, 3, dtype=torch.float64)
    write_tensors(path, {"a": shared, "b": shared.T, "c": torch.zeros(3, 0)})
    read = read_tensors(path)
    assert torch.equal(read["a"], shared) and torch.equal(read["b"], shared.T) and read["c"].shape == (3, 0)
    write_tensors(path, {})
    assert read_tensors(path) == {}


@pytest.mark.parametrize("content", [None, b"", b"{", b"\x80\x04\x95pickled"])
def test_missing_and_damaged_files_are_named(tmp_path, content):
    for read, name in ((read_json, "results.json"), (read_tensors, "bases.safetensors")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is missing or damaged"):
            read(path)


def write(folder, value=1):
    (folder / "results.json").write_text(json.dumps(value))
    (folder / "figures").mkdir()
    (folder / "figures" / "stability.png").write_bytes(b"png")


def test_a_task_is_published_whole_and_copied_up(tmp_path):
    run = RunFolder(tmp_path)
    assert run.finished_tasks() == 0 and run.is_empty()
    run.publish(0, write)
    run.publish(1, lambda folder: write(folder, 2))
    assert run.finished_tasks() == 2 and not run.is_empty()
    assert (tmp_path / "results.json").read_text() == "2" and (tmp_path / "figures" / "stability.png").exists()
    assert (tmp_path / "task-1" / "results.json").read_text() == "1"
    assert {p.name for p in tmp_path.iterdir()} == {"task-1", "task-2", "results.json", "figures"}


def test_a_write_that_fails_publishes_nothing(tmp_path):
    run = RunFolder(tmp_path)
    run.publish(0, write)

    def fail(folder):
        write(folder, 2)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.publish(1, fail)
    assert run.finished_tasks() == 1
    assert (tmp_path / "results.json").read_text() == (tmp_path / "task-1" / "results.json").read_text() == "1"
    assert {p.name for p in tmp_path.iterdir()} == {"task-1", "results.json", "figures"}


def test_a_task_counts_only_when_those_before_it_are_there(tmp_path):
    run = RunFolder(tmp_path)
    run.publish(1, write)
    assert run.finished_tasks() == 0


def test_a_run_may_start_at_a_later_task(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start_at(0)
    assert run.first == 0 and not run.root.exists()
    run.start_at(2)
    assert read_json(run.root / "continued.json") == {"first": 2}
    assert run.first == 2 and run.finished_tasks() == 0 and run.is_empty()
    run.publish(2, write)
    assert run.finished_tasks() == 3 and not run.is_empty()
    run.clear()
    assert run.first == 0
    run.start_at(1)
    run.start_at(0)
    assert run.first == 0 and not (run.root / "continued.json").exists()


def test_clear_deletes_a_run_and_nothing_else(tmp_path):
    run = RunFolder(tmp_path)
    run.publish(0, write)
    write_tensors(run.features(0), {"features": torch.ones(1)})
    run.checkpoints(1).mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    run.clear()
    assert run.is_empty()
    assert {p.name for p in tmp_path.rglob("*")} == {"notes.txt"}
