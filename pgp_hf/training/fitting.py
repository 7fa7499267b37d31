"""Make batches fit into memory where `auto_find_batch_size` asks for it: in training, and in the passes outside of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from ..methods import ContinualMethod
from .arguments import PGPTrainingArguments
from .random_states import random_states, set_random_states

Value = TypeVar("Value")


class BatchSizes:
    """The number of images in a batch outside training.

    Args:
        args: of the run.
        found: returns the batch size of training, which `auto_find_batch_size` may have lowered.
    """

    def __init__(self, args: PGPTrainingArguments, found: Callable[[], int]) -> None:
        self._args, self._found = args, found
        self._most: int | None = None  # since larger batches did not fit

    @property
    def training(self) -> int:
        """Return that of training, which also leaves memory for backward passes."""
        return self._fitting(self._found())

    @property
    def evaluation(self) -> int:
        """Return that of evaluation, for forward passes alone."""
        return self._fitting(self._args.eval_batch_size)

    def _fitting(self, size: int) -> int:
        return size if self._most is None else min(size, self._most)

    def fit(
        self, run: Callable[[], Value], size: Callable[[], int] | None = None, undo: Callable[[], None] | None = None
    ) -> Value:
        """Return what `run` does; with `auto_find_batch_size`, halve the batches each time that they do not fit.

        In several processes nothing is tried again: the others would wait for one that begins anew.

        Args:
            run: passes over images in batches of these sizes; it may be called again.
            size: returns the size of those batches; that of evaluation by default.
            undo: takes back what a call that failed may have done.
        """
        size = size or (lambda: self.evaluation)
        while True:
            try:
                return run()
            except RuntimeError as error:
                again = self._args.auto_find_batch_size and self._args.world_size == 1 and size() > 1
                if not (again and should_reduce_batch_size(error)):
                    raise
            clear_device_cache(garbage_collection=True)
            warnings.warn(
                f"{size()} images in a batch do not fit into memory outside training: trying {size() // 2}.",
                stacklevel=2,
            )
            self._most = size() // 2
            if undo is not None:
                undo()


def remember(method: ContinualMethod) -> Callable[[], None]:
    """Return a function that gives a method back what it remembers now; the bases of a projection change all at once."""
    state = copy.deepcopy(method.state())
    return lambda: method.load_state(copy.deepcopy(state))


class Beginning:
    """What the training of a task begins with, for a `Trainer` that begins again with smaller batches.

    Steps may have been taken by then, and random numbers drawn.
    """

    def __init__(self, model: nn.Module, method: ContinualMethod, optimizer: Any, accelerator: Accelerator) -> None:
        self._tensors = [
            (tensor, tensor.detach().cpu().clone())
            for tensor in chain(model.parameters(), model.buffers())
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        ]
        self._method, self._device = remember(method), accelerator.device
        self._optimizer, self._state = optimizer, None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        self._random = random_states(accelerator.device)

    @torch.no_grad()
    def restore(self) -> Any:
        """Go back to it; return the optimizer, None if it is yet to be made."""
        for tensor, before in self._tensors:
            tensor.copy_(before)
        self._method()
        if self._optimizer is not None:
            self._optimizer.load_state_dict(self._state)
        set_random_states(self._random, self._device)
        return self._optimizer
