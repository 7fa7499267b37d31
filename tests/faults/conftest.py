"""Forked children do what this process would do again and again: figures and warnings are left out, modules are there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import tiny


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Draw no figures, and import what a run imports lazily, so that forked children find it."""
    with tiny.without_figures(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.trainer(tmp_path_factory.mktemp("first"), num_train_epochs=1, stream=tiny.stream(num_tasks=1)).train()
        yield
