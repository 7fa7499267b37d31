"""The queue of uploads by itself: order, patience, and staying out of the way."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from unittest import mock

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from loopback import environment

from pgp_hf.hub import queue
from pgp_hf.hub.queue import Refused, Uploads, explain, is_transient


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(queue, "LONGEST_PAUSE", 0.02)


class Recorder:
    """`put` that fails as told: `plan[t]` holds the errors of the attempts at task t."""

    def __init__(self, **plan: list[Exception]) -> None:
        self.plan = {int(name[1:]): list(errors) for name, errors in plan.items()}
        self.calls: list[int] = []
        self.said: list[str] = []

    def __call__(self, t: int) -> None:
        self.calls.append(t)
        if self.plan.get(t):
            raise self.plan[t].pop(0)

    def uploads(self, prepare=lambda: None, **kwargs) -> Uploads:
        return Uploads(prepare, self, notify=self.said.append, **kwargs)


def test_tasks_go_in_order_and_once():
    put = Recorder()
    uploads = put.uploads()
    uploads.add(0)
    assert uploads.wait(5) and put.calls == []
    uploads.add(2)
    assert uploads.wait(5) and put.calls == [0, 1]
    uploads.add(1)  # fewer than before changes nothing
    uploads.add(4)
    assert uploads.wait(5) and put.calls == [0, 1, 2, 3]
    assert uploads.done == 4 and uploads.error is None and put.said == []


def test_waiting_without_an_end():
    begun, done = threading.Event(), threading.Event()
    uploads = Uploads(lambda: None, lambda t: (begun.set(), done.wait(5)))
    uploads.add(1)
    assert begun.wait(5)
    threading.Timer(0.05, done.set).start()
    assert uploads.wait(float("inf")) and uploads.done == 1


def test_later_tasks_wait_for_the_one_that_fails():
    put = Recorder(t1=[ConnectionError("reset"), TimeoutError(), ConnectionError("again")])
    uploads = put.uploads()
    uploads.add(3)
    assert uploads.wait(5)
    assert put.calls == [0, 1, 1, 1, 1, 2] and put.said == []


def test_preparation_is_retried_and_done_once():
    calls = []

    def prepare():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("refused")

    put = Recorder()
    uploads = put.uploads(prepare)
    uploads.add(2)
    assert uploads.wait(5) and len(calls) == 3 and put.calls == [0, 1]


def test_what_no_retry_changes_is_told_at_once_and_tried_again_with_the_next_task():
    put = Recorder(t0=[Refused("another run")])
    uploads = put.uploads()
    uploads.add(1)
    assert not uploads.wait(60)  # at once, not in a minute
    assert put.calls == [0] and len(put.said) == 1 and "another run" in put.said[0]
    assert isinstance(uploads.error, Refused)
    uploads.add(2)
    assert uploads.wait(5) and put.calls == [0, 0, 1] and len(put.said) == 1


def test_warnings_that_are_errors_do_not_end_the_queue():
    put = Recorder(t0=[Refused("no")])
    uploads = Uploads(lambda: None, put)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uploads.add(1)
        assert not uploads.wait(60)
        uploads.add(2)
        assert uploads.wait(5)


def test_wait_is_bounded_and_close_ends_the_retries():
    put = Recorder(t0=[ConnectionError("down")] * 10_000)
    uploads = put.uploads()
    uploads.add(1)
    assert not uploads.wait(0.1)
    uploads.close()
    uploads._thread.join(5)
    assert not uploads._thread.is_alive() and isinstance(uploads.error, ConnectionError)


def test_an_attempt_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr(queue, "ATTEMPT", 0.05)
    hang, calls = threading.Event(), []

    def put(t):
        calls.append(t)
        if len(calls) == 1:
            hang.wait(20)

    uploads = Uploads(lambda: None, put)
    uploads.add(1)
    assert uploads.wait(5) and calls == [0, 0]
    hang.set()


def test_training_random_numbers_are_not_touched(monkeypatch):
    import random

    random.seed(1)
    expected = random.Random(1).random()
    put = Recorder(t0=[ConnectionError("down")] * 3)
    uploads = put.uploads()
    uploads.add(1)
    assert uploads.wait(5) and random.random() == expected


def test_a_hung_upload_does_not_keep_the_program_from_ending(hub, home):
    script = (
        "import threading; from pgp_hf.hub.queue import Uploads; u = Uploads(lambda: threading.Event().wait(), print); "
        "u.add(1); print(u.wait(0.1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(hub, home), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n" and done.returncode == 0, done.stderr


def test_a_damaged_file_is_not_a_bad_network(tmp_path: Path):
    from pgp_hf.runs.folder import read_json

    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="damaged") as caught:
        read_json(tmp_path / "results.json")
    assert not is_transient(caught.value)
    with pytest.raises(json.JSONDecodeError) as caught:  # a gateway's page where the Hub's answer was expected
        json.loads("<html>")
    assert is_transient(caught.value)


@pytest.mark.parametrize(
    "status, transient",
    [(400, False), (401, False), (403, False), (404, False), (408, True), (409, True), (412, True), (429, True)]
    + [(status, True) for status in (500, 502, 503, 504)],
)
def test_answers_that_may_be_better_later(status, transient):
    answer = HfHubHTTPError("x", response=mock.MagicMock(status_code=status))
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = answer
    assert is_transient(answer) is is_transient(wrapped) is transient
    assert not is_transient(OfflineModeIsEnabled("x")) and "HF_HUB_OFFLINE" in explain(OfflineModeIsEnabled("x"))


def test_messages_never_hold_the_token():
    assert "hf_abc" not in explain(ValueError("bad header hf_abc"), "hf_abc")
