"""The table of what the end of a task costs."""

from __future__ import annotations

import itertools

import torch

from pgp_hf.benchmark import speed_statistics
from pgp_hf.benchmark.contenders import Setting


def test_costs_are_those_of_a_whole_task_beside_pgp(monkeypatch):
    """By a clock that counts how often it is read, four times in a task: a second for the bases, and two for 8 images."""
    monkeypatch.setattr(speed_statistics, "ADAPTERS", ("DualPrompt",))
    ticks = itertools.count()
    setting = Setting("tiny", 4, torch.device("cpu"), pixels=32)
    lines = speed_statistics.table(setting, 1, lambda: float(next(ticks)), batches=2)
    rows = lines[5:]
    assert lines[3].startswith("| end of a task of 500 images |") and len(rows) == 4
    assert all(line.endswith("| 126.00 s | 1.00 | 126.00 s | 1.00 |") for line in rows)
    assert rows[0].startswith("| DualPrompt, pgp |") and rows[3].startswith("| DualPrompt, functional, bf16")
    assert next(ticks) == 2 * 4 * 2 * 4


@torch.no_grad()
def test_images_pass_as_often_as_the_trainer_passes_them():
    setting, passes = Setting("tiny", 4, torch.device("cpu"), pixels=32), {}
    for name, head in (("pgp", "statistics"), ("functional", "statistics"), ("functional, bf16_probes", "statistics")):
        end = speed_statistics.TaskEnd(setting, "L2P", head, speed_statistics.PROJECTIONS[name], lambda: 0.0, 2)
        seen = passes[name] = []
        end.tuner.watch_features(lambda features, seen=seen: seen.append(len(features)))
        end()
    assert [sum(seen) for seen in passes.values()] == [8, 8, 16]
