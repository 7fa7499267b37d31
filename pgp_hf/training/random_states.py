"""Keep the states of all random number generators as tensors, a row for each process."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this process's generators: Python's, NumPy's and torch's, on the CPU and on its device.

    Raises:
        ValueError: NumPy has a generator of another kind than its own.
    """
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    if legacy["bit_generator"] != "MT19937":
        raise ValueError(
            f"NumPy's global generator is a {legacy['bit_generator']}: a checkpoint keeps the default, MT19937. Leave "
            "np.random.set_bit_generator out."
        )
    found = {
        "python": torch.tensor([version, gauss is not None, *words]),
        "python.gauss": torch.tensor([gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"]]),
        "numpy.gauss": torch.tensor([legacy["gauss"]], dtype=torch.float64),
        "torch": torch.random.get_rng_state(),
    }
    generators: Any = getattr(torch, device.type, None)
    if hasattr(generators, "get_rng_state"):  # the CPU's lacks it
        found[device.type] = generators.get_rng_state().cpu()
    return found


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators to what `random_states` returned; those of another kind of device stay as they are."""
    version, drawn, *words = states["python"].tolist()
    random.setstate((version, tuple(words), float(states["python.gauss"]) if drawn else None))
    *key, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, float(states["numpy.gauss"])))
    torch.random.set_rng_state(states["torch"])
    if device.type in states:
        getattr(torch, device.type).set_rng_state(states[device.type])


@contextmanager
def same_random_states(device: torch.device) -> Iterator[None]:
    """Leave all generators after the block as they were before it."""
    before = random_states(device)
    try:
        yield
    finally:
        set_random_states(before, device)


def gather_random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the states of all processes, a row for each; every process has to take part."""
    own = random_states(accelerator.device)
    if accelerator.num_processes == 1:
        return {name: state[None] for name, state in own.items()}
    return {name: accelerator.gather(state[None].to(accelerator.device)).cpu() for name, state in own.items()}


def scatter_random_states(rows: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Set this process's generators to its row of what `gather_random_states` returned."""
    count, rank = len(rows["torch"]), accelerator.process_index
    if count != accelerator.num_processes and accelerator.is_main_process:
        warnings.warn(
            f"the checkpoint was written by {count} processes, and now there are {accelerator.num_processes}: random "
            "numbers that a model draws as it trains, such as those of dropout, differ from a run that was not stopped.",
            stacklevel=2,
        )
    # copied, since torch crashes on a state that does not begin where memory was allocated
    set_random_states({name: row[rank % count].clone() for name, row in rows.items()}, accelerator.device)
