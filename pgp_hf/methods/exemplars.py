"""Learning with exemplars of all old classes, which herding has chosen: what iCaRL and BiC have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ..models import StreamModel
from .base import ContinualMethod, Item, MethodState, TaskContext
from .distillation import teacher_of
from .memory import HerdedMemory, MemoryConfig, herd, rgb_bytes

if TYPE_CHECKING:
    from ..data.stream import TaskStream


@dataclass
class ExemplarConfig(MemoryConfig):
    """Configure how many exemplars a method keeps.

    Args:
        memory_size: number of images that are kept in all, the same number of each class seen so far; 2000 where
            `memory_per_class` is not given either.
        memory_per_class: number of images that are kept of each class, instead.
        memory_stores: see [`MemoryConfig`].

    Raises:
        ValueError: both are given, or one is below 1.
    """

    memory_size: int | None = field(
        default=None, metadata={"help": "number of images kept in total; 2000 if neither number is given"}
    )
    memory_per_class: int | None = field(
        default=None, metadata={"help": "number of images kept per class, instead of a total"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_size is not None and self.memory_per_class is not None:
            raise ValueError(
                f"memory_size={self.memory_size} and memory_per_class={self.memory_per_class} are mutually exclusive: give "
                "the number of images in all or of each class."
            )
        if self.memory_size is None and self.memory_per_class is None:
            self.memory_size = 2000
        for name in ("memory_size", "memory_per_class"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(
                    f"{name}={value} is out of range: this method needs exemplars, at least one of each class. Methods "
                    "without any are fine_tuning and lwf."
                )

    def quota(self, classes: int) -> int:
        """Return how many images of each class are kept once so many classes have been seen."""
        if self.memory_per_class is not None:
            return self.memory_per_class
        assert self.memory_size is not None
        return self.memory_size // classes


class ExemplarMethod(ContinualMethod):
    """Train on each task's images and on exemplars of all older classes together, next to a teacher.

    When a task ends, its classes get as many exemplars as each class may have by then, and older classes give up those
    chosen last. A known class that has come again has its exemplars chosen anew, among those that it had and the new
    images. Exemplars are known by task and position: they are read from the stream and augmented afresh, and no file
    of the run holds any unless `memory_stores` is "images". The cross-entropy is over all classes seen so far, whatever
    `train_mask` is. A model in which each task has prompts of its own, such as DualPrompt, trains exemplars with those of
    the task in training.

    Args:
        config, settings: see [`ExemplarConfig`].

    Attributes:
        memory: the exemplars.
        teacher: values of the trainable parameters as the task in training found them; None in the first.
    """

    config_class = ExemplarConfig
    config: ExemplarConfig

    def __init__(self, config: ExemplarConfig | None = None, **settings: object) -> None:
        super().__init__(config, **settings)
        self.memory = HerdedMemory()
        self.teacher: dict[str, Tensor] | None = None

    def check(self, model: StreamModel) -> None:
        if model.settings().get("head", "linear") != "linear":
            raise ValueError(
                f"method {self.name!r} decides by itself how the trained model predicts, and so does "
                f"head={model.settings()['head']!r} of this {model.name} adapter: set head='linear' in the adapter's "
                "configuration, or choose another method."
            )

    def training_stream(self, stream: TaskStream) -> TaskStream:
        """Return the stream.

        Raises:
            ValueError: it has more classes than there is room for exemplars.
        """
        classes = len(stream.class_order)
        if classes and self.config.quota(classes) < 1:
            raise ValueError(
                f"memory_size={self.config.memory_size} leaves no exemplar for some of the {classes} classes: set it to at "
                f"least {classes}, or give memory_per_class."
            )
        return stream

    def train_images(self, context: TaskContext, images: Dataset[Item]) -> Dataset[Item]:
        return with_exemplars(context, images, self.memory.places())

    def begin_task(self, context: TaskContext) -> None:
        self.teacher = teacher_of(context)

    def classes(self, context: TaskContext) -> Sequence[int]:
        return context.stream.seen_classes(context.task)

    def older_classes(self, context: TaskContext) -> list[int]:
        """Return the classes of which the task in training, not the first, has exemplars alone."""
        own = context.stream.tasks[context.task].classes
        return [label for label in context.stream.seen_classes(context.task - 1) if label not in own]

    def end_task(self, context: TaskContext) -> None:
        """Choose exemplars of the task's classes; older classes make room for them."""
        quota = self.config.quota(len(self.classes(context)))
        self.memory.reduce(quota)
        images = context.stream.train(context.task)
        for label in context.stream.tasks[context.task].classes:
            positions = torch.from_numpy(np.flatnonzero(images.labels == label))
            if not len(positions):  # a class of which there are test images alone
                continue
            before = self.memory.kept.get(label, positions.new_empty(0, 3))
            own = torch.stack([torch.full_like(positions, context.task), positions, torch.zeros_like(positions)], 1)
            candidates = torch.cat([before, own])
            chosen = candidates[herd(context.observe(candidates[:, :2].tolist()).features, quota)]
            new = chosen[:, 0] == context.task
            chosen[new, 2] = torch.tensor(rgb_bytes(images, chosen[new, 1].tolist()), dtype=torch.int64)
            self.memory.add(label, chosen[:, :2], chosen[:, 2].tolist())

    def exemplars(self) -> Sequence[Sequence[int]]:
        return self.memory.places()

    def limits(self) -> tuple[str, ...]:
        """Return what the card says of the memory."""
        size, each = self.config.memory_size, self.config.memory_per_class
        most = f"{each} of each class" if size is None else str(size)
        return (
            f"It is not rehearsal-free: training kept {len(self.memory)} images ({most} at most; {self.memory.bytes:,} bytes "
            "as uncompressed images), which further tasks need as well.",
            "Exemplars are chosen when a task has ended, in another pass over its images.",
            self.config.limit(),
        )

    def state(self) -> MethodState:
        return MethodState(self.memory.tensors(), {"images": len(self.memory), "bytes": self.memory.bytes})

    def load_state(self, state: MethodState) -> None:
        self.memory.load(state.tensors)


def with_exemplars(context: TaskContext, images: Dataset[Item], places: Sequence[Sequence[int]]) -> Dataset[Item]:
    """Return the images together with older ones, by task and position."""
    return ConcatDataset([images, context.exemplars(places)]) if len(places) else images
