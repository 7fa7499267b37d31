"""Figures of a run: accuracy matrix, task-by-task curves, prompt usage; and of several: bands and sensitivity.

Drawn through matplotlib's object API, so pyplot's global state stays untouched and no display is needed; every PNG is
written to a temporary file first and then moved into place. Colours keep their order in grey and for colour-blind
readers, and lines differ by marker and dash as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
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
        styles = _styles(curves)
        for label, line in lines.items():
            axes.plot(np.arange(1, len(line) + 1), line, label=label, **styles[label], **_line(len(line)))
        longest = max(map(len, lines.values()))
        places, labels = _ticks(longest, most=10)
        axes.set_xticks([place + 1 for place in places], labels)
        axes.set_xlim(0.7, longest + 0.3)
        axes.set_ylim(*_limits(np.concatenate(list(lines.values())), *_PANELS[title]))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=title == "Protected rank"))
        _dress(axes, title, "after task")
    _finish(fig, grid, len(panels), columns=3, legend=len(runs) > 1)
    return _save(fig, path)


def accuracy_bands(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: str | os.PathLike, columns: int = 2
) -> Path:
    """Draws average accuracy after each task of several rows: the mean over seeds, and a band of one deviation.

    Args:
        panels: by title, by label: one curve a seed, `(seeds, tasks)` in percent. A row of one task, such as a joint
            upper bound, becomes a level line. A label looks the same in all panels.
        path: the PNG file to write; its folder is made.
        columns: panels beside each other.

    Returns:
        `path`.

    Raises:
        ValueError: nothing to draw, or `path` does not end in `.png`.
    """
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        raise ValueError("accuracy_bands got no row: pass {title: {label: (seeds, tasks)}}.")
    styles = _styles(dict.fromkeys(label for rows in panels.values() for label in rows))
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    fig = _figure(4.4 * columns, 3.1 * lines + 0.2 * (len(styles) // 4 + 1))
    grid = np.atleast_1d(fig.subplots(lines, columns, sharey="row")).ravel()
    for axes, (title, rows) in zip(grid, panels.items(), strict=False):
        tasks = max(len(curve) for curves in rows.values() for curve in curves)
        for label, curves in rows.items():
            mean, deviation = _mean_and_deviation(curves)
            if len(mean) == 1 < tasks:
                level = {key: value for key, value in styles[label].items() if key != "marker"}
                axes.axhline(mean[0], label=label, linewidth=1.6, **level)
                continue
            places = np.arange(1, len(mean) + 1)
            axes.plot(places, mean, label=label, **styles[label], **_line(tasks))
            if deviation is not None:
                axes.fill_between(
                    places, mean - deviation, mean + deviation, color=styles[label]["color"], alpha=0.13, linewidth=0
                )
        places, labels = _ticks(tasks, most=10)
        axes.set_xticks([place + 1 for place in places], labels)
        _dress(axes, title, "after task")
    for axes in grid[::columns]:
        axes.set_ylabel("average accuracy (%)", fontsize=9)
    _finish(fig, grid, len(panels), columns=4)
    return _save(fig, path)


def sensitivity(
    points: Mapping[str, Mapping[Any, Mapping[str, Sequence[float]]]],
    path: str | os.PathLike,
    usual: Mapping[str, Any] | None = None,
) -> Path:
    """Draws how results depend on settings: a column a setting, accuracy above and drift below.

    Args:
        points: by setting, by value (numbers, words or None): `{"linear head": [...], "drift": [...], ...}`, one
            number a seed. Everything but "drift" is an accuracy in percent. Values stand at equal distances.
        path: the PNG file to write; its folder is made.
        usual: the value that each setting has in the other columns, among its own; marked by a bar.

    Returns:
        `path`.

    Raises:
        ValueError: no setting, or `path` does not end in `.png`.
    """
    if not points:
        raise ValueError("sensitivity got no setting: pass {setting: {value: {series: numbers}}}.")
    measured = [found for values in points.values() for found in values.values()]
    styles = _styles(dict.fromkeys(name for found in measured for name in found))
    fig = _figure(max(4.6, 3.1 * len(points)), 5.2)
    grid = fig.subplots(2, len(points), sharey="row", squeeze=False)
    for column, (setting, values) in zip(grid.T, points.items(), strict=True):
        order = sorted(
            values, key=lambda value: (value is None, isinstance(value, str), 0 if value is None else value)
        )
        for name, style in styles.items():
            places = [place for place, value in enumerate(order) if values[value].get(name)]
            found = [_mean_and_deviation(values[order[place]][name]) for place in places]
            if found:
                column[int(name == "drift")].errorbar(
                    places, [mean for mean, _ in found], [0 if spread is None else spread for _, spread in found],
                    label=name, capsize=3, elinewidth=1, **style, **_line(len(places)),
                )  # fmt: skip
        for axes in column:
            if usual is not None and setting in usual:
                axes.axvline(order.index(usual[setting]), color="#BBBBBB", linewidth=5, alpha=0.5, zorder=0)
            axes.set_xticks(range(len(order)), ["none" if value is None else f"{value}" for value in order])
            axes.set_xlim(-0.4, len(order) - 0.6)
            _dress(axes, "", setting)
    drifts = [value for found in measured for value in found.get("drift", ())]
    if drifts:
        grid[1, 0].set_ylim(*_limits(np.array(drifts), 0.01, from_zero=True))
    grid[0, 0].set_ylabel("average accuracy (%)", fontsize=9)
    grid[1, 0].set_ylabel("drift (relative)", fontsize=9)
    _finish(fig, grid[0], len(points), columns=4)  # drift has an axis of its own to say what it is
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


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a dash for each label."""
    looks = zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_DASHES), strict=False)
    return {
        label: {"color": colour, "marker": marker, "linestyle": dash}
        for label, (colour, marker, dash) in zip(labels, looks, strict=False)
    }


def _line(points: int) -> dict[str, Any]:
    """What all lines have in common."""
    size = 5 if points <= 12 else 4
    return {
        "markersize": size, "linewidth": 1.6, "markerfacecolor": "white", "markeredgewidth": 1.3, "clip_on": False,
    }  # fmt: skip


def _dress(axes: Axes, title: str, below: str) -> None:
    """Grid, frame and labels of a panel with lines."""
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(below, fontsize=9, color=_GREY)


def _finish(fig: Figure, grid: Sequence[Axes], panels: int, columns: int, legend: bool = True) -> None:
    """Hide the panels left over, and put one legend above all."""
    for axes in grid[panels:]:
        axes.set_axis_off()
    if legend:
        handles, labels = _legend_entries(grid)
        fit = int(fig.get_figwidth() / (0.95 + 0.085 * max(map(len, labels))))  # inches: line and gaps, then letters
        place = {"loc": "outside upper center", "ncols": max(1, min(len(labels), columns, fit))}
        fig.legend(handles, labels, frameon=False, handlelength=3.5, **place)


def _mean_and_deviation(curves: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Over the seeds, `(tasks,)`; no deviation for a single one."""
    values = np.array(curves, dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None


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
