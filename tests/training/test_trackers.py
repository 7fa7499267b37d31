"""What TensorBoard and trackio have of a stream that was interrupted, by their own readers."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest
import tiny
from test_tracking import STEPS, StopAt


def scalars(folder):
    """What TensorBoard shows of the one run in a folder: by tag, the steps and values."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    shown = EventMultiplexer(size_guidance={"scalars": 0, "images": 0})
    shown.AddRunsFromDirectory(str(folder))
    shown.Reload()
    ((run, tags),) = shown.Runs().items()
    values = {tag: [(one.step, one.value) for one in shown.Scalars(run, tag)] for tag in tags["scalars"]}
    return run, values, {tag: [one.step for one in shown.Images(run, tag)] for tag in tags["images"]}


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra `track`")
def test_tensorboard_shows_a_stream_that_was_interrupted(tmp_path):
    settings = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3, "report_to": "tensorboard"}
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(tmp_path, callbacks=[StopAt(1, 7)], **settings).train()
    assert scalars(tmp_path)[1]["train/loss"][-1][0] == STEPS + 6
    trainer = tiny.trainer(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)
    run, shown, images = scalars(tmp_path)
    assert run == "runs/stream"
    assert [step for step, _ in shown["train/loss"]] == list(range(2, 3 * STEPS + 1, 2))  # none twice
    assert shown["train/loss"][-1][1] == pytest.approx(trainer.state.log_history[-3]["loss"])
    averages = trainer.results.to_dict()["per_task_average_accuracy"]
    assert shown["eval/average_accuracy"] == [(STEPS * t, pytest.approx(averages[t - 1])) for t in (1, 2, 3)]
    assert shown["by_task/average_accuracy"] == [(t, pytest.approx(averages[t - 1])) for t in (1, 2, 3)]
    tasks = dict(shown["train/task"])
    assert [tasks[step] for step in (2, STEPS, STEPS + 2, 3 * STEPS)] == [1, 1, 2, 3]
    assert images["figures/accuracy_matrix"][-1] == 3 * STEPS
    again = tiny.trainer(
        tmp_path, **settings, overwrite_output_dir=True, num_train_epochs=1, stream=tiny.stream(num_tasks=2)
    )
    again.train()
    assert [step for step, _ in scalars(tmp_path)[1]["eval/average_accuracy"]] == [6, 12]  # the earlier run is gone


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra `track`")
def test_of_several_processes_the_first_reports(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import tiny\n"
        "trainer = tiny.trainer('out', report_to='tensorboard', logging_steps=2, per_device_train_batch_size=2)\n"
        "assert trainer.args.world_size == 2\n"
        "trainer.train()\n"
        "trainer.accelerator.end_training()\n"
    )
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    several = ["--multi_gpu", "--main_process_port", "0", "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "out").rglob("events.out.tfevents.*"))) == 1
    _, shown, images = scalars(tmp_path / "out")
    assert [step for step, _ in shown["train/loss"]] == list(range(2, 3 * STEPS + 1, 2))
    assert images["figures/accuracy_matrix"][-1] == 3 * STEPS


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs the extra `track`")
def test_trackio_has_one_run_that_goes_on(tmp_path):
    """In a process of its own, since trackio decides on import where it writes."""
    code = """
import sys, tiny
from test_tracking import StopAt
settings = {"logging_steps": 4, "save_strategy": "steps", "save_steps": 4, "report_to": "trackio"}
try:
    tiny.trainer("out", callbacks=[StopAt(1, 5)], **settings).train()
except KeyboardInterrupt:
    pass
tiny.trainer("out", **settings).train(resume_from_checkpoint=True)
"""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, metrics from metrics order by id").fetchall()
    logged = [json.loads(metrics) for _, metrics in rows]
    assert len({run for run, _ in rows}) == 1 and rows[0][0].startswith("out-")
    assert [row["train/global_step"] for row in logged if "train/loss" in row] == [4, 8, 12, 16, 20, 24]
    found = [(row["train/task"], row["train/global_step"]) for row in logged if "eval/average_accuracy" in row]
    assert found == [(1, 8), (2, 16), (3, 24)]
    images = [row for row in logged if "figures/accuracy_matrix" in row]
    assert images[-1]["train/task"] == 3
    kept = tmp_path / "trackio" / "media" / images[-1]["figures/accuracy_matrix"]["file_path"]
    assert kept.read_bytes() == (tmp_path / "out" / "task-3" / "figures" / "accuracy_matrix.png").read_bytes()
