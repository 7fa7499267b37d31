"""A memory of training images: which ones, and how the model saw them. The images themselves stay in the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Examples(NamedTuple):
    """Training images, named and described, on the CPU.

    Attributes:
        places: 0-based task and position within it, `(N, 2)`.
        labels: `(N,)`.
        logits: the model's scores when they were taken in, float32, `(N, C)`.
    """

    places: Tensor
    labels: Tensor
    logits: Tensor

    def at(self, rows: Tensor) -> Examples:
        """Return some of them, by their rows."""
        return Examples(*(part[rows] for part in self))


class Reservoir:
    """Keep a uniform sample of all examples that have been presented, however many come (Vitter, 1985).

    The example number i, counted from 0, takes slot i while there is room; then a slot j drawn from 0 to i, if there is
    such a slot. After n examples, each is kept with probability capacity / n. An image that is presented again counts
    again.

    Args:
        capacity: largest number of images.

    Attributes:
        examples: those that are kept; None before the first.
        presented: number of examples so far.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.examples: Examples | None = None
        self.presented = 0

    def __len__(self) -> int:
        return 0 if self.examples is None else len(self.examples.labels)

    def add(self, examples: Examples, key: Sequence[int]) -> None:
        """Present examples, in their order.

        Args:
            examples: not changed, and not kept alive.
            key: integers of which the draws are a function.
        """
        numbers = np.arange(self.presented, self.presented + len(examples.labels))
        drawn = np.random.default_rng(key).integers(numbers + 1)
        slots = np.where(numbers < self.capacity, numbers, drawn)
        taken = {int(slot): row for row, slot in enumerate(slots) if slot < self.capacity}  # the last one stays
        self.presented += len(numbers)
        if not taken:
            return
        size = min(self.presented, self.capacity)
        if self.examples is None:
            self.examples = Examples(*(part.new_empty(0, *part.shape[1:]) for part in examples))
        more, rows = size - len(self), torch.tensor(list(taken.values()))
        kept = [torch.cat([part, part.new_zeros(more, *part.shape[1:])]) for part in self.examples]
        for part, new in zip(kept, examples, strict=True):
            part[torch.tensor(list(taken))] = new[rows]
        self.examples = Examples(*kept)

    def draw(self, rows: int, columns: int, key: Sequence[int]) -> Tensor:
        """Draw slots uniformly and independently of each other, `(rows, columns)`; `key` as in `add`.

        Raises:
            ValueError: nothing has been presented.
        """
        if not len(self):
            raise ValueError("the memory is empty: nothing can be drawn from it.")
        return torch.from_numpy(np.random.default_rng(key).integers(len(self), size=(rows, columns)))

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, by name; empty before the first example."""
        return {} if self.examples is None else self.examples._asdict()

    def load(self, tensors: Mapping[str, Tensor], presented: int) -> None:
        """Take over what `tensors` returned.

        Raises:
            ValueError: tensors of other names or sizes.
        """
        if not tensors and not presented:
            self.examples, self.presented = None, 0
            return
        size = min(presented, self.capacity)
        if tensors.keys() != set(Examples._fields) or any(len(part) != size for part in tensors.values()):
            shapes = {name: tuple(part.shape) for name, part in tensors.items()}
            raise ValueError(
                f"a memory of {self.capacity} images after {presented} holds {', '.join(Examples._fields)} of {size} rows, "
                f"this one {shapes}: it is another's."
            )
        self.examples, self.presented = Examples(**tensors), presented
