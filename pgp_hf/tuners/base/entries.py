"""Give each task an entry of its own among a tuner's parameters: used by that task alone, and never moved after it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .layer import uniform
from .model import PromptTuner


class EntryConfig(Protocol):
    """Fields that the configuration of a `TaskEntryTuner` has besides those of `PromptConfig`.

    Attributes:
        pool_size: number of entries.
        grow_pool: whether a stream with more tasks enlarges the pool.
        learned_entries: number of entries that tasks have used so far, None before the first.
    """

    pool_size: int
    grow_pool: bool
    learned_entries: int | None


class TaskEntryTuner(PromptTuner):
    """A tuner with parameters whose entries, along one axis, belong to tasks; its configuration is an `EntryConfig`."""

    _task: int | None = None
    _kept: list[Tensor] | None = None

    @abstractmethod
    def _entries(self) -> Iterator[tuple[nn.ParameterDict, int]]:
        """Yield the containers of such parameters, with the axis of the entries in each."""

    def _fresh(self, *shape: int) -> Tensor:
        """Draw the initial values of new entries."""
        return uniform(*shape)

    @property
    def _entry_config(self) -> EntryConfig:
        return cast(EntryConfig, self.adapter_config)

    def prepare_stream(self, tasks: list[list[int]], names: Mapping[int, str]) -> None:
        """Check that every task has an entry, or enlarge the pool.

        Raises:
            ValueError: more tasks than entries, without `grow_pool`.
        """
        super().prepare_stream(tasks, names)
        config = self._entry_config
        if len(tasks) <= config.pool_size:
            return
        if not config.grow_pool:
            raise ValueError(
                f"{len(tasks)} tasks need as many entries, pool_size={config.pool_size}: set pool_size={len(tasks)}, "
                "or grow_pool=True to enlarge the pool."
            )
        self.grow(len(tasks))

    @torch.no_grad()
    def grow(self, pool_size: int) -> None:
        """Enlarge the pool to `pool_size` entries; existing entries keep their values."""
        name, config = self.adapter, self._entry_config
        extra = pool_size - config.pool_size
        for container, axis in self._entries():
            old = container[name]
            fresh = self._fresh(*(extra if i == axis else size for i, size in enumerate(old.shape))).to(old)
            container[name] = nn.Parameter(torch.cat([old, fresh], axis), requires_grad=old.requires_grad)
        config.pool_size = pool_size

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        """Use the entry of the 0-based task from now on.

        Raises:
            ValueError: there is no such entry.
        """
        super().begin_task(task)
        config = self._entry_config
        if task >= config.pool_size:
            raise ValueError(
                f"task {task + 1} has no entry: pool_size={config.pool_size}, set it to at least {task + 1}."
            )
        self._task, config.learned_entries = task, task + 1
        self._start_entry(task)

    def training_starts(self) -> None:
        """Note the values of all entries, which those of other tasks keep."""
        # not in `begin_task`: a checkpoint that is loaded after it brings other values
        self._kept = [container[self.adapter].detach().clone() for container, _ in self._entries()]

    def _start_entry(self, task: int) -> None:
        """Set the values that a task's entry starts from."""

    def resume_after(self, task: int) -> None:
        super().resume_after(task)
        self._task, self._entry_config.learned_entries = None, task + 1

    @torch.no_grad()
    def after_step(self) -> None:
        """Restore the entries of other tasks, which momentum or weight decay may have moved.

        Raises:
            RuntimeError: `begin_task` or `training_starts` has not been called.
        """
        if self._kept is None or self._task is None:
            raise RuntimeError(
                "begin_task() and training_starts() come before the first step: they note which entry learns, and the "
                "values of the others."
            )
        name = self.adapter
        for (container, axis), kept in zip(self._entries(), self._kept, strict=True):
            parameter = container[name]
            current = parameter.select(axis, self._task).clone()
            parameter.copy_(kept)
            parameter.select(axis, self._task).copy_(current)
