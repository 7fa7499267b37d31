"""A stream of one hundred tasks: bases stay orthonormal, and time, memory and bytes grow as they should."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
from safetensors.torch import load_file

from pgp_hf import ProjectionConfig

pytestmark = [pytest.mark.usefixtures("ready"), pytest.mark.timeout(3600)]


class Cost(NamedTuple):
    """What a task took: seconds of this process, the largest memory so far and the bytes of the task's folder."""

    seconds: float
    memory: int
    size: int


def learn(folder: Path, tasks: int, adapter: str, method: str) -> list[Cost]:
    """Learn tasks of one class each; return the cost of each."""
    settings = {"pool_size": tasks} if adapter == "dualprompt" else {"head": "statistics"}
    trainer = tiny.trainer(
        folder,
        model=tiny.model(adapter, base=tiny.backbone(num_labels=tasks), **settings),
        stream=tiny.stream(dataset=tiny.data(classes=tasks, train=2, test=1), num_tasks=tasks),
        projection=ProjectionConfig(method=method, energy=0.9, key_energy=0.9, probes=2),
        num_train_epochs=1,
        per_device_eval_batch_size=8,
        save_strategy="no",
        logging_strategy="no",
    )
    costs = []
    for t in range(tasks):
        started = time.process_time()
        trainer.train_task(t)
        size = sum(path.stat().st_size for path in trainer.folder.task(t).rglob("*"))
        costs.append(Cost(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, size))
    return costs


def check_bases(folder: Path, tasks: int) -> None:
    """Check that bases are orthonormal, that ranks never fall, and that each basis has the earlier one in its span."""
    earlier: dict[str, torch.Tensor] = {}
    for t in range(tasks):
        bases = load_file(folder / f"task-{t + 1}" / "projection.safetensors")
        for name, basis in bases.items():
            own = basis.double()
            found = own.mT @ own
            right = torch.diag_embed((found.diagonal(dim1=-2, dim2=-1) > 0.5).double())  # padded where ranks differ
            assert float((found - right).abs().max()) < 1e-6, (t, name)
            if name in earlier:
                before = earlier[name].double()
                assert before.shape[-1] <= own.shape[-1], (t, name)
                assert float((own @ (own.mT @ before) - before).abs().max()) < 1e-6, (t, name)
        earlier = bases
    ranks = json.loads((folder / "results.json").read_text())["projection_rank"]
    assert len(ranks) == tasks and ranks == sorted(ranks) and ranks[0] > 0


def check_growth(costs: list[Cost]) -> None:
    """Check that a task's files grow at most linearly with the tasks before it, and memory by little; times are shown."""
    tenth = len(costs) // 10
    parts = [costs[i : i + tenth] for i in (tenth, 5 * tenth, 9 * tenth)]
    first, middle, last = (sum(cost.size for cost in part) / tenth for part in parts)
    assert last - middle < 1.1 * max(middle - first, 0.1 * first), (first, middle, last)
    assert costs[-1].memory - costs[tenth].memory < 1024 * len(costs)  # KiB: less than 1 MiB a task


@pytest.mark.parametrize(
    "tasks, adapter, method",
    [
        (8, "l2p", "pgp"),
        pytest.param(100, "l2p", "pgp", marks=pytest.mark.slow),
        pytest.param(100, "l2p", "functional", marks=pytest.mark.slow),
        pytest.param(100, "dualprompt", "pgp", marks=pytest.mark.slow),
    ],
)
def test_many_tasks(tmp_path, tasks, adapter, method):
    costs = learn(tmp_path / "run", tasks, adapter, method)
    check_bases(tmp_path / "run", tasks)
    if tasks >= 100:
        check_growth(costs)
        shown = [costs[t] for t in (0, 9, 49, 99)]
        total = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
        print(f"{adapter} {method}: seconds, KiB and bytes of tasks 1, 10, 50, 100: {shown}; {total} bytes in all")
