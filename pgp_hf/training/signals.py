"""Stop on SIGTERM, SIGHUP and Ctrl-C: within a task once the step in hand is saved, and else at once."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import distributed
from torch.utils.data import get_worker_info
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..report.formatting import fill
from ..runs.checkpoint import checkpoints, has_states
from ..runs.folder import RunFolder
from ..runs.lock import held
from .accelerating import OwnState
from .callbacks import ends_epoch

Handler = Callable[[int, FrameType | None], Any]
P = ParamSpec("P")
R = TypeVar("R")

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
PATIENCE = 2.0
"""Seconds in which a signal that comes again is the same one: a launcher passes on what its group has received as well."""
_GO_ON = (
    "Go on by train(resume_from_checkpoint=True), or learn(..., resume_from_checkpoint=True) for a task that it was called "
    "with; on a command line by the same command with --resume_from_checkpoint true."
)
_ours: list[Handler] = []  # the handlers that are set, the innermost last


class Interrupted(SystemExit, KeyboardInterrupt):
    """End the program with the code of SIGINT; whoever catches a KeyboardInterrupt catches it."""


def ending(signum: int) -> SystemExit:
    """Return the exception that ends the program after a signal."""
    return (Interrupted if signum == signal.SIGINT else SystemExit)(128 + signum)


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Handle the signals during the block, in the main thread, where Python handles them.

    One that is ignored, as SIGHUP is under nohup, or that the program handles itself, stays as it is.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)
            own = (signal.SIG_DFL, signal.default_int_handler, *_ours)
            if number is not None and signal.getsignal(number) in own:
                before[number] = signal.signal(number, handler)
    _ours.append(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
        _ours.remove(handler)


def in_child(process: int, signum: int) -> bool:
    """Return whether a handler runs in a child that has inherited it by a fork, such as a worker of a data loader.

    A child ends as it would without the handler. The main process ends the workers of data loaders, which go on until then.
    """
    if os.getpid() == process:
        return False
    if signum != signal.SIGINT and get_worker_info() is None:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
    return True


@contextlib.contextmanager
def leaving(main: bool = True) -> Iterator[None]:
    """Leave at once on a signal, with its code, but run `finally` blocks first; the main process says how to go on."""
    process = os.getpid()

    def leave(signum: int, frame: FrameType | None) -> None:
        if in_child(process, signum):
            return
        if main:
            print(fill(f"{signal.Signals(signum).name}: stopped at once. {_GO_ON}"), file=sys.stderr, flush=True)
        raise ending(signum)

    with handled(leave):
        yield


class StopOnSignal(TrainerCallback):
    """Note a signal in training until the processes agree on it at the end of a step; leave at once at other times.

    A second signal leaves at once at any time.

    Args:
        folder: of the run.
        main: whether this process writes there.

    Attributes:
        depth: number of calls of `holding` methods within each other.
        received: number of the first signal, 0 before.
        agreed: number of the signal that all processes know of, 0 before.
        saved: steps of the newest checkpoint that this call has written.
    """

    def __init__(self, folder: RunFolder, main: bool) -> None:
        self.folder, self.main = folder, main
        self.depth = 0
        self._group: Any = None  # of the processes
        self._reset()

    def _reset(self) -> None:
        self.received = self.agreed = 0
        self.saved: int | None = None
        self._since = 0.0
        self._in_steps = self._boundary = self._left = False
        self._children: Any = None  # handler of SIGCHLD

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Hold the folder during the block, and stop on signals."""
        if self.depth:
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1
            return
        with contextlib.ExitStack() as stack:
            if self.main:
                stack.enter_context(held(self.folder.root))
                self.folder.sweep()
            self._reset()
            self._process = os.getpid()
            stack.enter_context(handled(self._handle))
            stack.callback(self._restore)
            self.depth, failed = 1, ""
            try:
                yield
            except Exception as error:
                if not self.received:
                    raise
                # such as of a data loader whose worker the signal has ended, or of a checkpoint that cannot be written
                failed = f", with {type(error).__name__}: {error}"
                raise ending(self.received) from error
            finally:
                self.depth = 0
                if self.received and not self._left:
                    self._say(f"at once{failed.rstrip('.')}.{self._what_stands()}")

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if in_child(self._process, signum):
            return
        first = not self.received
        again = not first and time.monotonic() - self._since > PATIENCE
        if first:
            self.received, self._since = signum, time.monotonic()
        if again or (first and not self._in_steps):
            raise ending(signum)
        if first and hasattr(signal, "SIGCHLD"):
            # torch's handler would raise within the step for workers that received the signal as well
            self._children = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _restore(self) -> None:
        if self._children is not None:
            signal.signal(signal.SIGCHLD, self._children)

    # ---- within a task -------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._group is None and distributed.is_available() and distributed.is_initialized() and args.world_size > 1:
            self._group = distributed.new_group(backend="gloo")  # on the CPU: no step waits for a GPU

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._in_steps = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.agreed = self._agree()
        self._boundary = not ends_epoch(state, control)  # an evaluation may follow

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._boundary = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._in_steps = False
        if self.received:
            raise ending(self.received)

    def _agree(self) -> int:
        """Return the largest number of a signal that a process has received."""
        if self._group is None:
            return self.received
        received = torch.tensor(self.received)
        try:
            distributed.all_reduce(received, distributed.ReduceOp.MAX, group=self._group)
        except RuntimeError:  # another process has left already
            if self.received:
                raise ending(self.received) from None
            raise
        return int(received)

    def is_due(self) -> bool:
        """Return whether to save and to leave, now that a step or an epoch has ended."""
        if self._group is None:  # it may have come during an evaluation
            self.agreed = self.received
        return self._boundary and self.agreed > 0

    def leave(self, state: TrainerState, checkpoint: Path) -> None:
        """Say how to go on, and raise the exception that ends the program."""
        self.received, self._left = self.agreed, True
        self._say(f"after step {state.global_step} of {state.max_steps}, which is saved in {checkpoint}.")
        raise ending(self.agreed)

    # ---- what is said --------------------------------------------------------------------------------------------

    def _say(self, what: str) -> None:
        if self.main:
            print(fill(f"{signal.Signals(self.received).name}: stopped {what} {_GO_ON}"), file=sys.stderr, flush=True)

    def _what_stands(self) -> str:
        """Describe by their names what the run has written: reading it takes longer than a process may have left."""
        if not self.main:
            return ""
        try:
            finished = self.folder.finished_tasks()
            following = finished or self.folder.first
        except ValueError:  # a damaged file, which resuming reports
            return ""
        checkpoint = next(filter(has_states, checkpoints(self.folder.checkpoints(following))), None)
        if checkpoint is not None:
            return f" The last checkpoint is {checkpoint}."
        return (
            f" The last finished task is {self.folder.task(finished - 1)}."
            if finished
            else " Nothing was finished yet."
        )


class _Holds(Protocol):
    stops: StopOnSignal
    _own_state: OwnState


T = TypeVar("T", bound=_Holds)


def holding(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Make a trainer's method hold the run's folder while it runs, in the state of its own accelerator, and stop on signals."""

    @functools.wraps(method)
    def run(self: T, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._own_state.current(), self.stops.around():
            return method(self, *args, **kwargs)

    return run
