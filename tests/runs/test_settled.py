"""Reading the top level of a run that is in training."""

from __future__ import annotations

import json
import os
import socket
import threading
import time

import pytest

from pgp_hf import ProjectionConfig, load_pretrained
from pgp_hf.runs import settled as module
from pgp_hf.runs.folder import RunFolder
from pgp_hf.runs.lock import HOLDER, held
from pgp_hf.runs.settled import settled

FILES = ("method.json", "results.json", "stream.json")


def write(t):
    def files(folder):
        for name in FILES:
            (folder / name).write_text(str(t))

    return files


def reader(root):
    """Return a function that reads three files as `load_pretrained` does, which must fit together."""

    def read():
        found = {name: (root / name).read_text() for name in FILES}
        if len(set(found.values())) > 1:
            raise ValueError(f"these files do not fit together: {found}")
        return found["stream.json"]

    return read


def test_who_reads_while_a_run_writes_gets_one_task_or_another(tmp_path):
    """A thread publishes task after task; every read is of one task, and no read is refused."""
    run, ended, failed = RunFolder(tmp_path), threading.Event(), []
    run.publish(0, write(0))

    def publish():
        try:
            with held(tmp_path):
                for t in range(1, 60):
                    run.publish(t, write(t))
        except BaseException as error:
            failed.append(error)
        ended.set()

    thread = threading.Thread(target=publish)
    thread.start()
    seen = [0]
    while not ended.is_set():
        seen.append(int(settled(tmp_path, None, reader(tmp_path))))
    thread.join()
    assert not failed and seen == sorted(seen)
    assert settled(tmp_path, None, reader(tmp_path)) == "59"


@pytest.fixture
def copying(tmp_path):
    """A run whose newest files are being copied."""
    run = RunFolder(tmp_path)
    for t in (0, 1):
        run.publish(t, write(t))
    (tmp_path / ".copying").write_text("task-2\n")
    (tmp_path / "stream.json").write_text("0")
    return tmp_path


def test_a_copy_that_was_interrupted_is_named(copying):
    with pytest.raises(ValueError, match="interrupted while it copied .*task-2 .*load revision='task-2'.*or resume"):
        settled(copying, None, reader(copying))
    for load in (load_pretrained, ProjectionConfig.from_pretrained):
        with pytest.raises(ValueError, match="interrupted while it copied the files of task-2"):
            load(copying)
    assert settled(copying, "task-2", lambda: "read") == "read"  # which is whole
    RunFolder(copying).promote(1)  # as resuming does
    assert settled(copying, None, reader(copying)) == "1"


def test_a_copy_that_takes_long_is_waited_for(copying, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.3)
    with held(copying):
        began = time.monotonic()
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on .*revision='task-2'"):
            settled(copying, None, reader(copying))
        assert time.monotonic() - began > 0.25
        monkeypatch.setattr(module, "SECONDS", 60.0)
        timer = threading.Timer(0.3, lambda: RunFolder(copying).promote(1))
        timer.start()
        assert settled(copying, None, reader(copying)) == "1"
        timer.join()


def test_a_run_without_a_finished_task_says_so(tmp_path):
    with (
        held(tmp_path / "run"),
        pytest.raises(ValueError, match="is in training by process .*no task of it has ended"),
    ):
        load_pretrained(tmp_path / "run")
    (tmp_path / "run").mkdir()
    note = {"host": socket.gethostname(), "pid": 2**22 + 1, "began": "now"}  # it is dead
    (tmp_path / "run" / HOLDER).write_text(json.dumps(note))
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_pretrained(tmp_path / "run")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_note_that_cannot_be_read_is_named(copying, content):
    (copying / ".copying").unlink()
    (copying / ".copying").mkdir() if content is None else (copying / ".copying").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.copying cannot be read .*expected the name of the task"):
        settled(copying, None, reader(copying))


def test_other_errors_are_raised_as_they_are(tmp_path):
    calls = []

    def refuse():
        calls.append(1)
        raise ValueError("another backbone")

    RunFolder(tmp_path).publish(0, write(0))
    for where in (tmp_path, tmp_path / "task-1", "owner/name"):
        with held(tmp_path), pytest.raises(ValueError, match="another backbone"):
            settled(where, None, refuse)
    assert len(calls) == 3
