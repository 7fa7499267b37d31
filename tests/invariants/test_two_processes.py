"""One process with batch 4 and two processes with batch 2 each are the same run."""

from __future__ import annotations

import json
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file
from two_processes import work

pytestmark = pytest.mark.usefixtures("without_figures")


def launch(folder: Path, processes: int, batch: int, method: str) -> None:
    """Start processes as `torchrun` would."""
    folder.mkdir()
    codes = forks.together(processes, lambda rank: work(folder, batch, method), folder / "log")
    assert not any(codes), [log.read_text()[-3000:] for log in folder.glob("log.*")]


@pytest.mark.parametrize(
    "method", ["functional", *(pytest.param(m, marks=pytest.mark.slow) for m in ("pgp", "surprises"))]
)
def test_one_process_is_two_processes(tmp_path, method):
    launch(tmp_path / "one", 1, 4, method)
    launch(tmp_path / "two", 2, 2, method)
    one = json.loads((tmp_path / "one" / "rank-0.json").read_text())
    two = [json.loads((tmp_path / "two" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert one["processes"] == 1 and [r["processes"] for r in two] == [2, 2]
    assert one["samples"] == two[0]["samples"] == two[1]["samples"]
    for task in ("task-1", "task-2", "task-3"):
        a, b = (load_file(tmp_path / run / task / "adapter_model.safetensors") for run in ("one", "two"))
        assert a.keys() == b.keys() and any(name.endswith("_statistics.means") for name in a)
        for name in a:
            size = float(a[name].abs().max()) if name.endswith(("scatter", "calibration")) else 1.0  # sums over images
            assert torch.allclose(a[name], b[name], atol=2e-4 * size), (task, name)
        a, b = (load_file(tmp_path / run / task / "projection.safetensors") for run in ("one", "two"))
        for name in a:
            assert a[name].shape == b[name].shape
            assert torch.allclose(a[name] @ a[name].mT, b[name] @ b[name].mT, atol=1e-2)
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two")]
    assert results[0]["heads"] == results[1]["heads"]
    assert max(abs(x - y) for x, y in zip(results[0]["drift"], results[1]["drift"], strict=True)) < 1e-3
