"""Let the tasks of a stream see the world differently: a rendering of its own for each task's images.

A rendering is a function of the image alone, so that training, evaluation and a resumed run see the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from .checking import shorten

Render = Callable[[Image.Image], Image.Image]


def _blurred(image: Image.Image) -> Image.Image:
    # a share of the side, so that small and large images lose as much of their detail
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 24))


RENDERINGS: dict[str, Render] = {
    "as they are": lambda image: image,
    "inverted": ImageOps.invert,
    "edges": lambda image: image.convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB"),
    "posterised": lambda image: ImageOps.posterize(image, 2),
    "low contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.3),
    "turned by 90 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "blurred": _blurred,
    "solarised": lambda image: ImageOps.solarize(image, 128),
    "upside down": lambda image: image.transpose(Image.Transpose.ROTATE_180),
}
"""Renderings of an RGB image, by the name that cards and manifests use."""

SHIFTS: dict[str, tuple[str, ...]] = {"renderings": tuple(RENDERINGS)}
"""Shifts by the name that users write: the renderings from which every task gets one."""


class Shift(NamedTuple):
    """How the tasks of a stream see the world.

    Args:
        name: a key of `SHIFTS`.
        tasks: the name of each task's rendering.
    """

    name: str
    tasks: list[str]

    @classmethod
    def draw(cls, name: str | None, num_tasks: int, seed: int) -> Shift | None:
        """Draw the renderings of the tasks, none twice before each was there once; None without a shift.

        Raises:
            ValueError: an unknown name.
        """
        check_shift(name)
        if name is None:
            return None
        # numbers of its own, so that a shift changes neither class order nor rows
        rng, known = np.random.default_rng([seed, 0x5417]), SHIFTS[name]
        rounds = -(-num_tasks // len(known))
        drawn = [known[place] for _ in range(rounds) for place in rng.permutation(len(known)).tolist()]
        return cls(name, drawn[:num_tasks])

    def by_class(self, tasks: Sequence[Sequence[int]]) -> dict[int, str]:
        """Return the name of each class's rendering, given the label ids of each task."""
        return {label: name for name, classes in zip(self.tasks, tasks, strict=False) for label in classes}

    def described(self) -> dict[str, object]:
        """Return what a manifest says of it."""
        return {"shift": self.name, "renderings": list(self.tasks)}

    @classmethod
    def read(cls, manifest: Mapping[str, object]) -> Shift | None:
        """Return the shift of a manifest, None if it has none.

        Raises:
            ValueError: a shift or a rendering that is not known here.
        """
        name, tasks = manifest.get("shift"), manifest.get("renderings")
        check_shift(name)
        if name is None:
            return None
        if not isinstance(tasks, list) or (unknown := [task for task in tasks if task not in SHIFTS[str(name)]]):
            shown = shorten(unknown) if isinstance(tasks, list) else repr(tasks)
            raise ValueError(f"renderings={shown}: expected one of {shorten(SHIFTS[str(name)])} for each task")
        return cls(str(name), tasks)


def check_shift(name: object) -> None:
    """Raise ValueError unless there is a shift of this name, or it is None."""
    if name is not None and name not in SHIFTS:
        raise ValueError(f"shift must be one of {shorten(SHIFTS)}, or None for images as they are, got {name!r}")
