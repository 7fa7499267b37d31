"""Draw the parts of figures: lines that can be told apart without colour, panels, heat-maps, files.

Drawn through matplotlib's object API, so that pyplot's global state stays untouched and no display is needed; every file
is written to a temporary one first and then moved into place, with the same bytes for the same content.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..runs.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]

_MAP = "cividis"  # from dark to light in grey too, and the same to colour-blind readers
_COLOURS = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)  # Okabe and Ito, the palest last
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # one fewer than markers: pairs repeat only after 30 lines
_DPI = 200
_GREY = "#555555"
_REFERENCES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (1, 2.5)), (0, (8, 2, 2, 2, 2, 2)))
_DIRECT = 5, 16  # the most lines, and letters in a name, with which names are written at the lines' ends


# ---- lines ----------------------------------------------------------------------------------------------------------


def line_looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return a colour, a marker and a dash for each label; marker and dash alone tell 30 of them apart."""
    looks = zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_DASHES), strict=False)
    return {
        label: {"color": colour, "marker": marker, "linestyle": dash}
        for label, (colour, marker, dash) in zip(labels, looks, strict=False)
    }


def reference_looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the look of each line that others are compared with: thin and grey, without markers; dashes tell six apart."""
    return {
        label: {"color": "#777777", "marker": "", "linestyle": dash, "linewidth": 1.1, "zorder": 1.5}
        for label, dash in zip(labels, cycle(_REFERENCES), strict=False)
    }


def common_look(points: int) -> dict[str, Any]:
    """Return the look that all lines with this number of points share."""
    size = 5 if points <= 12 else 4
    return {
        "markersize": size, "linewidth": 1.6, "markerfacecolor": "white", "markeredgewidth": 1.3, "clip_on": False,
    }  # fmt: skip


def dress_panel(axes: Axes, title: str, below: str) -> None:
    """Set grid, frame and labels of a panel with lines; the title says what the y axis shows, and its unit."""
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(below, fontsize=9, color=_GREY)


def grid_of_panels(fig: Figure, rows: int, columns: int, used: int, **shared: Any) -> tuple[list[Axes], Axes | None]:
    """Return the first panels of a grid, and one of the places without a panel, which stay blank; None if there is none."""
    grid = list(fig.subplots(rows, columns, squeeze=False, **shared).ravel())
    for axes in grid[used:]:
        axes.set_axis_off()
    return grid[:used], grid[used] if used < len(grid) else None


def scale_y(axes: Axes, values: Values, span: float, from_zero: bool, whole: bool = False) -> None:
    """Set a y axis with a margin and round ticks, which does not magnify a flat line.

    Args:
        axes: the panel.
        values: drawn on it, NaN where there is none.
        span: the smallest range that the axis covers.
        from_zero: whether it begins at zero, or below where there are negative values.
        whole: whether only whole numbers are ticks.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if from_zero:
        low = min(low, 0.0)
        high = max(high, low + span)
    else:
        low = min(low, high - span)
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole))


def number_tasks(axes: Axes, tasks: int, known: Sequence[int] | None = None) -> str:
    """Set an x axis of tasks, counted from 1, and return its title.

    Args:
        axes: the panel.
        tasks: how many there are.
        known: classes that are known after each of them, written below the numbers of the tasks.
    """
    places, labels = number_ticks(tasks, most=10, counts=known, between="\n")
    axes.set_xticks([place + 1 for place in places], labels)
    margin = min(0.3, 0.06 * (tasks - 1)) or 0.3
    axes.set_xlim(1 - margin, tasks + margin)
    return "after task" if known is None else "after task (classes known)"


def number_ticks(
    count: int, most: int = 24, counts: Sequence[int] | None = None, between: str = " "
) -> tuple[list[int], list[str]]:
    """Return positions (0-based) and labels (1-based): all of them up to `most`, else the first and round numbers.

    Args:
        count: how many places there are.
        most: up to how many of them all are labelled.
        counts: number of classes at each place, written in brackets behind the label where there is one for each.
        between: what stands between label and brackets.
    """
    step = next(step for step in (1, 5, 10, 50, 100, 500, count) if count <= most * step)
    numbers = sorted({1, *range(step, count + 1, step)})
    if counts is None or len(counts) < count:
        return [number - 1 for number in numbers], [str(number) for number in numbers]
    return [number - 1 for number in numbers], [f"{number}{between}({counts[number - 1]})" for number in numbers]


# ---- names of lines -------------------------------------------------------------------------------------------------


def fit_at_ends(labels: Iterable[str]) -> bool:
    """Return whether the names are few and short enough to be written at the lines' ends instead of in a legend."""
    labels = list(labels)
    return len(labels) <= _DIRECT[0] and max(map(len, labels), default=0) <= _DIRECT[1]


def name_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Write each line's name on the right of a panel whose limits are final, joined to the line's end.

    Args:
        axes: the panel.
        ends: by name, where the line ends in data coordinates.
        colours: of the lines; the names themselves are dark, whatever the line's colour.
    """
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = _apart([(ends[name][1] - low) / (high - low) for name in order], gap=0.11)
    for name, height in zip(order, heights, strict=True):
        axes.annotate(
            name, ends[name], (1.04, height), textcoords=axes.transAxes, va="center", fontsize=8.5, color="#222222",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5},
        )  # fmt: skip


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return rising numbers in 0..1, moved just enough for neighbours to be at least `gap` apart."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    top = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], top)
        top = moved[i] - gap
    return moved


def add_legend(fig: Figure, grid: Sequence[Axes], columns: int, blank: Axes | None = None) -> None:
    """Add one legend, with an entry for each label: a line may be absent from a panel.

    Args:
        fig: the figure.
        grid: its panels.
        columns: the most entries side by side.
        blank: a place without a panel, which then holds the legend; otherwise it is above all panels.
    """
    found: dict[str, Artist] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:  # panels of what both heads share, whose line needs no name
        return
    if blank is not None:
        blank.legend(list(found.values()), list(found), loc="center", frameon=False, handlelength=3.5)
        return
    fit = int(fig.get_figwidth() / (0.95 + 0.085 * max(map(len, found))))  # inches: line and gaps, then letters
    columns = max(1, min(len(found), columns, fit))
    fig.legend(
        list(found.values()), list(found), loc="outside upper center", ncols=columns, frameon=False, handlelength=3.5,
    )  # fmt: skip
    fig.set_figheight(fig.get_figheight() + 0.2 * (-(-len(found) // columns)))  # inches, which the panels would lose


# ---- heat-maps ------------------------------------------------------------------------------------------------------


def heat_map(
    values: Values,
    *,
    low: float,
    high: float,
    bar: str,
    decimals: int,
    lacking: NDArray[np.bool_],
    classes: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
) -> tuple[Figure, Axes]:
    """Draw a heat-map, with numbers in the cells while they fit.

    Args:
        values: `(rows, columns)`, counted from 1; NaN is left blank.
        low, high: the values at the ends of the colour scale.
        bar: title of the colour scale.
        decimals: of the numbers.
        lacking: cells to hatch as not measured, `(rows, columns)`.
        classes: numbers of classes to write beside the numbers of the rows and below those of the columns.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    rows, columns = values.shape
    written = columns <= 24 and rows <= 24
    cell = 0.52 if max(rows, columns) <= 12 else 0.38
    width, height = (cell, cell) if written else (min(cell, 6.5 / columns), min(0.25, 6.5 / rows))
    flat = columns * width >= 2 * rows * height  # the colour bar then goes below
    fig = new_figure(
        max(3.6, width * columns + 1.9), max(2.0 if flat else 2.6, height * rows + (1.6 if flat else 1.2))
    )
    axes = fig.add_subplot()
    colours = matplotlib.colormaps[_MAP].with_extremes(bad="white")
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, aspect="equal" if written else "auto",
        interpolation="nearest",
    )  # fmt: skip
    if written:
        for i, j in np.argwhere(np.isfinite(values)):
            dark = (values[i, j] - low) / ((high - low) or 1) < 0.55
            axes.text(
                j, i, f"{values[i, j]:.{decimals}f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black", in_layout=False,
            )  # fmt: skip
    axes.set_xticks(*number_ticks(columns, counts=classes[1], between="\n"))
    axes.set_yticks(*number_ticks(rows, counts=classes[0]))
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_color("#BBBBBB")
    strip = fig.colorbar(
        image, ax=axes, shrink=0.85, pad=0.03, ticks=MaxNLocator(6, steps=[1, 2, 5, 10]),
        location="bottom" if flat else "right", aspect=40 if flat else 25,
    )  # fmt: skip
    strip.set_label(bar, fontsize=9)
    strip.ax.tick_params(labelsize=8)
    strip.outline.set_visible(False)
    if lacking.any():
        _hatch(fig, axes, lacking)
    return fig, axes


def _hatch(fig: Figure, axes: Axes, cells: NDArray[np.bool_]) -> None:
    """Hatch cells of a heat-map, and explain the hatching below it."""
    from matplotlib.patches import Patch, Rectangle

    look: Any = {"facecolor": "white", "edgecolor": "#999999", "hatch": "////", "linewidth": 0}
    for row, flags in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
        for start, end in edges.reshape(-1, 2):  # one patch for neighbours
            axes.add_patch(Rectangle((start - 0.5, row - 0.5), end - start, 1, **look))
    handle = Patch(**{**look, "linewidth": 0.6})
    fig.legend([handle], ["not measured"], loc="outside lower center", frameon=False, fontsize=9)


# ---- files ----------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    return Figure(figsize=(width, height), dpi=_DPI, layout=layout, facecolor="white")


def save(fig: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, and as SVG beside it, each whole or not at all; return the path of the PNG file.

    Equal content gives equal bytes: neither file holds a date, and names inside the SVG are not drawn at random.

    Raises:
        ValueError: `path` does not end in `.png`.
    """
    import matplotlib

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(
            f"figures are PNG files with an SVG beside each; got {str(path)!r}. Let the name end in .png."
        )
    with matplotlib.rc_context({"svg.hashsalt": "pgp_hf", "svg.fonttype": "path"}):
        with replacing(path.with_suffix(".svg")) as part:
            fig.savefig(part, format="svg", metadata={"Date": None, "Creator": None})
        layout = fig.get_layout_engine()
        fig.set_layout_engine("none")  # everything has its place by now, and finding it takes longer than drawing
        with replacing(path) as part:
            fig.savefig(part, format="png", metadata={"Software": None})
        fig.set_layout_engine(layout)
    return path


def finish(fig: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Return a figure, written as [`save`] does where a path is given."""
    if path is not None:
        save(fig, path)
    return fig
