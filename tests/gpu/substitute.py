"""Make a second device on the CPU, so that tests for a GPU run where there is none.

    PGP_HF_SUBSTITUTE=1 python -m pytest -m gpu -n 0 tests/gpu

Its tensors are in the CPU's memory and its kernels the CPU's, yet an operation on tensors of two devices fails as it does
on a GPU, and so does `numpy()`. It needs a C++ compiler and ninja, and takes a minute to build.
"""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import torch

NAME = "substitute"
_built: Any = None


def active() -> bool:
    """Return True where the device is there."""
    return _built is not None


def let_wait(may: bool) -> None:
    """Let the host wait for the device, for a number or a shape that depends on numbers, or raise where it would."""
    _built.let_wait(may)


def choose(on_cpu: bool) -> None:
    """Let the runs to come take this device, where it is there, or the CPU."""
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if active() and not on_cpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = NAME


def _random_state(device: object = 0) -> torch.Tensor:
    return torch.get_rng_state()


def build() -> None:
    """Compile it, and make it the device that runs take."""
    global _built
    from torch.utils.cpp_extension import load

    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(NAME)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": _random_state,
        "set_rng_state": lambda state, device=0: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }.items():
        setattr(module, name, value)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    _built = load("pgp_hf_substitute", [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=["-O0"])


if os.environ.get("PGP_HF_SUBSTITUTE"):
    build()
