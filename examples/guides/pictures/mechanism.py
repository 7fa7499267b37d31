"""Draw how prompts learn a stream while old features stay: writes mechanism.svg and mechanism.png beside this file.

python examples/guides/pictures/mechanism.py
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

from pgp_hf import embedded
from pgp_hf.report.drawing import save

INK, SOFT = "#222222", "#777777"
OLD, NEW, KEPT = "#0072B2", "#D55E00", "#009E73"  # told apart by dashes and words as well
TASKS = ((0, 1, "task 1"), (2, 3, "task 2"), (4, 5, "task 3"))


def main() -> None:
    """Draw, and write the picture."""
    fig = Figure(figsize=(10.4, 4.8), facecolor="white")
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 104)
    axes.set_ylim(0, 48)
    axes.set_axis_off()
    stream(axes)
    pool(axes)
    backbone(axes)
    projection(axes)
    save(fig, pathlib.Path(__file__).with_suffix(".png"))


def stream(axes: Axes) -> None:
    """Draw the tasks, of which the current one alone has images."""
    heading(axes, 2, "1  A stream of tasks", "they come one by one; images go")
    test = embedded.digits()["test"]
    labels = list(test["label"])
    for place, (first, second, name) in enumerate(TASKS):
        left, bottom, now = 2 + 1.6 * place, 32.6 - 6.6 * place, place == len(TASKS) - 1
        box(axes, left, bottom, 18.5, 6.2, edge=NEW if now else "#BBBBBB", line=1.6 if now else 1.0)
        axes.text(left + 1, bottom + 3.1, name, va="center", fontsize=9.5, color=INK if now else SOFT)
        for k, digit in enumerate((first, second)):
            pixels = np.asarray(test[labels.index(digit)]["image"].convert("L"), dtype=float) / 255
            tile(axes, left + 8 + 5 * k, bottom + 0.9, 4.4, pixels, strength=1.0 if now else 0.22)
    axes.text(2.3, 14.6, "no old image is kept", fontsize=8.5, color=SOFT, style="italic")


def pool(axes: Axes) -> None:
    """Draw prompts and keys, of which an image selects some."""
    heading(axes, 32, "2  A pool of prompts", "an image takes those with the nearest keys")
    arrow(axes, (24.3, 22.6), (31.4, 27.0), NEW)
    box(axes, 32, 17.2, 23, 22, edge="#BBBBBB")
    axes.text(35.2, 37.4, "key", ha="center", fontsize=8.5, color=SOFT)
    axes.text(46.6, 37.4, "prompt", ha="center", fontsize=8.5, color=SOFT)
    for place, chosen in enumerate((False, True, False, True, False)):
        bottom = 33.4 - 3.75 * place
        colour = NEW if chosen else "#CFCFCF"
        axes.add_patch(Rectangle((33.6, bottom), 3.2, 2.5, facecolor=colour, edgecolor="white"))
        for k in range(5):
            left = 39.4 + 2.9 * k
            axes.add_patch(Rectangle((left, bottom), 2.6, 2.5, facecolor=colour, edgecolor="white"))
        if chosen:
            axes.add_patch(Rectangle((33.0, bottom - 0.5), 21.2, 3.5, fill=False, edgecolor=NEW, linewidth=1.3))
    axes.text(32.3, 14.6, "all that learns, with the head", fontsize=8.5, color=SOFT, style="italic")


def backbone(axes: Axes) -> None:
    """Draw the frozen backbone, its head and the answer."""
    heading(axes, 64, "3  A frozen backbone", "a vision transformer from the Hub")
    arrow(axes, (55.6, 28.2), (63.4, 28.2), NEW)
    axes.text(59.5, 29.2, "prompts\n+ patches", ha="center", va="bottom", fontsize=8, color=INK, linespacing=1.05)
    for k in range(6):
        axes.add_patch(
            Rectangle((64 + 3.1 * k, 20.4), 2.5, 17.2, facecolor="#DCE9F2", edgecolor=OLD, linewidth=0.9, hatch="//")
        )
    axes.text(73, 18.4, "weights never move", ha="center", va="center", fontsize=8.5, color=OLD)
    arrow(axes, (82.8, 28.2), (87.2, 28.2), INK)
    box(axes, 87.6, 24.6, 13.4, 7.2, edge=INK)
    axes.text(94.3, 28.2, "head\nall classes so far", ha="center", va="center", fontsize=8.5, color=INK)
    axes.text(94.3, 21.6, "no task id needed", ha="center", fontsize=8.5, color=SOFT, style="italic")


def projection(axes: Axes) -> None:
    """Draw the projection of an update onto what is orthogonal to all that old tasks have shown."""
    box(axes, 2, 0.9, 100, 12.1, edge="#DDDDDD", face="#FAFAFA")
    axes.text(3.6, 10.4, "4  Each update is projected", fontsize=11, fontweight="bold", color=INK, va="center")
    axes.text(
        3.6, 5.6, "Directions that old tasks showed the prompts are closed.\nThe step keeps only the rest, so old images "
        "are seen\nas before: their features drift less.", va="center", fontsize=9, color=INK, linespacing=1.35,
    )  # fmt: skip
    corner, right, back, up = np.array([62.0, 3.0]), np.array([1.0, 0.06]), np.array([0.8, 0.62]), np.array([0.0, 6.8])
    plane = [corner + a * right + b * back for a, b in ((-3.2, -1.6), (19.0, -1.6), (19.0, 3.4), (-3.2, 3.4))]
    axes.add_patch(Polygon(plane, facecolor="#DCE9F2", edgecolor=OLD, linewidth=0.9, hatch="////", alpha=0.55))
    closed = corner + 13.5 * right + 1.0 * back
    tip = closed + up
    arrow(axes, corner, closed, OLD, dashed=True)
    arrow(axes, corner, tip, SOFT, dashed=True)
    arrow(axes, corner, corner + up, NEW, width=2.4)
    for start, end in ((corner + up, tip), (closed, tip)):
        axes.plot(*zip(start, end, strict=True), ":", color=SOFT, linewidth=1.1)
    axes.text(tip[0] + 1.0, tip[1], "the optimizer's step  $\\Delta$", fontsize=9, va="center", color=SOFT)
    axes.text(
        corner[0] - 1.2, corner[1] + 0.68 * up[1], "the step taken\n$(I - UU^{\\top})\\,\\Delta$", fontsize=9.5,
        ha="right", va="center", color=NEW, linespacing=1.3,
    )  # fmt: skip
    axes.text(
        corner[0] + 22.4, corner[1] + 1.5, "span of $U$:\nwhat old tasks showed", fontsize=9, va="center", color=OLD
    )
    axes.add_patch(
        FancyArrowPatch(
            (52.4, 13.1), (52.4, 16.9), arrowstyle="-|>", mutation_scale=12, color=NEW, linewidth=1.8,
            shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def heading(axes: Axes, left: float, title: str, below: str) -> None:
    """Write the title of a part."""
    axes.text(left, 45.6, title, fontsize=12, fontweight="bold", color=INK, va="center")
    axes.text(left, 42.4, below, fontsize=9.5, color=SOFT, va="center")


def box(
    axes: Axes, left: float, bottom: float, width: float, height: float, edge: str, face: str = "white", **look: float
) -> None:
    """Draw a box with round corners; `line` in `look` is that of its line."""
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.9", facecolor=face, edgecolor=edge,
            linewidth=look.get("line", 1.0),
        )
    )  # fmt: skip


def tile(axes: Axes, left: float, bottom: float, side: float, pixels: np.ndarray, strength: float) -> None:
    """Draw an image as squares, so that the picture has no pixels of its own."""
    axes.add_patch(Rectangle((left, bottom), side, side, facecolor="white", edgecolor="#BBBBBB", linewidth=0.7))
    size = side / len(pixels)
    for value in np.unique(pixels[pixels > 0.05]):  # one path for all squares of a grey
        squares = [
            Path.unit_rectangle().transformed(
                Affine2D().scale(size).translate(left + column * size, bottom + side - (row + 1) * size)
            )
            for row, column in np.argwhere(pixels == value)
        ]
        axes.add_patch(PathPatch(Path.make_compound_path(*squares), facecolor=str(1 - strength * value), linewidth=0))


def arrow(
    axes: Axes,
    start: Sequence[float] | np.ndarray,
    end: Sequence[float] | np.ndarray,
    colour: str,
    dashed: bool = False,
    width: float = 1.8,
) -> None:
    """Draw an arrow from one point to another."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, color=colour, linewidth=width,
            linestyle=(0, (4, 2)) if dashed else "-", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
