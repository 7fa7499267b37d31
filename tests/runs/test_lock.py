"""One process at a time writes to a folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from pgp_hf.runs import lock
from pgp_hf.runs.lock import HOLDER, LOCK, held, is_held

HOLD = """
import os, sys, time
from pathlib import Path
from pgp_hf.runs.lock import held
with held(Path(sys.argv[1])):
    child = os.fork() if len(sys.argv) > 2 else None  # as a worker of a data loader
    if child != 0:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Start a process that holds `tmp_path / "run"`; return it, and the pid of a child that it forks if it is to."""
    started = []

    def start(*more):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), *more], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_who_comes_second_is_told_who_is_there(other, tmp_path):
    process, _ = other()
    with pytest.raises(ValueError, match="run is being written by process") as caught, held(tmp_path / "run"):
        pass
    for said in (f"process {process.pid} on {socket.gethostname()} since ", "another output_dir"):
        assert said in str(caught.value)
    assert is_held(tmp_path / "run")
    # a lock that its holder has left behind is taken over
    process.kill()
    process.wait()
    assert (tmp_path / "run" / HOLDER).exists() and not is_held(tmp_path / "run")
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / HOLDER).exists()


def test_a_forked_child_does_not_keep_it(other, tmp_path):
    process, forked = other("fork")
    child = int(forked)
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is alive
        with held(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_ends_leaves_it_to_its_parent(tmp_path):
    with held(tmp_path):
        child = os.fork()
        if not child:
            try:
                with held(tmp_path):  # it does not hold what its parent holds
                    os._exit(1)
            except ValueError:
                os._exit(0)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        code = "import sys; from pathlib import Path; from pgp_hf.runs.lock import held\nwith held(Path(sys.argv[1])): pass"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 1 and f"process {os.getpid()} on" in done.stderr


def test_a_process_may_hold_it_several_times(tmp_path):
    with held(tmp_path / "a" / "run"):
        with held(tmp_path / "a" / ".." / "a" / "run"), held(tmp_path / "a" / "run"):
            assert {path.name for path in (tmp_path / "a" / "run").iterdir()} == {LOCK, HOLDER}
        assert (tmp_path / "a" / "run" / HOLDER).exists()
    assert not (tmp_path / "a").exists()  # nothing was written there
    (tmp_path / "b").mkdir()
    with pytest.raises(KeyboardInterrupt), held(tmp_path / "b"):
        raise KeyboardInterrupt
    assert list((tmp_path / "b").iterdir()) == []


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.FileLock, "acquire", fail)
    with pytest.warns(UserWarning, match="cannot lock files .*No locks available.*no other process"), held(tmp_path):
        (tmp_path / "a").write_text("written")
    monkeypatch.setattr(lock.FileLock, "acquire", lambda *args, **kwargs: os.stat(tmp_path / "lost"))
    with pytest.raises(FileNotFoundError), held(tmp_path):
        pass


def test_the_number_of_a_dead_process_may_be_anothers_now(tmp_path, other):
    noted = {"host": socket.gethostname(), "pid": os.getpid(), "began": "now"}
    (tmp_path / HOLDER).write_text(json.dumps(noted))
    assert not is_held(tmp_path)  # this process holds nothing
    process, _ = other()
    path = tmp_path / "run" / HOLDER
    noted = json.loads(path.read_text())
    assert noted["pid"] == process.pid and is_held(tmp_path / "run")
    if "started" not in noted:
        pytest.skip("the system does not tell when a process started")
    path.write_text(json.dumps({**noted, "started": "1"}))
    assert not is_held(tmp_path / "run")


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        ({"host": "elsewhere", "pid": 1, "began": "now"}, True),  # nobody here can say
        ({"host": socket.gethostname(), "pid": 2**22 + 1, "began": "now"}, False),
        ({"host": socket.gethostname(), "pid": "x", "began": "now"}, False),
        ({"pid": 1}, False),
        (None, False),
    ],
)
def test_who_holds_it_is_told_from_what_is_noted(tmp_path, noted, expected):
    if noted is not None:
        (tmp_path / HOLDER).write_text(json.dumps(noted))
    assert is_held(tmp_path) is expected
    with held(tmp_path):  # whatever is noted, the lock itself is free
        assert is_held(tmp_path)
