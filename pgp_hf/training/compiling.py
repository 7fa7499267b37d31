"""Compile the frozen blocks of a model where `compile_trunk` asks for it, and refuse what cannot be compiled."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import StreamModel
from ..tuners.base.compiled import Trunk, compiled, first_line
from .fitting import BatchSizes

P = ParamSpec("P")
R = TypeVar("R")
_FIX = (
    "torch.compile needs a C++ compiler such as g++ on a CPU, Triton on a GPU, and a Python that this torch knows. Install "
    "what is missing, or leave compile_trunk out"
)


def make_trunk(wanted: bool, learner: StreamModel, sizes: BatchSizes, device: torch.device) -> Trunk | None:
    """Return the blocks to compile; None where nothing asks for it.

    Raises:
        ValueError: a model without frozen blocks, or a machine on which nothing can be compiled.
    """
    if not wanted:
        return None
    if not isinstance(getattr(learner, "blocks", None), nn.ModuleList):
        raise ValueError(
            f"compile_trunk=True is for prompts on a frozen backbone, and this model is {learner.name!r}: leave it out."
        )
    model: Any = learner
    for block in model.blocks:
        own = block.__dict__.get("forward")
        if own is not None and getattr(own, "__func__", None) is not type(block).forward:
            raise ValueError(
                f"compile_trunk=True: a {type(block).__name__} of this model has a forward of its own, such as a device_map "
                "puts there: load the backbone without it, or leave compile_trunk out."
            )
    check_compiler(device)
    return Trunk(lambda: model.blocks, lambda: (sizes.training, sizes.evaluation))


def check_compiler(device: torch.device) -> None:
    """Raise ValueError unless something can be compiled here; it takes a few seconds."""
    if not hasattr(torch._dynamo.config, "recompile_limit"):
        raise ValueError(
            f"compile_trunk=True needs torch 2.7 or newer, and this is {torch.__version__}: install it, or leave "
            "compile_trunk out."
        )
    # of the moment, since nothing would be compiled again that the disk holds
    number = 1 + time.time_ns() % 10**9 / 1e9
    try:
        compiled(_trial)(torch.ones(64, device=device), number)
    except Exception as error:
        raise ValueError(f"compile_trunk=True: nothing can be compiled here ({first_line(error)}): {_FIX}.") from error


def _trial(values: Tensor, number: float) -> Tensor:
    return F.gelu(values) * number


class _HasTrunk(Protocol):
    _trunk: Trunk | None


T = TypeVar("T", bound=_HasTrunk)


def compiling(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Make a trainer's method run with its compiled trunk, if it has one."""

    @functools.wraps(method)
    def run(self: T, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._trunk is None:
            return method(self, *args, **kwargs)
        with self._trunk.running():
            return method(self, *args, **kwargs)

    return run
