"""Files that appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from pgp_hf.runs.atomic import replacing


def test_a_write_that_fails_names_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("earlier")
    with pytest.raises(OSError, match=rf"\[Errno 28\] .*: '{path}'"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, os.strerror(28))  # as a write has it where the disk is full
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(PermissionError, match="'other'"), replacing(path):
        raise PermissionError(13, "Permission denied", "other")
