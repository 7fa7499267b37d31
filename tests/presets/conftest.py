"""Fixtures of the tests of presets."""

from __future__ import annotations

import datasets
import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep what `datasets` reads out of the user's cache, whose entry for a folder with a README.md can be outdated."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
