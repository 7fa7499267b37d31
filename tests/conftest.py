"""What every test runs under: no network, one thread, a fixed seed."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hugging Face libraries are imported

import pytest
import torch
from sparing import freeze, spare

for _number, _handler in (
    ("SIGINT", signal.default_int_handler),
    ("SIGTERM", signal.SIG_DFL),
    ("SIGHUP", signal.SIG_DFL),
):
    # a shell that runs the tests in the background has them ignore some, and a run leaves that as it is
    if hasattr(signal, _number) and signal.getsignal(getattr(signal, _number)) == signal.SIG_IGN:
        signal.signal(getattr(signal, _number), _handler)
torch.set_num_threads(1)
spare()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def without_figures():
    """Draw no figure in a module; the value is the function that does."""
    import tiny

    with tiny.without_figures() as draw:
        yield draw


def pytest_collection_finish() -> None:
    freeze()
