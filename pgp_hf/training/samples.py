"""Keep a few test images of each class in a run's folder, on request, for the page that shows its predictions."""

from __future__ import annotations

from pathlib import Path

from ..data.tasks import TaskImages
from ..runs.atomic import replacing
from ..runs.folder import SAMPLES


def keep_samples(root: Path, images: TaskImages, count: int) -> None:
    """Write the first `count` test images of each class of a task to `samples/class-C-K.png`.

    Args:
        root: the run's output folder, where they stay: no revision has them, and they are never uploaded.
        images: the task's test images.
        count: how many of each class, 0 for none; those that an earlier task has left stay.
    """
    if not count:
        return
    taken: dict[int, int] = {}
    for position, label in enumerate(images.labels.tolist()):
        number = taken[label] = taken.get(label, 0) + 1
        file = root / SAMPLES / f"class-{label}-{number}.png"
        if number <= count and not file.exists():
            with replacing(file) as part:
                images[position]["image"].convert("RGB").save(part, format="PNG")
