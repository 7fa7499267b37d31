"""Figures of a run: accuracy matrix, task-by-task curves, prompt usage.

Drawn through matplotlib's object API, so pyplot's global state stays untouched and no display is needed; every PNG is
written to a temporary file first and then moved into place. Colours keep their order in grey and for colour-blind
readers, and lines differ by marker and dash as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import metrics
from ._atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP = "cividis"
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # one fewer, so that pairs repeat only after 30 runs
_DPI = 150
_GREY = "#666666"


def accuracy_matrix(results: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Draws the accuracy matrix as a heat-map with the numbers in its cells.

    Args:
        results: the content of `results.json`; `accuracy_matrix` is needed, shape `(rows, tasks)` in percent with
            `None` where not evaluated (left blank). Missing rows of a run under way are left blank too.
        path: the PNG file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        ValueError: the matrix is missing or ragged, or `path` does not end in `.png`.
    """
    values = _grid(results, "accuracy_matrix")
    rows, tasks = values.shape
    square = np.full((max(rows, tasks), tasks), np.nan)
    square[:rows] = values
    fig = _heat_map(square, low=0, high=100, bar="accuracy (%)", decimals=1 if tasks <= 12 else 0)
    axes = fig.axes[0]
    axes.set_title("Accuracy on each task, after each task", fontsize=11)
    axes.set_xlabel("evaluated on task")
    axes.set_ylabel("after training task")
    return _save(fig, path)


def task_curves(results: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Draws average accuracy, forgetting, drift and protected rank after each task, one small panel each.

    Args:
        results: the content of one `results.json`, or several of them by label: `{"L2P": {...}, "L2P-PGP": {...}}`,
            drawn on the same axes. A panel that no run has values for is left out.
        path: the PNG file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        ValueError: no run is given, a run lacks its matrix, or `path` does not end in `.png`.
    """
    from matplotlib.ticker import MaxNLocator

    runs = {"": results} if "accuracy_matrix" in results else dict(results)
    if not runs:
        raise ValueError("task_curves got no run; pass one results dict or {label: results dict}.")
    curves = {label: _curves(run, label) for label, run in runs.items()}
    panels = [title for title in _PANELS if any(np.isfinite(c[title]).any() for c in curves.values())]

    fig = _figure(8.0, 2.6 * ((len(panels) + 1) // 2) + 0.4)
    grid = np.atleast_1d(fig.subplots((len(panels) + 1) // 2, 2 if len(panels) > 1 else 1)).ravel()
    for axes, title in zip(grid, panels, strict=False):
        lines = {label: curve[title] for label, curve in curves.items() if np.isfinite(curve[title]).any()}
        styles = dict(zip(curves, zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_DASHES), strict=False), strict=False))
        for label, line in lines.items():
            colour, marker, dash = styles[label]
            axes.plot(
                np.arange(1, len(line) + 1), line, color=colour, marker=marker, linestyle=dash, label=label,
                markersize=5 if len(line) <= 12 else 4, linewidth=1.6, markerfacecolor="white", markeredgewidth=1.3,
                clip_on=False,
            )  # fmt: skip
        longest = max(map(len, lines.values()))
        places, labels = _ticks(longest, most=10)
        axes.set_xticks([place + 1 for place in places], labels)
        axes.set_xlim(0.7, longest + 0.3)
        axes.set_ylim(*_limits(np.concatenate(list(lines.values())), *_PANELS[title]))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=title == "Protected rank"))
        axes.grid(True, color="#DDDDDD", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("after task", fontsize=9, color=_GREY)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if len(runs) > 1:
        handles, labels = _legend_entries(grid)
        fig.legend(
            handles, labels, loc="outside upper center", ncols=min(len(labels), 3), frameon=False, handlelength=3.5
        )
    return _save(fig, path)


def prompt_usage(results: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Draws which pool entries each task's test images select, as a share of the task's selections.

    Args:
        results: `prompt_usage` is needed, counts of shape `(tasks, pool entries)`: how many of the task's test images
            selected the entry after the last trained task. A row may be `None` or all zero (left blank).
        path: the PNG file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        ValueError: the counts are missing, negative or ragged, or `path` does not end in `.png`.
    """
    counts = _grid(results, "prompt_usage")
    if (counts < 0).any():
        raise ValueError(f"prompt_usage holds counts of images, so none may be negative; got {np.nanmin(counts)}.")
    total = counts.sum(axis=1, keepdims=True)
    share = 100 * np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    high = float(np.nanmax(share, initial=1.0))
    fig = _heat_map(share, low=0, high=high, bar="share of selections (%)", decimals=0)
    axes = fig.axes[0]
    axes.set_title("Prompts selected by each task's test images", fontsize=11)
    axes.set_xlabel("pool entry")
    axes.set_ylabel("task")
    return _save(fig, path)


_FIGURES = {
    "accuracy_matrix.png": accuracy_matrix,
    "task_curves.png": task_curves,
    "prompt_usage.png": prompt_usage,
}


def figure_names(results: Mapping[str, Any]) -> list[str]:
    """The files [`save_figures`] writes for these results; prompt usage only where it was recorded."""
    return [name for name in _FIGURES if name != "prompt_usage.png" or results.get("prompt_usage")]


def save_figures(results: Mapping[str, Any], folder: str | os.PathLike) -> list[Path]:
    """Writes all figures of one run into `folder`, which is made; returns their paths.

    Raises:
        ValueError: as the single figures do.
    """
    return [_FIGURES[name](results, Path(folder) / name) for name in figure_names(results)]


_PANELS = {  # title: (smallest span of the y axis, whether it starts at zero)
    "Average accuracy (%)": (5.0, False),
    "Forgetting (points)": (1.0, True),
    "Drift of old features (relative)": (0.01, True),
    "Protected rank": (5.0, True),
}


def _curves(run: Mapping[str, Any], label: str) -> dict[str, np.ndarray]:
    """One run's four curves by panel title, each `(trained tasks,)` with NaN where there is no value."""
    if not isinstance(run, Mapping) or "accuracy_matrix" not in run:
        raise ValueError(f"run {label!r} has no 'accuracy_matrix'; pass {{label: content of results.json}}.")
    matrix = run["accuracy_matrix"]
    average = metrics.per_task_average_accuracy(matrix)
    forgetting = [metrics.forgetting(matrix[: task + 1]) for task in range(len(average))]
    recorded = (average, forgetting, run.get("drift") or [], run.get("projection_rank") or [])
    return {title: np.array(line, dtype=float) for title, line in zip(_PANELS, recorded, strict=True)}


def _limits(values: np.ndarray, span: float, from_zero: bool) -> tuple[float, float]:
    """Limits of a y axis that leave a margin and do not blow up a flat line."""
    low, high = np.nanmin(values), np.nanmax(values)
    if from_zero:
        low = min(low, 0.0)
        high = max(high, low + span)
    else:
        low = min(low, high - span)
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _legend_entries(grid: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """One entry a label, wherever it is drawn: a run without projection may be absent from a panel."""
    found = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _heat_map(values: np.ndarray, *, low: float, high: float, bar: str, decimals: int) -> Figure:
    """A heat-map of `(rows, columns)`, NaN left blank, 1-based rows; numbers in the cells while they fit."""
    import matplotlib

    rows, columns = values.shape
    written = columns <= 24 and rows <= 24
    cell = 0.52 if max(rows, columns) <= 12 else 0.38
    width = cell if written else 6.5 / columns
    flat = columns >= 2 * rows  # then the colour bar lies below
    fig = _figure(max(3.6, width * columns + 1.9), max(2.6, cell * rows + (1.9 if flat else 1.4)))
    axes = fig.add_subplot()
    colours = matplotlib.colormaps[_MAP].with_extremes(bad="white")
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, aspect="equal" if written else "auto"
    )
    if written:
        for i, j in np.argwhere(np.isfinite(values)):
            dark = (values[i, j] - low) / (high - low) < 0.55
            axes.text(
                j, i, f"{values[i, j]:.{decimals}f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
    axes.set_xticks(*_ticks(columns))
    axes.set_yticks(*_ticks(rows))
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_color("#BBBBBB")
    strip = fig.colorbar(image, ax=axes, location="bottom" if flat else "right", shrink=0.85, aspect=25, pad=0.03)
    strip.set_label(bar, fontsize=9)
    strip.ax.tick_params(labelsize=8)
    strip.outline.set_visible(False)
    return fig


def _ticks(count: int, most: int = 24) -> tuple[list[int], list[int]]:
    """Positions (0-based) and labels (1-based): all of them up to `most`, else the first and round numbers."""
    step = next(step for step in (1, 5, 10, 50, 100, 500, count) if count <= most * step)
    labels = sorted({1, *range(step, count + 1, step)})
    return [label - 1 for label in labels], labels


def _grid(results: Mapping[str, Any], key: str) -> np.ndarray:
    """`results[key]` as a float array `(rows, columns)`, NaN for None; a row that is None is all NaN."""
    rows = results.get(key)
    if not rows:
        raise ValueError(f"results have no {key!r}; its figure needs a non-empty list of rows.")
    lengths = {len(row) for row in rows if row is not None}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"results[{key!r}] must have rows of one length above 0; got lengths {sorted(lengths)}.")
    return np.array([[None] * max(lengths) if row is None else row for row in rows], dtype=float)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")


def _save(fig: Figure, path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"figures are PNG files; got {str(path)!r}. Let the name end in .png.")
    with replacing(path) as part:
        fig.savefig(part, format="png")
    return path
