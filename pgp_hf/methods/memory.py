"""A memory of training images: which ones, and how the model saw them. The images themselves are read elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..fields import check_fields
from ..runs.folder import EXEMPLARS

if TYPE_CHECKING:
    from ..data.stream import TaskImages  # loads `datasets`, which prediction does without


Stores = Literal["places", "images"]


@dataclass
class MemoryConfig:
    """Configure what a run keeps of the images in a memory.

    Args:
        memory_stores: "places" keeps their tasks and positions, by which they are read from the stream. "images" keeps
            them as 8-bit RGB as well, and reads those of older tasks from there, so that the data set may lose them.

    Raises:
        ValueError: neither of these.
    """

    memory_stores: Stores = field(
        default="places",
        kw_only=True,
        metadata={
            "help": "what the run keeps of its exemplars: 'places' in the stream, or their 'images' as well, so that those "
            "of older tasks may be gone; images are uploaded only if asked for"
        },
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def limit(self) -> str:
        """Return what the card says of where the images are."""
        if self.memory_stores == "places":
            return "Kept images are named in the files by task and position only: continuing takes the same data."
        return (
            f"Kept images are with the run as 8-bit RGB ({EXEMPLARS}), which is uploaded only if asked for: continuing takes "
            "that file, and no training image of an older task."
        )


class Examples(NamedTuple):
    """Training images, named and described, on the CPU.

    Attributes:
        places: 0-based task and position within it, `(N, 2)`.
        labels: `(N,)`.
        logits: the model's scores when they were taken in, float32, `(N, C)`; NaN for classes that it did not know yet.
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

    def widen(self, classes: int) -> None:
        """Make room in the scores for classes that have come since."""
        if self.examples is not None and (more := classes - self.examples.logits.shape[1]) > 0:
            logits = F.pad(self.examples.logits, (0, more), value=float("nan"))
            self.examples = self.examples._replace(logits=logits)

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
        """Return what is kept, by name; empty before the first example.

        Files hold finite numbers: where scores lack classes, these are zero, and "classes" is the number known, `(N,)`.
        """
        if self.examples is None:
            return {}
        unknown = self.examples.logits.isnan()
        if not unknown.any():
            return self.examples._asdict()
        known = {"logits": self.examples.logits.masked_fill(unknown, 0.0), "classes": (~unknown).sum(1)}
        return {**self.examples._asdict(), **known}

    def load(self, tensors: Mapping[str, Tensor], presented: int) -> None:
        """Take over what `tensors` returned.

        Raises:
            ValueError: tensors of other names or sizes.
        """
        if not tensors and not presented:
            self.examples, self.presented = None, 0
            return
        size = min(presented, self.capacity)
        names = set(Examples._fields)
        if tensors.keys() - {"classes"} != names or any(len(part) != size for part in tensors.values()):
            shapes = {name: tuple(part.shape) for name, part in tensors.items()}
            raise ValueError(
                f"a memory of {self.capacity} images after {presented} holds {', '.join(Examples._fields)} of {size} rows, "
                f"this one {shapes}: it is another's."
            )
        self.examples, self.presented = Examples(*(tensors[name] for name in Examples._fields)), presented
        if (classes := tensors.get("classes")) is not None:
            logits = self.examples.logits
            unknown = torch.arange(logits.shape[1]) >= classes[:, None]
            self.examples = self.examples._replace(logits=logits.masked_fill(unknown, float("nan")))


def rgb_bytes(images: TaskImages, positions: Sequence[int]) -> list[int]:
    """Return the bytes of some images as the data set stores them, if they are kept as uncompressed 8-bit RGB."""
    sizes = (images[position]["image"].size for position in positions)
    return [3 * width * height for width, height in sizes]


def herd(features: Tensor, count: int) -> Tensor:
    """Return which images stand for all of these, the most important first, `(min(count, N),)` rows.

    Herding without replacement (iCaRL, CVPR 2017, Algorithm 4): each next image brings the mean of those chosen so far as
    near as possible to the mean of all, with features scaled to length 1. Of equals, the first is taken.

    Args:
        features: `(N, d)`.
        count: how many to choose.
    """
    unit = F.normalize(features.double(), dim=-1)
    mean, total, taken = unit.mean(0), torch.zeros_like(unit[0]), torch.zeros(len(unit), dtype=torch.bool)
    order = []
    for k in range(1, min(count, len(unit)) + 1):
        errors = (mean - (total + unit) / k).norm(dim=-1).masked_fill(taken, float("inf"))
        best = int(errors.argmin())
        total, taken[best] = total + unit[best], True
        order.append(best)
    return torch.tensor(order, dtype=torch.int64)


class HerdedMemory:
    """Keep some training images of each class, the most important first.

    Attributes:
        kept: by label, in the order in which classes came: 0-based task, position within it, and bytes of the image as
            the data set stores it, if it is kept as 8-bit RGB; int64, `(m, 3)`.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return sum(map(len, self.kept.values()))

    @property
    def bytes(self) -> int:
        """Return the size of all images, uncompressed."""
        return sum(int(rows[:, 2].sum()) for rows in self.kept.values())

    def add(self, label: int, places: Tensor, sizes: Sequence[int]) -> None:
        """Keep images of a class, in place of those that it has.

        Args:
            label: of the class.
            places: 0-based task and position within it, the most important first, `(m, 2)`.
            sizes: bytes of each.
        """
        self.kept[label] = torch.cat([places, torch.tensor(sizes, dtype=torch.int64)[:, None]], 1)

    def reduce(self, quota: int) -> None:
        """Keep the first `quota` images of each class."""
        self.kept = {label: rows[:quota] for label, rows in self.kept.items()}

    def places(self) -> list[list[int]]:
        """Return the task and the position of all images, class by class."""
        return [place for rows in self.kept.values() for place in rows[:, :2].tolist()]

    def labels(self) -> Tensor:
        """Return the labels of all images, in the same order, `(N,)`."""
        counts = torch.tensor([len(rows) for rows in self.kept.values()], dtype=torch.int64)
        return torch.tensor(list(self.kept), dtype=torch.int64).repeat_interleave(counts)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, by name; empty before the first image."""
        if not self.kept:
            return {}
        rows = torch.cat(list(self.kept.values()))
        return {"labels": self.labels(), "places": rows[:, :2].contiguous(), "sizes": rows[:, 2].contiguous()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned.

        Raises:
            ValueError: tensors of other names, kinds or sizes.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        count = shapes.get("labels", (0,))[0]
        expected = {"labels": (count,), "places": (count, 2), "sizes": (count,)} if tensors else {}
        if shapes != expected or any(tensor.dtype != torch.int64 for tensor in tensors.values()):
            raise ValueError(
                "a memory of exemplars holds the integers labels (N,), places (N, 2) and sizes (N,), or nothing; this one "
                f"has {shapes}: it is another's."
            )
        self.kept = {}
        if tensors:
            rows = torch.cat([tensors["places"], tensors["sizes"][:, None]], 1)
            labels = dict.fromkeys(tensors["labels"].tolist())
            self.kept = {label: rows[tensors["labels"] == label] for label in labels}
