"""How the cost of a task grows: what is measured, the exponents, and a run that goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from pgp_hf.benchmark import growth, growth_points
from pgp_hf.benchmark.growth_points import SECONDS, Point, measure

SMALL = Point(tasks=3, classes=1, images=2, pool=4, length=2, pixels=16, width=12)


def test_a_task_is_divided_into_its_parts():
    with tiny.without_figures():
        found = measure(SMALL)
    assert len(found["tasks"]) == 3 and all(one > 0 for task in found["tasks"] for one in task.values())
    assert list(found["seconds"]) == list(SECONDS)
    for part, seconds in found["seconds"].items():
        assert seconds == min(task[part] for task in found["tasks"][:2])  # the last one writes a checkpoint
    files = found["bytes"]
    assert files["checkpoint"] > files["adapter"] > 3 * 12 * 4  # float32 weights of the head
    assert (
        files["whole run"] > 4 * (files["adapter"] + files["bases"] + files["other files"]) * 0.9
    )  # and the top level


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 16.0, 256.0], 2.0),
        ([7.0, 7.0, 7.0], 0.0),
        ([4.0, 1.0, 4.0], 1.0),
        ([1.0, 8.0, 8.0], 1.5),  # what is steep ends, and counts
    ],
)
def test_the_exponent_is_the_steepest_over_a_factor_of_four(values, expected):
    assert growth.exponent([1, 4, 16], values) == pytest.approx(expected)


def fake(point):
    """Return costs that grow with the tasks: statistics by the square, evaluation by the first power."""
    t = point.tasks
    seconds = {"training": 2.0, "statistics": 0.1 * t**2, "evaluation": 0.1 * t, "files": 1.0}
    return {"seconds": seconds, "memory": 10**7 * t, "bytes": {"adapter": 1000 * t, "whole run": 10**6 * t**2}}


def test_a_run_goes_on_and_says_what_grows_faster(tmp_path, monkeypatch, capsys):
    measured = []

    def measure_alone(point):
        measured.append(point.tasks)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return fake(point)

    points = [replace(SMALL, tasks=tasks) for tasks in (2, 4, 8)]
    monkeypatch.setattr(growth, "measure_alone", measure_alone)
    monkeypatch.setattr(growth, "QUICK", (replace(growth.SWEEPS[0], points=points),))
    argv = ["--quick", "--output_dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        growth.main(argv)
    assert growth.main(argv) == 0
    assert measured == [2, 4, 8, 8]  # what was measured is kept
    monkeypatch.setattr(growth.platform, "python_version", lambda: "3.99")
    assert growth.main(argv) == 0 and measured == [2, 4, 8, 8, 2, 4, 8]  # but not compared with what others measured
    printed = capsys.readouterr().out
    assert "| statistics, ms | 400 | 1,600 | 6,400 | 2.00 | 0 | FASTER |" in printed
    assert "| evaluation, ms | 200 | 400 | 800 | 1.00 | 1 |  |" in printed
    assert "| whole run, MB | 4.0 | 16.0 | 64.0 | 2.00 | 2 |  |" in printed
    assert "Faster than expected: tasks: statistics." in printed
    content = json.loads((tmp_path / "growth.json").read_text())
    assert content["tasks"]["sizes"] == [2, 4, 8] and not content["tasks"]["measures"]["statistics"]["met"]
    assert {"growth.png", "growth.svg"} < {file.name for file in tmp_path.iterdir()}
    damaged = tmp_path / "points" / f"{points[1].label}.json"
    damaged.write_text("{")
    with pytest.raises(ValueError, match=rf"{damaged.name} is damaged: delete it"):
        growth.main(argv)


@pytest.mark.parametrize("argv", [["--sweeps", "colours"], ["--sweeps", "tasks", "colours"]])
def test_an_unknown_quantity_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        growth.parse(argv)
    assert "--sweeps 'colours': expected the beginning of one of 'tasks', 'classes'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        growth.parse([*argv, "--quick"])
    assert "one of 'tasks'\n" in capsys.readouterr().err


def test_an_output_that_cannot_be_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(growth, "measure_alone", None)
    with pytest.raises(OSError, match="file/points"):
        growth.main(["--quick", "--output_dir", str(tmp_path / "file")])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the process is forked")
def test_a_process_that_is_killed_is_an_error(monkeypatch):
    monkeypatch.setattr(growth_points, "measure", lambda point: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="could not be learned"):
        growth_points.measure_alone(SMALL)
    monkeypatch.setattr(growth_points, "measure", lambda point: {"point": point.tasks})
    assert growth_points.measure_alone(SMALL) == {"point": 3}


@pytest.mark.slow
def test_streams_are_learned_in_processes_of_their_own(tmp_path, capsys):
    with tiny.script(Path(__file__).parents[2] / "examples" / "benchmark.py") as script:
        assert script.main(["--growth", "--quick", "--output_dir", str(tmp_path)]) == 0
    assert len(list((tmp_path / "points").iterdir())) == 2
    assert "| evaluation, ms |" in capsys.readouterr().out
