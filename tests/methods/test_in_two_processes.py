"""One process with batch 4 and two processes with batch 2 each are the same run, and remember the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("in_two_processes.py")


def launch(folder, processes, method):
    folder.mkdir()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), str(4 // processes), method],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"rank-{rank}-of-{processes}.safetensors") for rank in range(processes)]


@pytest.mark.slow  # projected prompts in two processes are in the default tests
@pytest.mark.parametrize("method", ["bic", "der_mcg", "derpp", "ewc", "gpm", "icarl", "lwf", "null_space_adam"])
def test_one_process_is_two_processes(tmp_path, method):
    (one,), two = launch(tmp_path / "one", 1, method), launch(tmp_path / "two", 2, method)
    assert one.keys() == two[0].keys() == two[1].keys() and (one or method == "lwf")
    for name, tensor in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        found = two[0][name]
        if name.endswith(".basis"):  # of eigenvectors, the span counts
            tensor, found = tensor @ tensor.mT, found @ found.mT
        assert torch.allclose(tensor, found, rtol=1e-2, atol=1e-4), name
    assert "places" not in one or torch.equal(one["places"], two[0]["places"])
    (file,) = {path.name for path in (tmp_path / "one" / "task-2").glob("*model.safetensors")}
    a, b = (load_file(tmp_path / run / "task-2" / file) for run in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
