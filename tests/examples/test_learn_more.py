"""The example in which classes arrive that nobody foresaw."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import datasets
import pytest
import tiny

from pgp_hf.cli.main import main
from pgp_hf.embedded import DIGIT_NAMES, digits

SCRIPT = Path(__file__).parents[2] / "examples" / "learn_more.py"


def few(images, per_class=3):
    """The first images of each class."""
    labels = images["label"]
    return images.select(
        sorted(i for c in range(10) for i in [i for i, label in enumerate(labels) if label == c][:per_class])
    )


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_story_is_told(tmp_path, capsys, without_figures):
    with tiny.script(SCRIPT) as script:
        script.digits = lambda: datasets.DatasetDict({name: few(rows) for name, rows in digits().items()})
        script.main(["--output_dir", str(tmp_path / "my runs"), "--seed", "1"])
    out = capsys.readouterr().out
    assert out.count("test images of each task") == 3 and "not measured" not in out
    assert "the training images of 6 digits are gone" in out and "the training images of 8 digits are gone" in out
    last = tmp_path / "my runs" / "third"
    matrix = results(last)["accuracy_matrix"]
    assert len(matrix) == 5 and None not in matrix[4] and results(last)["seed"] == 1
    for part in ("first", "second"):  # what was learned there is in the last run as it was
        for folder in (tmp_path / "my runs" / part).glob("task-*"):
            same = [(one / folder.name / "adapter_model.safetensors").read_bytes() for one in (last, folder.parent)]
            assert same[0] == same[1]
    assert results(last)["continues"]["tasks"] == 4

    command = next(line for line in out.splitlines() if "pgp-hf predict" in line)
    assert main(shlex.split(command)[1:]) == 0  # as it is printed
    named = [Path(line.partition(".png")[0]).name for line in capsys.readouterr().out.splitlines()]
    assert named == sorted(DIGIT_NAMES)


def test_help(capsys):
    with tiny.script(SCRIPT) as script, pytest.raises(SystemExit) as error:
        script.main(["--help"])
    told = capsys.readouterr().out
    assert error.value.code == 0 and "--output_dir" in told and "--seed" in told and "training images" in told


@pytest.mark.slow
def test_what_it_learns(tmp_path, without_figures):
    with tiny.script(SCRIPT) as script:
        script.main(["--output_dir", str(tmp_path)])
    first, last = (results(tmp_path / name)["accuracy_matrix"] for name in ("first", "third"))
    known, now, new = sum(first[2]) / 3, sum(last[4][:3]) / 3, last[4][3:]
    assert known > 95 and now > known - 5 and min(new) > 80
