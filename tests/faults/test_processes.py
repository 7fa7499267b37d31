"""Processes of a data-parallel run: they agree, or say what they do not agree on, before they wait for each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import forks
import pytest
import tiny

pytestmark = [pytest.mark.usefixtures("ready"), pytest.mark.timeout(1800)]
FEW = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}


def logs(log: Path) -> list[str]:
    return [path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*"))]


def test_other_images_on_a_process(tmp_path):
    def work(rank: int) -> None:
        stream = tiny.stream(dataset=tiny.data(seed=rank))
        tiny.trainer(tmp_path / "run", stream=stream, **FEW).train()

    assert forks.together(2, work, tmp_path / "log") == [1, 1]
    for log in logs(tmp_path / "log"):
        assert "ValueError: the processes do not agree on the images: 3 tasks with 48 training" in log
    assert not (tmp_path / "run" / "task-1").exists()


def test_a_folder_that_is_not_shared(tmp_path):
    def work(rank: int, resume: bool) -> None:
        trainer = tiny.trainer(tmp_path / f"machine-{rank}", **FEW)
        trainer.train(True) if resume else trainer.train_task(0)

    assert forks.together(2, lambda rank: work(rank, False), tmp_path / "log") == [0, 0]
    assert forks.together(2, lambda rank: work(rank, True), tmp_path / "log") == [1, 1]
    for log in logs(tmp_path / "log"):
        assert "the run to go on with: 1 finished tasks and no checkpoint on process 0, 0 finished" in log
        assert "must be one folder, shared by all machines" in log
    shutil.rmtree(tmp_path / "machine-1")
    shutil.copytree(tmp_path / "machine-0", tmp_path / "machine-1")
    assert forks.together(2, lambda rank: work(rank, True), tmp_path / "log") == [0, 0]
