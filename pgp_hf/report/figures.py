"""Draw figures of a run (accuracy matrix, curves, stability, prompt usage) and of several (curves, bands, sensitivity).

All are readable in grey and by colour-blind people: lines differ by marker and dash as well as by colour, heat-maps
run from dark to light and hold their numbers. Each takes a fraction of a second, since a run draws its figures after
every task.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import metrics
from ..metrics._running import Accuracies
from ..runs.checks import finished_tasks, first_task
from .drawing import (
    Values,
    add_legend,
    common_look,
    dress_panel,
    fit_at_ends,
    heat_map,
    line_looks,
    name_ends,
    new_figure,
    number_tasks,
    save_png,
    scale_y,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Looks = Mapping[str, Mapping[str, Any]]


class _Panel(NamedTuple):
    title: str
    span: float  # the smallest range of its y axis
    from_zero: bool


PANELS = {
    "accuracy": _Panel("Average accuracy (%)", 5.0, False),
    "forgetting": _Panel("Forgetting (percentage points)", 1.0, True),
    "drift": _Panel("Drift of old features (relative)", 0.01, True),
    "changed": _Panel("Changed selections (% of old images)", 1.0, True),
    "rank": _Panel("Protected rank (directions)", 5.0, True),
}


def accuracy_matrix(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw the accuracy matrix as a heat-map with the numbers in its cells.

    Args:
        results: the content of `results.json`; `accuracy_matrix` is needed, shape `(rows, tasks)` in percent with
            `None` where not evaluated. Where a task was seen and not measured, the cell is hatched; all others, and rows
            that are missing in an unfinished run, are left blank.
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
    found = square[np.isfinite(square)]
    low, high = 10 * np.floor(min([*found, 80]) / 10), 10 * np.ceil(max([*found, 20]) / 10)
    if not len(found):
        low, high = 0.0, 100.0
    seen = np.tril(np.ones_like(square, dtype=bool))  # on and below the diagonal, in the rows of finished tasks
    seen[: first_task(results)] = seen[finished_tasks(results) :] = False
    decimals, lacking = 1 if tasks <= 12 else 0, seen & np.isnan(square)
    fig, axes = heat_map(square, low=low, high=high, bar="accuracy (%)", decimals=decimals, lacking=lacking)
    axes.set_title("Accuracy on each task, after each task", fontsize=11)
    axes.set_xlabel("evaluated on task")
    axes.set_ylabel("after training task")
    return save_png(fig, path)


def task_curves(
    results: Mapping[str, Any], path: str | os.PathLike[str], panels: Sequence[str] = tuple(PANELS)
) -> Path:
    """Draw the state of a run, or of several runs side by side, after each task; a small panel for each quantity.

    Args:
        results: the content of one `results.json`, both of whose heads are drawn where it has two, or several of them
            by label: `{"L2P": {...}, "L2P-PGP": {...}}`, drawn on the same axes.
        path: the PNG file to write; its folder is made.
        panels: which quantities, all by default: "accuracy", "forgetting", "drift", "changed" (selections), "rank".
            Those that no run has values for are left out; so is a rank of 0 throughout, as without projection. A run
            that learned all tasks as one has a point at the end, in "accuracy" alone. There is no point where a task
            that it needs was not measured.

    Returns:
        `path`.

    Raises:
        ValueError: no run or nothing to draw, an unknown panel, a run that lacks its matrix, or `path` does not end in
            `.png`.
    """
    curves = _curves(results)
    unknown = [name for name in panels if name not in PANELS]
    if unknown:
        raise ValueError(f"panels names {unknown[0]!r}: choose among {', '.join(PANELS)}.")
    shown = [name for name in panels if any(name in of for of in curves.values())]
    if not shown:
        raise ValueError(f"the results hold no values of {', '.join(panels) or 'any panel'}: nothing can be drawn.")
    names = [label for label in curves if label]
    direct = fit_at_ends(names)
    looks = line_looks(names or [""])
    looks.setdefault("", next(iter(looks.values())))  # what both heads share

    columns = 3 if len(shown) == 3 else min(2, len(shown))
    rows = -(-len(shown) // columns)
    fig = new_figure(4.2 * columns if columns < 3 else 9.6, 2.7 * rows)
    grid = _panels(fig, rows, columns, len(shown))
    for axes, name in zip(grid, shown, strict=True):
        own = {label: of[name] for label, of in curves.items() if name in of}
        longest = max(map(len, own.values()))
        for label, values in own.items():
            axes.plot(np.arange(1, len(values) + 1), values, label=label, **looks[label], **common_look(longest))
        number_tasks(axes, longest)
        scale_y(axes, np.concatenate(list(own.values())), *PANELS[name][1:], whole=name == "rank")
        dress_panel(axes, PANELS[name].title, "after task")
        if direct and len(names) > 1:
            ends = {label: _end(values) for label, values in own.items() if label}
            name_ends(axes, ends, {label: looks[label]["color"] for label in ends})
    if len(names) > 1 and not direct:
        add_legend(fig, grid, columns=3)
    return save_png(fig, path)


def accuracy_bands(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: str | os.PathLike[str], columns: int = 2
) -> Path:
    """Draw average accuracy after each task of several rows: the mean over seeds, within one standard deviation.

    Args:
        panels: by title, by label: one curve per seed, `(seeds, tasks)` in percent. A row of one task, such as a joint
            upper bound, becomes a level line. A label looks the same in all panels.
        path: the PNG file to write; its folder is made.
        columns: number of panels side by side.

    Returns:
        `path`.

    Raises:
        ValueError: nothing to draw, or `path` does not end in `.png`.
    """
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        raise ValueError("accuracy_bands got no row: pass {title: {label: (seeds, tasks)}}.")
    looks = line_looks(dict.fromkeys(label for rows in panels.values() for label in rows))
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    fig = new_figure(4.4 * columns, 3.1 * lines + 0.2 * (len(looks) // 4 + 1))
    grid = _panels(fig, lines, columns, len(panels), sharey="row")
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        _draw_bands(axes, rows, looks)
        dress_panel(axes, title, "after task")
    for axes in grid[::columns]:
        axes.set_ylabel("average accuracy (%)", fontsize=9)
    add_legend(fig, grid, columns=4)
    return save_png(fig, path)


def _draw_bands(axes: Axes, rows: Mapping[str, Sequence[Sequence[float]]], looks: Looks) -> None:
    tasks = max(len(curve) for curves in rows.values() for curve in curves)
    for label, curves in rows.items():
        mean, deviation = _mean_and_deviation(curves)
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
    number_tasks(axes, tasks)


def _panels(fig: Figure, rows: int, columns: int, used: int, **shared: Any) -> list[Axes]:
    """Return the first panels of a grid; the rest of the grid stays blank."""
    grid = list(fig.subplots(rows, columns, squeeze=False, **shared).ravel())
    for axes in grid[used:]:
        axes.set_axis_off()
    return grid[:used]


def sensitivity(
    points: Mapping[str, Mapping[Any, Mapping[str, Sequence[float]]]],
    path: str | os.PathLike[str],
    usual: Mapping[str, Any] | None = None,
) -> Path:
    """Draw how results depend on settings: means over seeds, with bars of one standard deviation.

    A setting is a column, a series a row; drift comes last.

    Args:
        points: by setting, by value (numbers, words or None): `{"linear head": [...], "drift": [...], ...}`, one
            number per seed. Everything but "drift" is an accuracy in percent. Values are drawn at equal distances.
        path: the PNG file to write; its folder is made.
        usual: by setting, the one of its values that holds in all other columns; marked by a bar.

    Returns:
        `path`.

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
            _draw_bars(axes, [values[value].get(name) or [] for value in order], name, looks[name])
            if usual is not None and setting in usual:
                axes.axvline(order.index(usual[setting]), color="#BBBBBB", linewidth=5, alpha=0.5, zorder=0)
            axes.set_xticks(range(len(order)), ["none" if value is None else f"{value}" for value in order])
            axes.set_xlim(-0.4, len(order) - 0.6)
            dress_panel(axes, "", setting)
    for name, axes in zip(series, grid[:, 0], strict=True):
        rows = [found[name] for values in points.values() for found in values.values() if found.get(name)]
        bars = [_mean_and_deviation(row) for row in rows]
        ends = np.array([mean + side * (0 if spread is None else spread) for mean, spread in bars for side in (-1, 1)])
        drift = name == "drift"
        scale_y(axes, ends, 0.01 if drift else 5, drift)
        axes.set_ylabel("drift (relative)" if drift else f"{name}:\naverage accuracy (%)", fontsize=9)
    return save_png(fig, path)


def _draw_bars(axes: Axes, rows: Sequence[Sequence[float]], label: str, look: Mapping[str, Any]) -> None:
    """Draw a bar for each row of numbers, one per seed; none where the row is empty."""
    places = [place for place, row in enumerate(rows) if row]
    found = [_mean_and_deviation(rows[place]) for place in places]
    if found:
        axes.errorbar(
            places, [mean for mean, _ in found], [0 if spread is None else spread for _, spread in found],
            label=label, capsize=3, elinewidth=1, **look, **common_look(len(places)),
        )  # fmt: skip


def prompt_usage(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw which pool entries each task's test images select, as a share of the task's selections.

    Args:
        results: `prompt_usage` is needed, counts of shape `(tasks, pool entries)`: how many of the task's test images
            selected the entry after the last trained task. A row may be `None`, for a task that was not measured
            (hatched), or all zero (left blank), or `{entry: count}` for those that were selected in a large pool.
        path: the PNG file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        ValueError: the counts are missing, negative or ragged, or `path` does not end in `.png`.
    """
    counts = _grid({"prompt_usage": _dense(results.get("prompt_usage"))}, "prompt_usage")
    if (counts < 0).any():
        raise ValueError(f"prompt_usage holds counts of images, so none may be negative; got {np.nanmin(counts)}.")
    total = counts.sum(axis=1, keepdims=True)
    share = 100 * np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    high = float(np.nanmax(share, initial=1.0))
    fig, axes = heat_map(share, low=0, high=high, bar="share of selections (%)", decimals=0, lacking=np.isnan(counts))
    axes.set_title("Prompts selected by each task's test images", fontsize=11)
    axes.set_xlabel("pool entry")
    axes.set_ylabel("task")
    return save_png(fig, path)


_FIGURES: dict[str, Callable[[Mapping[str, Any], Path], Path]] = {
    "accuracy_matrix.png": accuracy_matrix,
    "task_curves.png": partial(task_curves, panels=("accuracy", "forgetting")),
    "stability.png": partial(task_curves, panels=("drift", "changed", "rank")),
    "prompt_usage.png": prompt_usage,
}


def figure_names(results: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that [`save_figures`] writes.

    Curves, stability and prompt usage are written only where they are recorded, and no curves where all tasks were
    learned as one.
    """
    curves = _curves(results).values() if results.get("accuracy_matrix") and not first_task(results) else []
    recorded = {
        "task_curves.png": any("accuracy" in of or "forgetting" in of for of in curves),
        "stability.png": bool(_movements(results)),
        "prompt_usage.png": bool(results.get("prompt_usage")),
    }
    return [name for name in _FIGURES if recorded.get(name, True)]


def save_figures(results: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Write all figures of one run into `folder`, which is created if needed; return their paths.

    Raises:
        ValueError: as for each of the figures.
    """
    return [_FIGURES[name](results, Path(folder) / name) for name in figure_names(results)]


def _curves(results: Mapping[str, Any]) -> dict[str, dict[str, Values]]:
    """Return by label and panel the values `(trained tasks,)` to draw, NaN where there is none.

    The label is empty for a single run, and for what both of its heads share.
    """
    if "accuracy_matrix" in results:
        heads = results.get("heads") or {}
        own = {f"{name} head": _accuracies(results, heads[name]) for name in sorted(heads, reverse=True)}
        rest = {} if own else _accuracies(results, results)
        return {**own, "": {**rest, **_movements(results)}}
    if not results:
        raise ValueError("task_curves got no run; pass one results dict or {label: results dict}.")
    for label, run in results.items():
        if not isinstance(run, Mapping) or "accuracy_matrix" not in run:
            raise ValueError(f"run {label!r} has no 'accuracy_matrix'; pass {{label: content of results.json}}.")
    return {label: {**_accuracies(run, run), **_movements(run)} for label, run in results.items()}


def _accuracies(run: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Values]:
    """Return by panel what follows from the accuracies of a run's head, or of the run itself.

    Args:
        head: with an accuracy matrix, or what is kept instead of it, unless its matrix is the run's.
    """
    average: Any
    if "per_task_forgetting" in head:
        average, lost = head["per_task_average_accuracy"], head["per_task_forgetting"]
    else:
        matrix = head.get("accuracy_matrix") or run["accuracy_matrix"]
        average = metrics.summarize(matrix, run.get("finished_tasks"))["per_task_average_accuracy"]
        lost = Accuracies.of(matrix[: len(average)]).forgetting
    found = {"accuracy": np.array(average, dtype=float)}
    if not first_task(run):
        found["forgetting"] = np.array(lost, dtype=float)
    return _with_points(found)


def _movements(run: Mapping[str, Any]) -> dict[str, Values]:
    if first_task(run):  # all tasks were learned as one: nothing came after another
        return {}
    keys = {"drift": "drift", "changed": "changed_selections", "rank": "projection_rank"}
    found = {name: np.array(run.get(key) or [], dtype=float) for name, key in keys.items()}
    found["changed"] = 100 * found["changed"]
    return {name: values for name, values in _with_points(found).items() if name != "rank" or np.nanmax(values) > 0}


def _with_points(found: dict[str, Values]) -> dict[str, Values]:
    """Leave out curves without a point, and comparisons with earlier tasks of which only the first task's zero is known."""
    kept = {}
    for name, values in found.items():
        compared = values[1:] if name in ("forgetting", "drift", "changed") and len(values) > 1 else values
        if np.isfinite(compared).any():
            kept[name] = values
    return kept


def _end(values: Values) -> tuple[float, float]:
    """Return the last point of a curve."""
    last = int(np.flatnonzero(np.isfinite(values))[-1])
    return last + 1, values[last]


def _mean_and_deviation(curves: Sequence[float] | Sequence[Sequence[float]]) -> tuple[Any, Any]:
    """Return mean and standard deviation over the seeds, `()` or `(tasks,)`; the latter is None for a single seed."""
    values = np.array(curves, dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None


def _dense(rows: Sequence[Any] | None) -> list[Any]:
    """Return rows of counts with one for each pool entry, up to the last that any task selects."""
    sparse = [row for row in rows or () if isinstance(row, Mapping)]
    size = max((int(entry) + 1 for row in sparse for entry in row), default=1)
    return [
        [row.get(str(entry), 0) for entry in range(size)] if isinstance(row, Mapping) else row for row in rows or ()
    ]


def _grid(results: Mapping[str, Any], key: str) -> Values:
    """Return `results[key]` as a float array `(rows, columns)`, NaN for None; a row that is None is all NaN."""
    rows = results.get(key)
    if not rows:
        raise ValueError(f"results have no {key!r}; its figure needs a non-empty list of rows.")
    lengths = {len(row) for row in rows if row is not None}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"results[{key!r}] must have rows of one length above 0; got lengths {sorted(lengths)}.")
    return np.array([[None] * max(lengths) if row is None else row for row in rows], dtype=float)
