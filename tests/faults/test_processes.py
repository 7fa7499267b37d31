"""Processes of a data-parallel run: they agree, or say what they do not agree on, before they wait for each other."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bytes_sent
import forks
import kills
import pytest
import stories
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

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


def test_one_process_resumes_and_the_other_does_not(tmp_path):
    def work(rank: int) -> None:
        tiny.trainer(tmp_path / "run", **FEW).train(True if rank else None)

    assert forks.together(2, work, tmp_path / "log") == [1, 1]
    for log in logs(tmp_path / "log"):
        assert (
            "do not agree on how to begin: resume_from_checkpoint=None on process 0, resume_from_checkpoint=True"
            in log
        )


def test_a_folder_that_is_not_shared(tmp_path):
    def work(rank: int, resume: bool) -> None:
        trainer = tiny.trainer(tmp_path / f"machine-{rank}", **FEW)
        trainer.train(True) if resume else trainer.train_task(0)

    assert forks.together(2, lambda rank: work(rank, False), tmp_path / "log") == [0, 0]
    assert forks.together(2, lambda rank: work(rank, True), tmp_path / "log") == [1, 1]
    for log in logs(tmp_path / "log"):
        assert "the run to go on with: 1 finished tasks and no checkpoint on process 0, 0 finished" in log
        assert "must be one folder, shared by all machines" in log
    shutil.rmtree(tmp_path / "machine-1", ignore_errors=True)
    shutil.copytree(tmp_path / "machine-0", tmp_path / "machine-1")
    assert forks.together(2, lambda rank: work(rank, True), tmp_path / "log") == [0, 0]


def test_a_step_sends_gradients_alone(tmp_path):
    def trainer(folder: Path) -> object:
        return tiny.trainer(folder, model=tiny.model(head="statistics"), compensate_drift=True, **few)

    few = {**FEW, "save_strategy": "no"}  # a checkpoint sends random states
    sent = bytes_sent.measure(trainer, tmp_path / "run")
    assert 0 <= sent["steps"] / sent["optimizer_steps"] - sent["trainable"] < 64  # counts, unused parameters
    assert sent["model"] < sent["begin"]  # the model, once for each task


class Dies(TrainerCallback):
    """Die at the end of a step, counted over all tasks."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def several(count: int, folder: Path, before: Callable[[int], object] = bool, **settings: Any) -> list[int]:
    """Train or go on in several processes, each of which does something `before`; return their exit codes."""
    resume = stories.begun(folder)  # which a process must not decide by itself

    def work(rank: int) -> None:
        own = [found] if isinstance(found := before(rank), TrainerCallback) else []
        model = {"head": "statistics"}
        trainer = stories.known(folder, "l2p", model, resume, compensate_drift=True, callbacks=own, **settings)
        trainer.accelerator.wait_for_everyone()
        trainer.end()

    return forks.together(count, work, folder.with_name("log"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_is_killed(tmp_path, rank):
    """The main process at file operations, the other, which has none, at steps."""
    settings = {"per_device_train_batch_size": 2, "save_steps": 1}
    (tmp_path / "straight").mkdir()
    assert several(2, tmp_path / "straight" / "run", **settings) == [0, 0]
    straight = kills.content(tmp_path / "straight" / "run")
    for number in (1, 3, 6, 10, 12):
        folder = tmp_path / f"{number}" / "run"
        folder.parent.mkdir()

        def kill(own: int, number: int = number, folder: Path = folder) -> object:
            if own == rank == 0:
                return kills.kill_at(30 * number, folder, "within" if number % 2 else "before")
            return Dies(number) if own == rank else None

        codes = several(2, folder, kill, **settings)
        assert codes[rank] == -9 and codes[1 - rank] != 0
        assert several(2, folder, **settings) == [0, 0], both_logs(folder)
        assert kills.content(folder) == straight, number


def both_logs(folder: Path) -> str:
    return "\n".join(logs(folder.with_name("log")))[-3000:]


@pytest.mark.slow
def test_one_two_and_four_processes(tmp_path):
    """One run, whatever number of processes share its batches: to the precision of sums in another order."""
    runs = {}
    for count in (1, 2, 4):
        folder = tmp_path / str(count) / "run"
        folder.parent.mkdir()
        assert several(count, folder, per_device_train_batch_size=4 // count) == [0] * count, both_logs(folder)
        runs[count] = folder
    for count in (2, 4):
        for task in ("task-1", "task-2", "task-3"):
            one, other = (load_file(runs[i] / task / "adapter_model.safetensors") for i in (1, count))
            assert one.keys() == other.keys()
            for name, tensor in one.items():
                size = float(tensor.abs().max()) if name.endswith("scatter") else 1.0  # a sum over images
                assert torch.allclose(tensor, other[name], atol=2e-4 * size), (count, task, name)
            one, other = (load_file(runs[i] / task / "projection.safetensors") for i in (1, count))
            for name, basis in one.items():
                assert torch.allclose(basis @ basis.mT, other[name] @ other[name].mT, atol=1e-2), (count, task, name)
        one, other = (json.loads((runs[i] / "results.json").read_text()) for i in (1, count))
        assert one["heads"] == other["heads"] and one["images_trained"] == other["images_trained"]
        assert max(abs(x - y) for x, y in zip(one["drift"], other["drift"], strict=True)) < 1e-3
