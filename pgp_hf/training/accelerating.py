"""Keep trainers of one process apart: accelerate has a single state for all of them, with the precision and the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from accelerate.state import AcceleratorState

P = ParamSpec("P")
R = TypeVar("R")


class OwnState:
    """Keep what accelerate's state was when a trainer's accelerator was made.

    Training arguments that are made later clear that state, and another trainer's accelerator replaces it: this trainer
    would then fail, or compute in the precision of the other.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    @contextmanager
    def making(self, precision: str) -> Iterator[None]:
        """Let the block make an accelerator of this precision, also where the process has one of another precision."""
        shared: dict[str, Any] = AcceleratorState._shared_state
        if shared.get("_mixed_precision", precision) != precision:
            shared.clear()  # accelerate would refuse a second precision
        yield
        self._kept = dict(shared)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let accelerate have the trainer's state during the block, and the one before it afterwards."""
        shared: dict[str, Any] = AcceleratorState._shared_state
        if shared == self._kept:
            yield
            return
        before = dict(shared)
        _put(self._kept)
        try:
            yield
        finally:
            _put(before)


def _put(state: Mapping[str, Any]) -> None:
    """Give accelerate a state in place, since each of its objects refers to that dictionary."""
    AcceleratorState._shared_state.clear()
    AcceleratorState._shared_state.update(state)


class _HasState(Protocol):
    _own_state: OwnState


T = TypeVar("T", bound=_HasState)


def in_own_state(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Make a trainer's method run in the state of its own accelerator."""

    @functools.wraps(method)
    def run(self: T, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._own_state.current():
            return method(self, *args, **kwargs)

    return run
