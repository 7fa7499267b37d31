"""Draw figures of a run: accuracy matrix, curves, stability, forgetting by task, prompts.

All are readable in grey and by colour-blind people: lines differ by marker and dash as well as by colour, heat-maps
run from dark to light and hold their numbers. Each function returns the matplotlib figure, and writes it as PNG and as
SVG where it is given a path. `manifest`, the content of `stream.json`, is optional everywhere; with it, the numbers of
classes stand beside those of the tasks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
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
    finish,
    fit_at_ends,
    grid_of_panels,
    heat_map,
    line_looks,
    name_ends,
    new_figure,
    number_tasks,
    reference_looks,
    scale_y,
)
from .movement import PROMPTS_AND_KEYS, changes_of, prompts_and_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]
Manifest = Mapping[str, Any]


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


def accuracy_matrix(
    results: Mapping[str, Any], path: StrPath | None = None, *, manifest: Manifest | None = None
) -> Figure:
    """Draw the accuracy matrix as a heat-map with the numbers in its cells, on a scale from 0 to 100 %.

    Args:
        results: the content of `results.json`; `accuracy_matrix` is needed, shape `(rows, tasks)` in percent with
            `None` where not evaluated. Where a task was seen and not measured, the cell is hatched; all others, and rows
            that are missing in an unfinished run, are left blank.
        path: the PNG file to write, with an SVG beside it; its folder is made.
        manifest: the content of `stream.json`.

    Raises:
        ValueError: the matrix is missing or ragged, or `path` does not end in `.png`.
    """
    values = _grid(results, "accuracy_matrix")
    rows, tasks = values.shape
    square = np.full((max(rows, tasks), tasks), np.nan)
    square[:rows] = values
    seen = np.tril(np.ones_like(square, dtype=bool))  # on and below the diagonal, in the rows of finished tasks
    seen[: first_task(results)] = seen[finished_tasks(results) :] = False
    decimals, lacking = 1 if tasks <= 12 else 0, seen & np.isnan(square)
    own, known = _class_counts(manifest)
    fig, axes = heat_map(
        square, low=0, high=100, bar="accuracy (%)", decimals=decimals, lacking=lacking, classes=(known, own)
    )
    axes.set_title("Accuracy on each task, after each task", fontsize=11)
    axes.set_xlabel("evaluated on task" + ("" if own is None else " (its classes)"))
    axes.set_ylabel("after training task" + ("" if known is None else " (classes known)"))
    return finish(fig, path)


def task_curves(
    results: Mapping[str, Any],
    path: StrPath | None = None,
    panels: Sequence[str] = tuple(PANELS),
    *,
    manifest: Manifest | None = None,
    references: Collection[str] = (),
) -> Figure:
    """Draw the state of a run, or of several runs side by side, after each task; a small panel for each quantity.

    Args:
        results: the content of one `results.json`, both of whose heads are drawn where it has two, or several of them
            by label: `{"L2P": {...}, "L2P-PGP": {...}}`, drawn on the same axes.
        path: the PNG file to write, with an SVG beside it; its folder is made.
        panels: which quantities, all by default: "accuracy", "forgetting", "drift", "changed" (selections), "rank".
            Those that no run has values for are left out; so is a rank of 0 throughout, as without projection. A run
            that learned all tasks as one has a point at the end, in "accuracy" alone. There is no point where a task
            that it needs was not measured.
        manifest: the content of `stream.json`, the same for all runs.
        references: labels of rows that trained nothing, such as classifiers on frozen features: thin grey lines, in the
            panels of accuracy and forgetting.

    Raises:
        ValueError: no run or nothing to draw, an unknown panel, a run that lacks its matrix, or `path` does not end in
            `.png`.
    """
    curves = _curves(results)
    unknown = [name for name in panels if name not in PANELS]
    if unknown:
        raise ValueError(f"panels names {unknown[0]!r}: choose among {', '.join(PANELS)}.")
    for label in references:
        curves[label] = {name: of for name, of in curves[label].items() if name in ("accuracy", "forgetting")}
    shown = [name for name in panels if any(name in of for of in curves.values())]
    if not shown:
        raise ValueError(f"the results hold no values of {', '.join(panels) or 'any panel'}: nothing can be drawn.")
    names = [label for label in curves if label]
    direct = fit_at_ends(names)
    looks = {**line_looks([name for name in names if name not in references] or [""]), **reference_looks(references)}
    looks.setdefault("", next(iter(looks.values())))  # what both heads share

    columns = 3 if len(shown) == 3 else min(2, len(shown))
    rows = -(-len(shown) // columns)
    fig = new_figure(4.2 * columns if columns < 3 else 9.6, 2.7 * rows)
    grid, blank = grid_of_panels(fig, rows, columns, len(shown))
    for axes, name in zip(grid, shown, strict=True):
        own = {label: of[name] for label, of in curves.items() if name in of}
        longest = max(map(len, own.values()))
        for label, values in own.items():
            axes.plot(np.arange(1, len(values) + 1), values, label=label, **{**common_look(longest), **looks[label]})
        below = number_tasks(axes, longest, _class_counts(manifest)[1])
        scale_y(axes, np.concatenate(list(own.values())), *PANELS[name][1:], whole=name == "rank")
        dress_panel(axes, PANELS[name].title, below)
        if direct and len(names) > 1:
            ends = {label: _end(values) for label, values in own.items() if label}
            name_ends(axes, ends, {label: looks[label]["color"] for label in ends})
    if len(names) > 1 and not direct:
        add_legend(fig, grid, columns=3, blank=blank)
    return finish(fig, path)


def comparison(
    rows: Mapping[str, Any],
    path: StrPath | None = None,
    panels: Sequence[str] = tuple(PANELS),
    *,
    manifest: Manifest | None = None,
) -> Figure:
    """Draw the rows of a comparison: runs as [`task_curves`] does, with those that trained nothing as references.

    Args:
        rows: the content of `comparison.json`, results by the name of the row; those without a "method" trained nothing,
            and those without an accuracy matrix, such as refused ones, are left out.
        path, panels, manifest: as [`task_curves`] takes them.

    Raises:
        ValueError: as [`task_curves`] does.
    """
    drawn = {name: row for name, row in rows.items() if row.get("accuracy_matrix")}
    references = [name for name, row in drawn.items() if "method" not in row]
    runs = {name: row for name, row in drawn.items() if name not in references}
    ordered = {**runs, **{name: drawn[name] for name in references}}
    return task_curves(ordered, path, panels, manifest=manifest, references=references)


def forgetting_by_task(
    results: Mapping[str, Any], path: StrPath | None = None, *, manifest: Manifest | None = None
) -> Figure:
    """Draw what each task has lost: its best accuracy before the last task, and its accuracy now.

    Args:
        results: the content of `results.json`; of two heads, the chosen one is drawn. Tasks that were not measured at
            both times are left out.
        path: the PNG file to write, with an SVG beside it; its folder is made.
        manifest: the content of `stream.json`.

    Raises:
        ValueError: no task has two accuracies, the matrix is missing or ragged, or `path` does not end in `.png`.
    """
    best, now = _before_and_now(results)
    both = np.flatnonzero(np.isfinite(best) & np.isfinite(now))
    if not len(both):
        raise ValueError("no earlier task was measured before and after the last one: nothing can be drawn.")
    fig = new_figure(max(4.2, 0.45 * len(best) + 1.6), 3.0)
    axes = fig.add_subplot()
    axes.set_axisbelow(True)
    axes.vlines(both + 1, now[both], best[both], color="#BBBBBB", linewidth=5, zorder=1)
    looks = {"best before": ("o", "white", best), "now": ("s", "#D55E00", now)}
    for label, (marker, face, values) in looks.items():
        axes.plot(
            both + 1, values[both], marker, label=label, markersize=7, markerfacecolor=face, markeredgecolor="black",
            markeredgewidth=1.2, clip_on=False,
        )  # fmt: skip
    scale_y(axes, np.concatenate([best[both], now[both]]), 10, False)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.1 * (high - low), high)
    if len(both) <= 24:
        for place in both:
            axes.annotate(
                f"{now[place] - best[place]:+.1f}".replace("-", "\N{MINUS SIGN}"),
                (place + 1, min(now[place], best[place])), (0, -7), textcoords="offset points", ha="center", va="top",
                fontsize=8,
            )  # fmt: skip
    own, _ = _class_counts(manifest)
    number_tasks(axes, len(best), own)
    axes.set_xlim(0.5, len(best) + 0.5)
    dress_panel(axes, "Accuracy on each earlier task (%)", "task" + ("" if own is None else " (its classes)"))
    add_legend(fig, [axes], columns=2)
    return finish(fig, path)


def _before_and_now(results: Mapping[str, Any]) -> tuple[Values, Values]:
    """Return for all tasks before the last finished one the best accuracy before it, and the accuracy after it."""
    values = _grid(results, "accuracy_matrix")[: finished_tasks(results)]
    last = len(values) - 1
    if first_task(results) or last < 1:
        return np.empty(0), np.empty(0)
    earlier = values[:last, :last]
    return np.where(np.isfinite(earlier).any(0), np.nanmax(earlier, axis=0, initial=-np.inf), np.nan), values[
        last, :last
    ]


def prompt_usage(
    results: Mapping[str, Any], path: StrPath | None = None, *, manifest: Manifest | None = None
) -> Figure:
    """Draw which pool entries each task's test images select, as a share of the task's selections.

    Args:
        results: `prompt_usage` is needed, counts of shape `(tasks, pool entries)`: how many of the task's test images
            selected the entry after the last trained task. A row may be `None`, for a task that was not measured
            (hatched), or all zero (left blank), or `{entry: count}` for those that were selected in a large pool.
        path: the PNG file to write, with an SVG beside it; its folder is made.
        manifest: the content of `stream.json`.

    Raises:
        ValueError: the counts are missing, negative or ragged, or `path` does not end in `.png`.
    """
    counts = _grid({"prompt_usage": _dense(results.get("prompt_usage"))}, "prompt_usage")
    if (counts < 0).any():
        raise ValueError(f"prompt_usage holds counts of images, so none may be negative; got {np.nanmin(counts)}.")
    total = counts.sum(axis=1, keepdims=True)
    share = 100 * np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    high = float(np.nanmax(share, initial=1.0))
    own, _ = _class_counts(manifest)
    fig, axes = heat_map(
        share,
        low=0,
        high=high,
        bar="share of selections (%)",
        decimals=0,
        lacking=np.isnan(counts),
        classes=(own, None),
    )
    axes.set_title("Prompts selected by each task's test images", fontsize=11)
    axes.set_xlabel("pool entry")
    axes.set_ylabel("task" + ("" if own is None else " (its classes)"))
    return finish(fig, path)


_FIGURES: dict[str, Callable[..., Figure]] = {
    "accuracy_matrix.png": accuracy_matrix,
    "task_curves.png": partial(task_curves, panels=("accuracy", "forgetting")),
    "forgetting_by_task.png": forgetting_by_task,
    "stability.png": partial(task_curves, panels=("drift", "changed", "rank")),
    "prompt_usage.png": prompt_usage,
}


def figure_names(results: Mapping[str, Any]) -> list[str]:
    """Return the names of the PNG files that [`save_figures`] writes from the results alone.

    Curves, stability and prompt usage are written only where they are recorded, and no curves where all tasks were
    learned as one.
    """
    measured = bool(results.get("accuracy_matrix")) and not first_task(results)
    curves = _curves(results).values() if measured else []
    recorded = {
        "task_curves.png": any("accuracy" in of or "forgetting" in of for of in curves),
        "forgetting_by_task.png": measured and bool(np.isfinite(np.subtract(*_before_and_now(results))).any()),
        "stability.png": bool(_movements(results)),
        "prompt_usage.png": bool(results.get("prompt_usage")),
    }
    return [name for name in _FIGURES if recorded.get(name, True)]


def save_figures(
    results: Mapping[str, Any],
    folder: StrPath,
    manifest: Manifest | None = None,
    revisions: Sequence[Path] = (),
) -> list[Path]:
    """Write all figures of one run, as PNG and as SVG, into `folder`, which is created if needed.

    Args:
        results: the content of `results.json`.
        folder: where the files are written.
        manifest: the content of `stream.json`.
        revisions: folders of all finished tasks, in order; with them, the movement of prompts and keys is drawn.

    Returns:
        The paths of the PNG files.

    Raises:
        ValueError: as for each of the figures.
    """
    paths = [Path(folder) / name for name in figure_names(results)]
    for path in paths:
        _FIGURES[path.name](results, path, manifest=manifest)
    if changes := changes_of(revisions):
        prompts_and_keys(changes, path := Path(folder) / PROMPTS_AND_KEYS)
        paths.append(path)
    return paths


def _class_counts(manifest: Manifest | None) -> tuple[list[int] | None, list[int] | None]:
    """Return the number of classes of each task, and of those known after it; None for both without a manifest."""
    if manifest is None:
        return None, None
    own = [set(task["classes"]) for task in manifest["tasks"]]
    return [len(classes) for classes in own], [len(set().union(*own[: t + 1])) for t in range(len(own))]


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
        average = head["per_task_average_accuracy"]
    else:
        head = {"accuracy_matrix": head.get("accuracy_matrix") or run["accuracy_matrix"]}
        average = metrics.summarize(head["accuracy_matrix"], run.get("finished_tasks"))["per_task_average_accuracy"]
    lost = forgetting_after_tasks(head, len(average))
    found = {"accuracy": np.array(average, dtype=float)}
    if not first_task(run):
        found["forgetting"] = np.array(lost, dtype=float)
    return _with_points(found)


def forgetting_after_tasks(head: Mapping[str, Any], tasks: int | None = None) -> list[float | None]:
    """Return the forgetting after each task, of a head with an accuracy matrix or with what is kept instead of it."""
    if "per_task_forgetting" in head:
        return list(head["per_task_forgetting"])
    return list(Accuracies.of(head["accuracy_matrix"][:tasks]).forgetting)


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
