"""Grow a tuner's pool of entries, and give each task an entry of its own: used by it alone, and never moved after it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ...heads.growing import generator
from .layer import uniform
from .model import PromptTuner


class EntryConfig(Protocol):
    """Fields that the configuration of a `TaskEntryTuner` has besides those of `PromptConfig`.

    Attributes:
        pool_size: number of entries to begin with.
        grow_pool: whether a stream that is known in advance, with more tasks, enlarges the pool.
        learned_entries: number of entries that tasks have used so far, None before the first.
        added_entries: number of entries that came with tasks that nobody foresaw, None for none.
        entries: number of entries there are.
    """

    pool_size: int
    grow_pool: bool
    learned_entries: int | None
    added_entries: int | None

    @property
    def entries(self) -> int: ...


class Draw(Protocol):
    """A function that draws initial values of a shape."""

    def __call__(self, *shape: int, generator: torch.Generator | None = None) -> Tensor: ...


@torch.no_grad()
def add_entries(
    containers: Iterable[tuple[nn.ParameterDict, int]],
    adapter: str,
    added: range,
    draw: Draw,
    seed: int | None = None,
) -> None:
    """Lengthen an adapter's parameters by entries; those that are there keep their values.

    Args:
        containers: of the parameters, with the axis of the entries in each.
        adapter: its name.
        added: indices of the new entries.
        draw: draws their values.
        seed: each new entry depends on it and its index alone; None to draw from the global generator.
    """
    own = [] if seed is None else [generator(seed, "entry", index) for index in added]
    for container, axis in list(containers):
        old = container[adapter]

        def shape(count: int, old: Tensor = old, axis: int = axis) -> tuple[int, ...]:
            return *old.shape[:axis], count, *old.shape[axis + 1 :]

        if seed is None:
            fresh = draw(*shape(len(added)))
        else:
            fresh = torch.cat([draw(*shape(1), generator=one) for one in own], axis)
        container[adapter] = nn.Parameter(torch.cat([old, fresh.to(old)], axis), requires_grad=old.requires_grad)


class TaskEntryTuner(PromptTuner):
    """A tuner with parameters whose entries, along one axis, belong to tasks; its configuration is an `EntryConfig`."""

    _task: int | None = None
    _kept: list[Tensor] | None = None

    @abstractmethod
    def _entries(self) -> Iterator[tuple[nn.ParameterDict, int]]:
        """Yield the containers of such parameters, with the axis of the entries in each."""

    def _fresh(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the initial values of new entries."""
        return uniform(*shape, generator=generator)

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
        if len(tasks) <= config.entries:
            return
        if not config.grow_pool:
            raise ValueError(
                f"{len(tasks)} tasks need as many entries, pool_size={config.entries}: set pool_size={len(tasks)}, "
                "or grow_pool=True to enlarge the pool."
            )
        self.grow(len(tasks))

    def grow(self, pool_size: int) -> None:
        """Enlarge the pool to `pool_size` entries; existing entries keep their values."""
        config = self._entry_config
        extra = range(config.entries, pool_size)
        add_entries(self._entries(), self.adapter, extra, self._fresh)
        config.pool_size += len(extra)

    def add_task(self, task: int, classes: Sequence[int], seed: int) -> None:
        """Add an entry for the 0-based task if all are taken, drawn by the seed and its index alone."""
        super().add_task(task, classes, seed)
        config = self._entry_config
        if task >= config.entries:
            extra = range(config.entries, task + 1)
            add_entries(self._entries(), self.adapter, extra, self._fresh, seed)
            config.learned_entries = config.learned_entries or config.entries  # prediction chooses as it did
            config.added_entries = (config.added_entries or 0) + len(extra)

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        """Use the entry of the 0-based task from now on.

        Raises:
            ValueError: there is no such entry.
        """
        super().begin_task(task)
        config = self._entry_config
        if task >= config.entries:
            raise ValueError(
                f"task {task + 1} has no entry: pool_size={config.entries}, set it to at least {task + 1}."
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

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Finish the 0-based task.

        Raises:
            RuntimeError: an entry of another task has moved.
        """
        super().end_task(task)
        if self._kept is None or self._task is None:
            return
        for (container, axis), kept in zip(self._entries(), self._kept, strict=True):
            others = [entry for entry in range(kept.shape[axis]) if entry != self._task]
            index = torch.tensor(others, dtype=torch.int64, device=kept.device)
            if not torch.equal(container[self.adapter].index_select(axis, index), kept.index_select(axis, index)):
                raise RuntimeError(
                    f"entries of other tasks than task {task + 1} have moved after the last step: an optimizer moves them in "
                    "the backward pass or in eval(), or a callback does. Leave that out."
                )
