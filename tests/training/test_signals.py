"""SIGTERM, SIGHUP and Ctrl-C: the step in hand is saved, and the resumed run is the straight one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pgp_hf.runs.folder import RunFolder
from pgp_hf.training import signals

pytestmark = pytest.mark.usefixtures("without_figures")

SCRIPT = Path(__file__).with_name("signalled.py")


class SignalAt(TrainerCallback):
    """Send a signal to this process at an event of a task, as often as is said."""

    def __init__(self, task, step, signum, event="on_pre_optimizer_step", times=1):
        self.task, self.step, self.signum, self.times = task, step, signum, times
        self.seen = []
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs):
        if self.trainer.task == self.task and state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((self.trainer.task, state.global_step))


def trainer(folder, callback=None, **settings):
    settings = {"augmentation": "crop_flip", "save_strategy": "no", **settings}
    made = tiny.trainer(folder, callbacks=[callback] if callback else [], **settings)
    if callback:
        callback.trainer = made
    return made


def tensors(folder):
    return {
        f"{path.relative_to(folder)}:{name}": value
        for t in (1, 2, 3)
        for path in sorted((folder / f"task-{t}").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def assert_same(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and a and [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    with tiny.without_figures():
        trainer(folder).train()
    return folder


@pytest.mark.parametrize(  # 4 steps an epoch, 8 a task
    ("name", "task", "step"),
    [
        ("SIGTERM", 0, 0),
        ("SIGINT", 1, 3),
        ("SIGHUP", 2, 7),
        *(pytest.param(name, 1, 2, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGHUP", "SIGINT")),
    ],
)
def test_the_step_in_hand_is_saved(straight, tmp_path, capsys, name, task, step):
    signum = getattr(signal, name)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    stopped = SignalAt(task, step, signum)
    with pytest.raises(SystemExit) as caught:
        trainer(tmp_path, stopped).train()
    assert caught.value.code == 128 + signum
    assert isinstance(caught.value, KeyboardInterrupt) == (name == "SIGINT")
    assert stopped.seen[-1] == (task, step + 1)  # no step later
    checkpoint = RunFolder(tmp_path).last_checkpoint(task)
    assert checkpoint.name == f"checkpoint-{step + 1}"
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name}: stopped after step {step + 1} of 8, which is saved in {checkpoint}" in said
    assert "train(resume_from_checkpoint=True)" in said and "--resume_from_checkpoint true" in said
    assert {number: signal.getsignal(number) for number in before} == before
    assert not list(tmp_path.glob(".run.lock*"))
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert_same(tmp_path, straight)


def test_a_learned_task_goes_on_after_a_signal(tmp_path):
    data = tiny.data()
    parts = [data.filter(lambda label, own=own: label in own, input_columns="label") for own in ((0, 1), (2, 3))]

    def made(folder, callback=None):
        from pgp_hf import TaskStream

        with tiny.seeded(5):
            model = tiny.model("l2p", kind="backbone")
        return trainer(folder, callback, model=model, stream=TaskStream.empty(seed=0))

    whole = made(tmp_path / "whole")
    for part in parts:
        whole.learn(part)
    stopped = made(tmp_path / "run", SignalAt(1, 4, signal.SIGTERM))
    stopped.learn(parts[0])
    with pytest.raises(SystemExit):
        stopped.learn(parts[1])
    again = made(tmp_path / "run")
    for part in parts:
        again.learn(part, resume_from_checkpoint=True)
    for t in (1, 2):
        ours, theirs = (load_file(tmp_path / run / f"task-{t}/adapter_model.safetensors") for run in ("run", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("phase", tiny.some_of(["_predict", "_write_task", "_passes", "_start"], "_write_task"))
def test_outside_of_steps_it_leaves_at_once(straight, tmp_path, monkeypatch, capsys, phase):
    made, calls = trainer(tmp_path, save_strategy="epoch"), []
    before = getattr(made, phase)

    def interrupted(*args):
        calls.append(made.task)
        if made.task == 1 or phase == "_start":
            os.kill(os.getpid(), signal.SIGTERM)
            calls.append("went on")
        return before(*args)

    monkeypatch.setattr(made, phase, interrupted)
    with pytest.raises(SystemExit) as caught:
        made.train()
    assert caught.value.code == 143 and "went on" not in calls
    told = capsys.readouterr().err
    assert max(len(line) for line in told.splitlines() if str(tmp_path) not in line) <= 100
    said = " ".join(told.split())
    assert "SIGTERM: stopped at once." in said and "resume_from_checkpoint=True" in said
    newest = RunFolder(tmp_path).last_checkpoint(1)
    stands = {"_start": "Nothing was finished yet", "_passes": str(tmp_path / "task-1")}.get(phase, str(newest))
    assert stands in said
    trainer(tmp_path, save_strategy="epoch").train(resume_from_checkpoint=True)
    assert_same(tmp_path, straight)


def test_one_signal_twice_is_one_and_later_it_leaves_at_once(tmp_path, monkeypatch):
    """A launcher passes on what its group has received; whoever repeats it after a while does not want to wait."""
    with pytest.raises(SystemExit):
        trainer(tmp_path / "a", SignalAt(0, 2, signal.SIGINT, times=3)).train()
    assert RunFolder(tmp_path / "a").last_checkpoint(0).name == "checkpoint-3"
    monkeypatch.setattr(signals, "PATIENCE", -1.0)
    stopped = SignalAt(0, 2, signal.SIGTERM, times=2)
    with pytest.raises(SystemExit) as caught:
        trainer(tmp_path / "b", stopped).train()
    assert caught.value.code == 143 and stopped.seen[-1] == (0, 2)
    assert RunFolder(tmp_path / "b").last_checkpoint(0) is None


@pytest.mark.parametrize("step", [3, 5])  # the last of an epoch, and another
def test_an_evaluation_that_is_due_is_done_before(tmp_path, step):
    """The history of a resumed run has every evaluation once."""
    settings = {"eval_strategy": "epoch" if step == 3 else "steps", "eval_steps": 2}

    def history(trainer):
        return [
            (one["step"], sorted(one)) for one in trainer.state.log_history if any("eval_" in name for name in one)
        ]

    whole = trainer(tmp_path / "whole", **settings)
    whole.train_task(0)
    stopped = SignalAt(0, step, signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer(tmp_path / "run", stopped, **settings).train()
    again = trainer(tmp_path / "run", stream=tiny.stream(), **settings)

    class Leave(TrainerCallback):
        def on_task_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    again.add_callback(Leave())
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=True)
    assert history(again) == history(whole) and history(whole)


def launch(folder, processes, workers=0):
    """Start `signalled.py` without a launcher, in a group of its own; return what each process ended with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        own = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
        started.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder), str(workers)],
                env={**os.environ, **common, **(own if processes > 1 else {})},
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    said = [process.communicate(timeout=200)[1] for process in started]
    return [process.returncode for process in started], said


@pytest.mark.slow
def test_two_processes_leave_together_when_one_is_signalled(tmp_path):
    codes, said = launch(tmp_path, 2)
    assert codes == [143, 143], said
    assert [text.count("SIGTERM: stopped after step 3 of 8") for text in said] == [1, 0]  # said by the main process
    assert_same(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.slow  # the same in one process is above
def test_workers_that_the_signal_ends_do_not_disturb_the_step(tmp_path):
    codes, said = launch(tmp_path, 1, workers=1)
    assert codes == [143], said
    assert "SIGTERM: stopped after step 3 of 16, which is saved" in said[0]
    assert_same(tmp_path / "stopped", tmp_path / "straight")


def test_handlers_of_others_stay(tmp_path):
    received = []
    earlier = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum)),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # as under nohup
    }
    try:
        for signum in earlier:
            trainer(tmp_path / str(signum), SignalAt(0, 2, signum), num_train_epochs=1).train()
            assert (tmp_path / str(signum) / "task-3").is_dir()
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)
    assert received == [signal.SIGTERM]


class Act(TrainerCallback):
    """Call a function within the third step of the first task."""

    def __init__(self, act):
        self.act = act

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.act()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("how", ["steps", "leaving"])
def test_a_forked_child_ends_as_without_a_handler(tmp_path, name, how):
    ended = []

    def fork():
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, getattr(signal, name))
        for _ in range(100):
            if os.waitpid(child, os.WNOHANG)[0]:
                ended.append(True)
                return
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    if how == "steps":
        tiny.trainer(tmp_path, callbacks=[Act(fork)], max_steps=3).train_task(0)
    else:
        with signals.leaving():
            fork()
    assert ended == [True]


def test_an_error_after_a_signal_is_said(tmp_path, monkeypatch, capsys):
    """Such as of a checkpoint for which the disk has no space: the reason for which nothing is saved."""
    made = trainer(tmp_path, SignalAt(0, 2, signal.SIGTERM))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made, "_write_checkpoint", full)
    with pytest.raises(SystemExit) as caught:
        made.train()
    assert caught.value.code == 143
    said = capsys.readouterr().err
    assert "SIGTERM: stopped at once, with OSError: [Errno 28] No space left on device. Nothing was finished" in said


@pytest.mark.slow
def test_a_model_alone_is_saved_with_its_states_for_a_signal(straight, tmp_path):
    settings = {"save_only_model": True, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(SystemExit):
        trainer(tmp_path, SignalAt(0, 2, signal.SIGTERM), **settings).train()
    again = trainer(tmp_path, stopped := SignalAt(9, 0, 0), **settings)
    again.train(resume_from_checkpoint=True)
    assert stopped.seen[0] == (0, 4)
    assert_same(tmp_path, straight)


def test_what_is_said_at_once_needs_no_file_to_be_whole_or_read(tmp_path, monkeypatch, capsys):
    made = trainer(tmp_path, save_strategy="epoch")

    def interrupted(*args):
        (tmp_path / "continued.json").write_text("{")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(made, "_write_task", interrupted)
    with pytest.raises(SystemExit) as caught:
        made.train()
    assert caught.value.code == 143 and "SIGTERM: stopped at once. Go on by" in capsys.readouterr().err
    monkeypatch.setattr(RunFolder, "last_checkpoint", None)  # it reads all files
    (tmp_path / "continued.json").unlink()
    newest = tmp_path / "checkpoints" / "task-1" / "checkpoint-8"
    assert made.stops._what_stands() == f" The last checkpoint is {newest}."
    made.stops.main = False
    assert not made.stops._what_stands()


def test_a_trainer_in_a_thread_leaves_signals_alone(tmp_path):
    thread = threading.Thread(target=trainer(tmp_path, num_train_epochs=1).train)
    thread.start()
    thread.join()
    assert (tmp_path / "task-3").is_dir()


def test_an_option_that_would_end_tasks_early_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint=True .* leave it False"):
        tiny.arguments(tmp_path, enable_jit_checkpoint=True)
