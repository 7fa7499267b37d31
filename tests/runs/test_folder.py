"""The files of a run: whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch

from pgp_hf.runs import removal
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


# ---- what somebody else has written ----------------------------------------------------------------------------------

FOREIGN = (
    *(
        "thesis.txt",
        "notes/x.txt",
        "task-force.md",
        "task-notes/thesis.txt",
        "task-01/results.json",
        "task-1/notes.txt",
    ),
    *("task-1/figures/mine.png", "features/my.csv", "features/task-x.safetensors", "checkpoints/precious.ckpt"),
    *("checkpoints/task-2/notes.txt", "checkpoints/task-2/checkpoint-3/precious.txt", "checkpoints/best/model.bin"),
    *(".task-1-notes/x.txt", ".task-1", ".results.json.tmp", ".thesis.txt.12.tmp", "figures/my.png"),
    *("baseline/task-1/results.json", "task-5/model.safetensors"),
)


def finished(root, tasks=2):
    """A run of an earlier version, which has no list of its files, with all that it ever wrote."""
    run = RunFolder(root)
    for t in range(tasks):
        run.publish(t, whole)
        write_tensors(run.features(t), {"features": torch.ones(1)})
    for step, names in ((3, ("trainer_state.json", "optimizer.pt", "rng_state.pth", "training_args.bin")), (6, ())):
        folder = run.checkpoints(tasks) / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "method.json", *names):
            (folder / name).write_text(name)
    return run


def whole(folder):
    write(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "stream.json", "projection.json"):
        (folder / name).write_text(name)


def put(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("precious")


def files(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_what_a_run_has_not_written_is_never_deleted(tmp_path):
    run = finished(tmp_path)
    put(tmp_path, FOREIGN)
    run.clear()
    assert files(tmp_path) == {*FOREIGN} and run.is_empty()
    assert all((tmp_path / name).read_text() == "precious" for name in FOREIGN)
    folders = {path.parent.relative_to(tmp_path).as_posix() for path in map(tmp_path.joinpath, FOREIGN)}
    ours = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_dir()}
    assert all(any(f"{own}/".startswith(f"{one}/") for own in folders) for one in ours)  # no empty folder is left


def test_what_is_listed_with_its_digest_is_the_runs_own(tmp_path):
    run = RunFolder(tmp_path)
    content = {"tokenizer.json": b"ours", "deep/vocab.txt": b"ours", "altered.txt": b"ours"}

    def listed(folder):
        whole(folder)
        noted = {}
        for name, data in content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
            noted[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        write_json(folder / "digests.json", {"files": noted, "features": None})

    run.publish(0, listed)
    for folder in (tmp_path, tmp_path / "task-1"):
        (folder / "altered.txt").write_text("mine")
    run.clear()
    assert files(tmp_path) == {"altered.txt", "task-1/altered.txt"}


@pytest.mark.parametrize("name", ["../thesis.txt", "/thesis.txt", "a/../../thesis.txt"])
def test_a_list_of_digests_reaches_nothing_outside_its_folder(tmp_path, name):
    (tmp_path / "thesis.txt").write_text("mine")
    run = RunFolder(tmp_path / "run")
    named = name if name.startswith(".") else name.replace("/thesis", f"{tmp_path}/thesis", 1)
    noted = {"sha256": hashlib.sha256(b"mine").hexdigest(), "bytes": 4}

    def listed(folder):
        whole(folder)
        write_json(folder / "digests.json", {"files": {named: noted}, "features": None})

    run.publish(0, listed)
    run.clear()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_linked_task_is_not_followed(tmp_path):
    elsewhere = finished(tmp_path / "elsewhere")
    run = finished(tmp_path / "run")
    kept = files(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run" / "task-2")
    (tmp_path / "run" / "task-2").symlink_to(elsewhere.task(1))
    with pytest.raises(ValueError, match="still holds .*task-2.* which cannot be deleted"):
        run.clear()
    assert files(tmp_path / "elsewhere") == kept


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "figures/stability.png"])
def test_a_file_that_a_run_would_replace_is_in_the_way(tmp_path, name):
    put(tmp_path, [name, "notes.txt"])
    run = RunFolder(tmp_path)
    for call in (run.check_unused, run.clear):
        with pytest.raises(ValueError, match=f"holds {name}, which the files of a run would replace: choose another"):
            call()
    assert files(tmp_path) == {name, "notes.txt"}


def test_a_lone_copy_of_a_task_is_finished_work(tmp_path):
    run = finished(tmp_path, 1)
    shutil.rmtree(run.task(0)), shutil.rmtree(tmp_path / "checkpoints"), shutil.rmtree(tmp_path / "features")
    assert run.is_empty()
    with pytest.raises(ValueError, match="holds results.json.*resume_from_checkpoint=True"):
        run.check_unused()
    run.clear()
    assert files(tmp_path) == set()


def test_foreign_files_in_a_tasks_folder_stay_beside_it(tmp_path):
    put(tmp_path, ["task-1/notes.txt", "task-1/figures/mine.png"])
    run = RunFolder(tmp_path)
    run.publish(0, whole)
    assert run.finished_tasks() == 1
    assert (tmp_path / "task-1" / "notes.txt").read_text() == "precious"
    assert {"task-1/figures/mine.png", "task-1/figures/stability.png", "task-1/results.json"} <= files(tmp_path)
    assert not list(tmp_path.glob(".task-*"))


@pytest.mark.parametrize("complete", [whole, lambda folder: listed(folder, "results.json")])
def test_foreign_files_in_a_tasks_folder_are_not_copied_to_the_top_level(tmp_path, complete):
    put(tmp_path, ["notes.txt"])
    run = RunFolder(tmp_path)
    run.publish(0, complete)
    (tmp_path / "task-1" / "notes.txt").write_text("another")
    run.promote(0)
    assert (tmp_path / "notes.txt").read_text() == "precious" and (tmp_path / "results.json").exists()


def listed(folder, *names):
    """Write these files and their digests."""
    content = {name: b"ours" for name in names}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    noted = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": 4} for name, data in content.items()}
    write_json(folder / "digests.json", {"files": noted, "features": None})


def test_what_was_edited_since_the_copy_to_the_top_level_stays(tmp_path):
    run = RunFolder(tmp_path)
    run.publish(0, lambda folder: listed(folder, "results.json", "README.md"))
    (tmp_path / "README.md").write_text("edited")
    run.complete_copy(0)
    assert (tmp_path / "README.md").read_text() == "edited"
    for name, content in ((".copying", "task-1"), ("digests.json", "of the task before")):
        (tmp_path / "README.md").write_text("old")
        (tmp_path / name).write_text(content)
        run.complete_copy(0)
        assert (tmp_path / "README.md").read_text() == "ours" and not (tmp_path / ".copying").exists()


def test_only_large_files_of_the_run_are_dropped(tmp_path):
    run = RunFolder(tmp_path)
    run.publish(0, lambda folder: listed(folder, "config.json", "model.safetensors", "exemplars.safetensors"))
    run.publish(1, lambda folder: listed(folder, "adapter_config.json", "exemplars.safetensors"))
    run.publish(2, lambda folder: listed(folder, "config.json"))
    put(tmp_path, ["task-2/model.safetensors", "task-3/model.safetensors"])  # such as a merged model
    run.drop_large(before=3)
    found = {name for name in files(tmp_path) if name.startswith("task-") and name.endswith(".safetensors")}
    assert found == {"task-2/model.safetensors", "task-3/model.safetensors"}


def test_the_digests_of_a_long_stream_are_read_only_where_something_is_dropped(tmp_path, monkeypatch):
    put(tmp_path, [f"task-{t}/digests.json" for t in (1, 2, 3)])
    put(tmp_path, ["task-2/model.safetensors"])
    read = []
    monkeypatch.setattr(removal, "listed", lambda path: read.append(path) or {})
    RunFolder(tmp_path).drop_large(before=3)
    assert read == [tmp_path / "task-2" / "digests.json"]


def test_a_task_beside_foreign_files_is_placed_whole_or_not_at_all(tmp_path, monkeypatch):
    put(tmp_path, ["task-1/notes.txt", "task-1/figures/mine.png"])
    run, replace = RunFolder(tmp_path), os.replace
    renamed = []

    def die(source, target):
        if renamed:
            monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process tidies nothing up
            raise KeyboardInterrupt
        renamed.append(target)
        replace(source, target)

    for _ in range(2):  # the second time, the first one's folders are there
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", die)
            renamed.clear()
            with pytest.raises(KeyboardInterrupt):
                run.publish(0, whole)
        assert run.finished_tasks() == 0
        monkeypatch.undo()
        run.sweep()
        assert files(tmp_path) == {"task-1/notes.txt", "task-1/figures/mine.png"}
    run.publish(0, whole)
    assert {"task-1/notes.txt", "task-1/figures/mine.png", "task-1/results.json"} <= files(tmp_path)
    # died before the foreign files were back
    put(tmp_path, [".task-1.aside/figures/other.png", ".task-1.aside/empty/x"])
    (tmp_path / ".task-1.aside" / "empty" / "x").unlink()
    run.sweep()
    assert (run.task(0) / "figures" / "other.png").exists() and (run.task(0) / "empty").is_dir()
    assert not list(tmp_path.glob(".task-*"))


def test_a_foreign_file_with_the_name_of_a_tasks_own_is_not_replaced(tmp_path):
    put(tmp_path, ["task-1/vocab.txt"])
    with pytest.raises(ValueError, match="task-1/vocab.txt is in the way of a task's files"):
        RunFolder(tmp_path).publish(0, lambda folder: listed(folder, "results.json", "vocab.txt"))
    assert files(tmp_path) == {"task-1/vocab.txt"}


@pytest.mark.parametrize("content", [["a.txt"], {"a.txt": ["ours"]}, "a.txt"])
def test_a_list_of_digests_with_another_content_names_no_file(tmp_path, content):
    run = finished(tmp_path, 1)
    write_json(run.task(0) / "digests.json", {"files": content})
    put(tmp_path, ["task-1/a.txt"])
    run.clear()
    assert files(tmp_path) == {"task-1/a.txt"}


def test_a_task_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    run, synced, fsync = RunFolder(tmp_path), [], os.fsync

    def note(descriptor):
        synced.append((os.fstat(descriptor).st_ino, run.finished_tasks()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_tensors(run.features(0), {"features": torch.ones(1)})
    run.publish(0, whole)
    before = {inode for inode, finished_tasks in synced if not finished_tasks}
    written = [path for path in run.task(0).rglob("*") if path.is_file()]
    assert {path.stat().st_ino for path in (*written, run.features(0))} <= before


@pytest.mark.parametrize("name", ["task-1", "task-1/README.md", "task-1/config.json"])
def test_what_lies_where_a_task_goes_is_found_before(tmp_path, name):
    put(tmp_path, [name])
    for call in (RunFolder(tmp_path).check_free, lambda t: RunFolder(tmp_path).publish(t, whole)):
        with pytest.raises(ValueError, match=f"{name} is in the way of a task's files"):
            call(0)
    assert files(tmp_path) == {name}


# ---- finished work ---------------------------------------------------------------------------------------------------


def test_a_finished_task_is_never_replaced(tmp_path):
    run = finished(tmp_path)
    for call in (run.check_free, lambda t: run.publish(t, write)):
        with pytest.raises(ValueError, match="holds task-1 already, and a finished task is never trained over"):
            call(0)
    assert (tmp_path / "task-1" / "stream.json").exists()


@pytest.mark.parametrize(
    ("lost", "first", "message"),
    [
        ([0], 0, "lacks task-1, but holds task-2, task-3, task-4: .* resume_from_checkpoint='.*task-4'"),
        ([1], 0, "lacks task-2, but holds task-1, task-3, task-4"),
        ([0, 1, 2], 0, "lacks task-1, task-2, task-3, but holds task-4"),
        ([], 4, r"holds task-1, task-2, task-3, task-4, but continued.json says that task-5 is the first"),
        ([0], 2, "holds task-2, but continued.json says that task-3 is the first one"),
        ([3], 0, None),  # nothing after it
        ([0, 1], 2, None),
        ([0, 1, 2, 3], 3, None),
    ],
)
def test_a_gap_is_found(tmp_path, lost, first, message):
    run = finished(tmp_path, 4)
    run.drop_checkpoints()
    for t in lost:
        shutil.rmtree(run.task(t))
    run.start_at(first)
    if message is None:
        run.check_gaps()
    else:
        with pytest.raises(ValueError, match=message):
            run.check_gaps()


@pytest.mark.parametrize(("lost", "first"), [([0, 1], 0), ([1], 0), ([0, 1], 1)])
def test_checkpoints_of_a_later_task_show_a_gap(tmp_path, lost, first):
    run = finished(tmp_path)
    run.check_gaps()
    for t in lost:
        shutil.rmtree(run.task(t))
    run.start_at(first)
    lacking = (run.finished_tasks() or first) + 1
    with pytest.raises(ValueError, match=f"checkpoints of task-3, but lacks task-{lacking}.*never trained over"):
        run.check_gaps()
    run.drop_checkpoints()
    run.check_gaps()


def test_a_top_level_without_its_tasks_shows_a_gap(tmp_path):
    run = RunFolder(tmp_path)
    run.publish(0, lambda folder: write(folder, {"finished_tasks": 1}))
    put(tmp_path, ["checkpoints/task-1/checkpoint-3/trainer_state.json"])
    run.check_gaps()
    shutil.rmtree(run.task(0))
    with pytest.raises(ValueError, match="lacks the folders of the 1 tasks that its results.json counts"):
        run.check_gaps()


# ---- what a killed run leaves ----------------------------------------------------------------------------------------


def test_what_was_being_written_is_swept(tmp_path):
    run = finished(tmp_path)
    kept = files(tmp_path)
    (tmp_path / ".task-3-ab0_xyz9").mkdir()
    stray = (".task-3-ab0_xyz9/model.safetensors", ".results.json.77.tmp", "figures/.stability.png.8.tmp")
    put(
        tmp_path,
        [*stray, "features/.task-3.safetensors.123456.tmp", ".continued.json.1.tmp", ".comparison.json.5.tmp"],
    )
    put(tmp_path, [*FOREIGN[:3], ".notes.txt.7.tmp", ".task-1-ab/x", ".results.json.tmp"])
    run.sweep()
    assert files(tmp_path) == {*kept, *FOREIGN[:3], ".notes.txt.7.tmp", ".task-1-ab/x", ".results.json.tmp"}
    run.sweep()  # nothing is left to do


def test_checkpoints_of_finished_tasks_are_dropped(tmp_path):
    run = finished(tmp_path, 3)
    for t in (0, 2):
        put(tmp_path, [f"checkpoints/task-{t + 1}/checkpoint-6/trainer_state.json"])
    run.drop_checkpoints(before=3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["task-4"]
    run.drop_checkpoints()
    assert not (tmp_path / "checkpoints").exists()


def test_the_copy_to_the_top_level_says_that_it_is_not_finished(tmp_path, monkeypatch):
    run = finished(tmp_path, 1)
    copy = shutil.copyfile

    def fail(source, target):
        if "README" in str(target):
            assert (tmp_path / ".copying").read_text() == "task-2\n"
            raise OSError("disk full")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        run.publish(1, whole)
    assert run.finished_tasks() == 2 and (tmp_path / ".copying").exists()
    monkeypatch.undo()
    run.promote(1)
    assert not (tmp_path / ".copying").exists()
