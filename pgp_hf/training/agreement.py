"""Compare what the processes of a data-parallel run are about to do; they would wait for each other, or learn nonsense."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from ..data.stream import TaskStream

if TYPE_CHECKING:
    from .arguments import PGPTrainingArguments


def check_agreement(args: PGPTrainingArguments, name: str, value: str, fix: str) -> None:
    """Raise ValueError, on all processes, unless they have the same value.

    Args:
        name, value: of what is compared, for the message.
        fix: what to do where it differs.
    """
    if args.world_size == 1:
        return
    values = gather_object([value])
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(
                f"the processes do not agree on {name}: {values[0]} on process 0, {other} on process {rank}. {fix}"
            )


def check_same_images(args: PGPTrainingArguments, stream: TaskStream) -> None:
    """Raise ValueError unless all processes have a stream of the same tasks with the same labels."""
    labels = hashlib.sha256(repr(stream.label_names).encode())
    for t in range(stream.num_tasks):
        labels.update(repr(stream.tasks[t]).encode())
        if stream.has_train(t):
            labels.update(stream.train(t).labels.tobytes())
        if stream.has_test(t):
            labels.update(stream.test(t).labels.tobytes())
    counts = [sum(stream.num_images(split, t) for t in range(stream.num_tasks)) for split in ("train", "test")]
    value = f"{stream.num_tasks} tasks with {counts[0]} training and {counts[1]} test images, labels {labels.hexdigest()[:12]}"
    fix = "Give every process the same images, in the same order, and the same seed."
    check_agreement(args, "the images", value, fix)
