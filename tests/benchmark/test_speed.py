"""`examples/benchmark.py --speed`: what is counted, which rows the bars are about, and the table."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.nn import functional as F

from pgp_hf.benchmark import speed
from pgp_hf.benchmark.contenders import Setting, counting


def test_products_of_attention_count_on_a_cpu():
    batch, heads, tokens, width = 2, 3, 5, 8
    query, key, value = (torch.randn(batch, heads, tokens, width, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * tokens * tokens * width
    with counting() as counter:
        found = F.scaled_dot_product_attention(query, key, value)
    assert counter.get_total_flops() == 2 * product
    with counting() as counter:
        found.sum().backward()
    assert counter.get_total_flops() == 5 * product  # the first is computed again


def timed(seconds, flops=100, memory=10):
    return speed.Timing(seconds=[seconds], flops=flops, memory=memory)


def test_bars_are_about_the_rows_with_all_savings():
    training = {
        speed.PLAIN: timed(1.6, 150, 20),
        speed.LIVE: timed(1.6, 140),
        speed.LIVE + speed.READ: timed(1.6, 130, 20),
        speed.CACHED: timed(1.25, 110),
        speed.CACHED + speed.READ: timed(1.0, 100, None),
        speed.UNPROJECTED: timed(1.25, 110),
    }
    evaluation = {
        speed.PLAIN: timed(2.0, 60),
        speed.CACHED: timed(1.0, 30),
        speed.CACHED + speed.READ: timed(1.0, 25),
    }
    found = {bar.what.split(":")[0]: bar for bar in speed.bars(training, evaluation, "ti", rate=109.375)}
    cached = found["training, ours, cached, last block read"]
    assert cached.met is True
    assert cached.shown == "1.60 times (1.28 at defaults; by the number of operations 1.50)"
    assert found["training, ours, live, last block read"].met is False
    assert found["evaluation, ours, cached, last block read"].shown.startswith("2.00 times (2.00 at defaults; by ")
    assert found["peak memory, ours, live"].shown == "0.50 of it"
    assert found["peak memory, ours, live, last block read"].met is False
    assert found["peak memory, ours, cached, last block read"].met is None
    assert found["projection, ours, cached"].shown == "0.0 %"
    assert (found["matrix-product rate, ours, live"].met, found["matrix-product rate, ours, live"].shown) == (
        True,
        "80.0%",
    )


def test_the_report_has_a_row_for_each():
    setting = Setting("tiny", 8, torch.device("cpu"), pixels=32)
    training = {name: timed(1.0, 50) for name in speed.TRAINING}
    evaluation = {name: timed(0.5, 50) for name in speed.EVALUATION}
    lines = speed.report(setting, training, evaluation, 100.0, argparse.Namespace(threads=1))
    rows = [line for line in lines if line.startswith("| ours")]
    assert len(rows) == 8 and "| ours, live, last block read | 8.0 | ± 0.0% | 1.00 | 50% | 0 MiB |" in rows[1]
    assert sum("last_block" in row for row in rows) == 3
    assert lines[1] == "## a tiny ViT, 32 px, 8 images a step, float32, CPU, 1 thread"


@pytest.mark.parametrize("option", ["--rounds 0", "--steps 0", "--threads 0", "--pixels 8", "--batch 8 -1"])
def test_numbers_are_checked(option, capsys):
    with pytest.raises(SystemExit):
        speed.parse(option.split())
    assert f"argument {option.split()[0]}: " in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs(capsys):
    assert speed.main("--models tiny --pixels 32 --rounds 2 --device cpu --threads 1".split()) == 0
    printed = capsys.readouterr().out
    assert printed.count("| ours") == 7 and "evaluation, ours, cached, last block read" in printed
