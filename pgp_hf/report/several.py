"""Draw figures of many runs, such as those of a benchmark: curves with bands over seeds, and how settings matter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .drawing import (
    add_legend,
    common_look,
    dress_panel,
    finish,
    grid_of_panels,
    line_looks,
    new_figure,
    number_tasks,
    scale_y,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]
Looks = Mapping[str, Mapping[str, Any]]
Curves = Sequence[Sequence[float | None]]  # one for each seed, None where nothing was measured


def accuracy_bands(
    panels: Mapping[str, Mapping[str, Curves]],
    path: StrPath | None = None,
    columns: int = 2,
    *,
    known: Sequence[int] | None = None,
) -> Figure:
    """Draw average accuracy after each task of several rows: the mean over seeds, within one standard deviation.

    Args:
        panels: by title, by label: one curve per seed, `(seeds, tasks)` in percent. A row of one task, such as a joint
            upper bound, becomes a level line. A label looks the same in all panels.
        path: the PNG file to write, with an SVG beside it; its folder is made.
        columns: number of panels side by side.
        known: classes that are known after each task, to write below its number.

    Raises:
        ValueError: nothing to draw, or `path` does not end in `.png`.
    """
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        raise ValueError("accuracy_bands got no row: pass {title: {label: (seeds, tasks)}}.")
    looks = line_looks(dict.fromkeys(label for rows in panels.values() for label in rows))
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    fig = new_figure(4.4 * columns, 3.1 * lines)
    grid, _ = grid_of_panels(fig, lines, columns, len(panels), sharey="row")
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        dress_panel(axes, title, _draw_bands(axes, rows, looks, known))
    for axes in grid[::columns]:
        axes.set_ylabel("average accuracy (%)", fontsize=9)
    add_legend(fig, grid, columns=4)
    return finish(fig, path)


def accuracy_and_forgetting(
    heads: Mapping[str, Mapping[str, tuple[Curves, Curves]]],
    path: StrPath | None = None,
    *,
    known: Sequence[int] | None = None,
) -> Figure:
    """Draw accuracy and forgetting after each task side by side, as Figure 3 of the PGP paper (ICLR 2024) does.

    Lines are means over seeds, within one standard deviation.

    Args:
        heads: by the head, by the row's label: average accuracies in percent and forgetting in percentage points, one
            curve per seed each, `(seeds, tasks)`. A head is a row of panels.
        path: the PNG file to write, with an SVG beside it; its folder is made.
        known: classes that are known after each task, to write below its number.

    Raises:
        ValueError: nothing to draw, or `path` does not end in `.png`.
    """
    heads = {title: rows for title, rows in heads.items() if rows}
    if not heads:
        raise ValueError("accuracy_and_forgetting got no row: pass {head: {label: (accuracies, forgetting)}}.")
    looks = line_looks(dict.fromkeys(label for rows in heads.values() for label in rows))
    fig = new_figure(8.8, 2.9 * len(heads))
    grid, _ = grid_of_panels(fig, len(heads), 2, 2 * len(heads))
    titles = "average accuracy (%)", "forgetting (percentage points)"
    for place, axes in enumerate(grid):
        head, which = list(heads)[place // 2], place % 2
        below = _draw_bands(axes, {label: found[which] for label, found in heads[head].items()}, looks, known)
        dress_panel(axes, f"{head}: {titles[which]}", below)
    add_legend(fig, grid, columns=4)
    return finish(fig, path)


def _draw_bands(axes: Axes, rows: Mapping[str, Curves], looks: Looks, known: Sequence[int] | None) -> str:
    """Draw the mean over seeds of each row, with a band where there are several; return the title of the x axis."""
    tasks = max(len(curve) for curves in rows.values() for curve in curves)
    for label, curves in rows.items():
        mean, deviation = mean_and_deviation(curves)
        if len(mean) == 1 < tasks:
            level = {key: value for key, value in looks[label].items() if key != "marker"}
            axes.axhline(mean[0], label=label, linewidth=1.6, **level)
            continue
        places = np.arange(1, len(mean) + 1)
        axes.plot(places, mean, label=label, **looks[label], **common_look(tasks))
        if deviation is not None:
            axes.fill_between(
                places, mean - deviation, mean + deviation, color=looks[label]["color"], alpha=0.13, linewidth=0
            )
    return number_tasks(axes, tasks, known)


def sensitivity(
    points: Mapping[str, Mapping[Any, Mapping[str, Sequence[float]]]],
    path: StrPath | None = None,
    usual: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw how results depend on settings: means over seeds, with bars of one standard deviation.

    A setting is a column, a series a row; drift comes last. Where a setting has no value of a series, the place stays
    blank.

    Args:
        points: by setting, by value (numbers, words or None): `{"linear head": [...], "drift": [...], ...}`, one
            number per seed. Everything but "drift" is an accuracy in percent. Values are drawn at equal distances.
        path: the PNG file to write, with an SVG beside it; its folder is made.
        usual: by setting, the one of its values that holds in all other columns; marked by a bar.

    Raises:
        ValueError: no setting, or `path` does not end in `.png`.
    """
    if not points:
        raise ValueError("sensitivity got no setting: pass {setting: {value: {series: numbers}}}.")
    series = list(dict.fromkeys(name for values in points.values() for found in values.values() for name in found))
    series.sort(key=lambda name: name == "drift")  # which comes last
    looks = line_looks(series)
    fig = new_figure(max(4.6, 3.1 * len(points)), 2.2 * len(series) + 0.4)
    grid = fig.subplots(len(series), len(points), sharey="row", squeeze=False)
    for column, (setting, values) in zip(grid.T, points.items(), strict=True):
        order = sorted(
            values, key=lambda value: (value is None, isinstance(value, str), 0 if value is None else value)
        )
        for name, axes in zip(series, column, strict=True):
            if not any(values[value].get(name) for value in order):
                axes.set_axis_off()
                continue
            _draw_bars(axes, [values[value].get(name) or [] for value in order], name, looks[name])
            if usual is not None and setting in usual:
                axes.axvline(order.index(usual[setting]), color="#BBBBBB", linewidth=5, alpha=0.5, zorder=0)
            axes.set_xticks(range(len(order)), ["none" if value is None else f"{value}" for value in order])
            axes.set_xlim(-0.4, len(order) - 0.6)
            dress_panel(axes, "", setting)
    for name, line in zip(series, grid, strict=True):
        axes = next(axes for axes in line if axes.axison)
        rows = [found[name] for values in points.values() for found in values.values() if found.get(name)]
        bars = [mean_and_deviation(row) for row in rows]
        ends = np.array([mean + side * (0 if spread is None else spread) for mean, spread in bars for side in (-1, 1)])
        drift = name == "drift"
        scale_y(axes, ends, 0.01 if drift else 5, drift)
        axes.set_ylabel("drift (relative)" if drift else f"{name}:\naverage accuracy (%)", fontsize=9)
    return finish(fig, path)


def _draw_bars(axes: Axes, rows: Sequence[Sequence[float]], label: str, look: Mapping[str, Any]) -> None:
    """Draw a bar for each row of numbers, one per seed; none where the row is empty."""
    places = [place for place, row in enumerate(rows) if row]
    found = [mean_and_deviation(rows[place]) for place in places]
    if found:
        axes.errorbar(
            places, [mean for mean, _ in found], [0 if spread is None else spread for _, spread in found],
            label=label, capsize=3, elinewidth=1, **look, **common_look(len(places)),
        )  # fmt: skip


def mean_and_deviation(curves: Sequence[float] | Curves) -> tuple[Any, Any]:
    """Return mean and standard deviation over the seeds, `()` or `(tasks,)`; the latter is None for a single seed."""
    values = np.array(curves, dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None
