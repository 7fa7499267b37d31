"""Tests that need an accelerator: they compare it with the CPU, and are skipped without one.

    python -m pytest -m gpu -n 0 tests/gpu

They take a minute. `substitute.py` makes a second device on the CPU, on which they run as well: see there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import substitute
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="no CUDA device: these compare it with the CPU")
    for item in items:
        if HERE in item.path.parents and not (torch.cuda.is_available() or substitute.active()):
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """Multiply in float32 where float32 is asked for: convolutions would use TF32, with three digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def device() -> torch.device:
    """Return the accelerator, which the runs of a test take unless they ask for the CPU."""
    substitute.choose(on_cpu=False)
    return torch.device(substitute.NAME if substitute.active() else "cuda")
