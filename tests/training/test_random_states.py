"""Random states are kept and given back, a row for each process, without drawing a number."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pgp_hf.training.random_states import (
    gather_random_states,
    random_states,
    same_random_states,
    scatter_random_states,
    set_random_states,
)

CPU = torch.device("cpu")


def draw():
    """Numbers of every generator; of normal ones, a pair is made at a time."""
    return (
        *(random.random(), random.gauss(0, 1), random.getrandbits(70)),
        *(np.random.rand(), np.random.normal(), int(np.random.randint(2**40))),
        *(float(torch.rand(())), float(torch.randn(())), torch.randperm(9).tolist()),
    )


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def process(rank, count):
    def gather(tensor):
        raise AssertionError("one process gathers nothing")

    return SimpleNamespace(
        process_index=rank, num_processes=count, device=CPU, is_main_process=rank == 0, gather=gather
    )


@pytest.mark.parametrize("drawn", range(4))
def test_numbers_go_on(drawn):
    seed(drawn)
    for _ in range(drawn):  # an odd number leaves one of a pair
        random.gauss(0, 1)
        np.random.normal()
        torch.randn(())
    kept = random_states(CPU)
    expected = [draw() for _ in range(3)]
    seed(100)
    set_random_states(kept, CPU)
    assert [draw() for _ in range(3)] == expected


def test_keeping_them_draws_nothing():
    seed(5)
    expected = draw()
    seed(5)
    gather_random_states(process(0, 1))
    assert draw() == expected


def test_numbers_drawn_within_a_block_are_as_if_they_were_not():
    seed(5)
    expected = draw()
    seed(5)
    with pytest.raises(KeyError), same_random_states(CPU):
        draw()
        raise KeyError
    assert draw() == expected


def test_each_process_gets_its_own_row():
    rows, expected = [], []
    for rank in range(3):
        seed(rank)
        rows.append(random_states(CPU))
        expected.append(draw())
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    for rank in (2, 0, 1):
        scatter_random_states(stacked, process(rank, 3))
        assert draw() == expected[rank]


def test_another_number_of_processes_is_warned_of():
    rows = gather_random_states(process(0, 1))
    with pytest.warns(UserWarning, match="written by 1 processes, and now there are 2.*dropout"):
        scatter_random_states(rows, process(0, 2))
    scatter_random_states(rows, process(1, 2))  # the main process has said so


def test_another_generator_of_numpy_is_named(monkeypatch):
    monkeypatch.setattr(np.random, "get_state", lambda legacy: {"bit_generator": "PCG64"})
    with pytest.raises(ValueError, match="NumPy's global generator is a PCG64"):
        random_states(CPU)
