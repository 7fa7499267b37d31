"""`from_pretrained` reads by functions that are handed in, so that the folder also works on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pgp_hf.projection
from pgp_hf.projection import Projection, ProjectionConfig, set_readers
from pgp_hf.projection.state import read_config, read_projection

ALONE = """
import sys
import projection
assert not any(name.split(".")[0] in ("pgp_hf", "transformers", "peft", "datasets", "accelerate") for name in sys.modules)
for kind in (projection.ProjectionConfig, projection.Projection):
    try:
        kind.from_pretrained("somewhere")
    except RuntimeError as error:
        assert "set_readers(config=..., projection=...)" in str(error) and "pgp_hf.projection" in str(error)
    else:
        raise AssertionError(kind)
projection.set_readers(config=lambda *args, **hub: (args, hub), projection=lambda *args, **hub: (hub, args))
assert projection.ProjectionConfig.from_pretrained("somewhere") == (("somewhere", None), {})
"""


@pytest.mark.parametrize("kind", [ProjectionConfig, Projection])
def test_arguments_are_passed_on(kind, monkeypatch):
    asked = {}

    def reader(name):
        def read(repo_or_dir, revision=None, **hub):
            asked[name] = repo_or_dir, revision, hub
            return name

        return read

    for handed in (read_config, read_projection):
        monkeypatch.setattr(handed, "reader", None)  # restored afterwards
    set_readers(config=reader("config"), projection=reader("projection"))
    expected = "config" if kind is ProjectionConfig else "projection"
    assert kind.from_pretrained("owner/run", "task-3", token="t") == expected
    assert asked == {expected: ("owner/run", "task-3", {"token": "t"})}


def test_the_package_hands_them_in(tmp_path):
    for kind in (ProjectionConfig, Projection):
        with pytest.raises(ValueError, match="not-there"):
            kind.from_pretrained(tmp_path / "not-there")


def test_the_folder_works_without_the_package(tmp_path):
    shutil.copytree(Path(pgp_hf.projection.__file__).parent, tmp_path / "projection")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
