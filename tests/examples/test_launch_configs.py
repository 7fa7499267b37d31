"""The configurations of accelerate in `examples/configs`: the commands of their README run, and give one result."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "configs"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.yaml"))
COMMANDS = re.findall(r"^accelerate (launch .*)$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
IMAGES = 8  # of a step, by all processes


def small(processes: int, folder: Path) -> list[str]:
    settings = {
        "num_tasks": 2,
        "max_train_samples_per_class": 8,  # of five classes: a multiple of the images of a step
        "max_eval_samples_per_class": 4,
        "num_train_epochs": 1,
        "no_compare": "true",
        "optim": "sgd",
        "learning_rate": 0.05,  # prompts move by far more than rounding does
        "per_device_train_batch_size": IMAGES // processes,
        "output_dir": folder,
    }
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def movement(run: Path) -> dict[str, torch.Tensor]:
    """Return what the second task changed in the prompts, and in all weights."""
    before, after = (load_file(run / f"task-{t}" / "adapter_model.safetensors") for t in (1, 2))
    moved = {name: (after[name].double() - before[name].double()).flatten() for name in sorted(after)}
    prompts = [change for name, change in moved.items() if "prompt" in name.rpartition(".")[2]]
    return {"prompt": torch.cat(prompts), "all": torch.cat(list(moved.values()))}


def test_every_configuration_is_in_the_readme_and_loads():
    assert {path for path in CONFIGS if f"configs/{path}" not in "".join(COMMANDS)} == set()
    for name in CONFIGS:
        config = load_config_from_file(str(FOLDER / name))
        assert config.num_processes >= config.num_machines


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_files_and_options(command):
    given = launch_command_parser().parse_args(shlex.split(command)[1:])
    assert (ROOT / given.config_file).is_file() and (ROOT / given.training_script).is_file()


@pytest.mark.slow
def test_commands_of_the_readme_give_one_result(tmp_path):
    """All of them, on CPUs: one process, two on one machine, and two machines, which are two launchers here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    here = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    started = {}
    for command in COMMANDS:
        config = Path(launch_command_parser().parse_args(shlex.split(command)[1:]).config_file)
        words, processes = shlex.split(command), load_config_from_file(str(ROOT / config)).num_processes
        processes = min(processes, 2)
        at = words.index(next(word for word in words if word.endswith(".py")))
        place = here if "machine_rank" in command else ["--main_process_port", "0"]
        own = [*words[:at], *place, "--num_processes", str(processes)]
        output = tmp_path / config.stem
        log = (tmp_path / f"log {len(started)}").open("w+")
        run = [sys.executable, "-m", "accelerate.commands.launch", *own[1:], words[at], *small(processes, output)]
        started[command] = subprocess.Popen(run, cwd=ROOT, env=environment, stdout=log, stderr=log), log
        if "machine_rank" not in command or "machine_rank 1" in command:  # the machines run together, all others alone
            for process, written in started.values():
                assert process.wait(timeout=250) == 0, (written.seek(0), written.read()[-3000:])
    one, *others = (tmp_path / Path(name).stem for name in CONFIGS)
    assert len(others) == 2
    results = json.loads((one / "results.json").read_text())
    learned = movement(one)
    assert learned["prompt"].norm() > 1e-4
    for other in others:
        found = json.loads((other / "results.json").read_text())
        assert found["accuracy_matrix"] == results["accuracy_matrix"], other
        for kind, moved in movement(other).items():
            assert (moved - learned[kind]).norm() < 0.01 * learned[kind].norm(), (other, kind)
