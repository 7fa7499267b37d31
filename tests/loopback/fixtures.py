"""A loopback Hub and a process that talks to it.

`hub` is the server (`hub.repos["me/run"].files("task-1")`, `hub.fail(...)`), `python` runs code against it:

    answer = python("from pgp_hf import hub; result = hub.push(folder, 'me/run').present", folder=str(tmp_path))
    answer.value, answer.out
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import USERS, Python, environment
from .server import Hub


@pytest.fixture(scope="session")
def _server() -> Iterator[Hub]:
    server = Hub(USERS).start()
    yield server
    server.stop()


@pytest.fixture
def hub(_server: Hub) -> Hub:
    """The server, empty."""
    _server.repos.clear()
    _server.objects.clear()
    _server.requests.clear()
    _server.faults.clear()
    return _server


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`HF_HOME` of the second process."""
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="session")
def _python(_server: Hub, home: Path) -> Iterator[Python]:
    worker = Python(environment(_server, home), home / "log.txt")
    yield worker
    worker.stop()


@pytest.fixture
def python(_python: Python, hub: Hub) -> Python:
    """The second process; its Hub is `hub`, its user `me`, who also writes for the organisation `team`."""
    return _python
