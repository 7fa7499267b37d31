"""`pgp-hf push`, against a loopback Hub."""

from __future__ import annotations

import pytest
import tiny
from loopback.fixtures import _python, _server, home, hub, python  # noqa: F401 (fixtures)

from pgp_hf.cli.main import main

PUSH = "from pgp_hf.cli.main import main; result = main(['push', *argv])"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.finished_run(tmp_path_factory.mktemp("run"))


def test_tasks_are_uploaded_once(run, hub, python):  # noqa: F811
    done = python(PUSH, argv=[str(run), "me/run", "--private", "--base_model", "me/backbone"])
    assert done.value == 0
    lines = [f"task-{k} uploaded: {hub.url}/me/run/tree/task-{k}" for k in (1, 2, 3)]
    assert done.out.splitlines()[-3:] == lines and hub.repos["me/run"].private
    again = python(PUSH, argv=[str(run), "me/run", "--private", "--base_model", "me/backbone"])
    assert again.value == 0 and again.out.count("is there already") == 3


def test_refusals(tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/run"]) == 1
    assert capsys.readouterr().out.startswith(f"error: {tmp_path} holds no finished task")
    with pytest.raises(SystemExit) as error:
        main(["push", str(tmp_path)])
    assert error.value.code == 2 and "repo_id" in capsys.readouterr().err
