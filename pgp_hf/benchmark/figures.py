"""Draw the figures of the benchmark from the files of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..report import several
from ..report.figures import forgetting_after_tasks

Run = dict[str, Any]
Curves = Sequence[Sequence[float | None]]  # one for each seed, None where nothing was measured
CLOSED = "closed form"  # the head of a row without prompts
HEADS = {"linear": "linear head", "statistics": "statistics head"}
SWEPT = "l2p-functional"


def own_head(run: Run, head: str) -> dict[str, Any] | None:
    """Return the results of a head; a classifier in closed form counts as the statistics head."""
    return run["heads"].get(head) or (run["heads"].get(CLOSED) if head == "statistics" else None)


def of_method(runs: list[Run]) -> bool:
    """Return True for the runs of a row whose method trains a plain model."""
    return "method" in runs[0]["settings"]


def figures(rows: dict[str, list[Run]], folder: Path) -> dict[Path, str]:
    """Draw `accuracy.png`, `protection.png` if rows differ in PGP alone, and `sensitivity.png` if they vary a setting.

    Beside each PNG file stands an SVG of the same name.

    Args:
        rows: the runs of each row, by its name.
        folder: where the files are written.

    Returns:
        The caption of each PNG file.
    """
    drawn = {}
    panels, known = accuracy_panels(rows), known_classes(rows)
    if panels:
        several.accuracy_bands(panels, path := folder / "accuracy.png", known=known)
        drawn[path] = (
            "Mean over a row's seeds, with a band of one standard deviation where it has several. Lines have the names "
            "of rows without that of the panel's method; of the rows without prompts the best one at the end is in each "
            "panel. A joint row has one task: the level line."
            + " Methods have two panels, without and with exemplars."
            * any(map(of_method, rows.values()))
        )
    if heads := protection_panels(rows):
        several.accuracy_and_forgetting(heads, path := folder / "protection.png", known=known)
        drawn[path] = (
            "As Figure 3 of the PGP paper: average accuracy and forgetting after each task, without projection and with "
            "PGP. Mean over a row's seeds, with a band of one standard deviation where it has several."
        )
    points, usual = sensitivity_points(rows, SWEPT)
    if points:
        seeds = {field: {len(found["drift"]) for found in values.values()}.pop() for field, values in points.items()}
        several.sensitivity(points, path := folder / "sensitivity.png", usual)
        drawn[path] = (
            f"Row {SWEPT} (grey bars) and rows that differ from it in one setting; values at equal distances; seeds: "
            f"{', '.join(f'{field} {count}' for field, count in seeds.items())}; bars are one standard deviation."
        )
    return drawn


def known_classes(rows: dict[str, list[Run]]) -> list[int] | None:
    """Return the number of classes known after each task, where all runs divide their classes equally; else None."""
    runs = [run for each in rows.values() for run in each]
    tasks, classes = max(run["num_tasks"] for run in runs), runs[0]["num_classes"]
    data = [run["settings"]["data"] for run in runs]
    if classes % tasks or any(run["num_classes"] != classes or run["num_tasks"] not in (1, tasks) for run in runs):
        return None
    if any(one.get("init_classes") or one.get("increment") for one in data):
        return None
    return [classes // tasks * (t + 1) for t in range(tasks)]


TITLES = {"l2p": "L2P", "dualprompt": "DualPrompt", "clip": "CLIP"}


def protection_panels(rows: dict[str, list[Run]]) -> dict[str, dict[str, tuple[Curves, Curves]]]:
    """Return by head and label the accuracies and the forgetting of each row without projection and its twin with PGP."""
    pairs = {
        label: rows[name]
        for kind, title in TITLES.items()
        for name, label in ((f"{kind}-none", title), (f"{kind}-pgp", f"{title}-PGP"))
        if {f"{kind}-none", f"{kind}-pgp"} <= rows.keys()
    }
    found: dict[str, dict[str, tuple[Curves, Curves]]] = {}
    for head, title in HEADS.items():
        own = {label: runs for label, runs in pairs.items() if all(head in run["heads"] for run in runs)}
        if own:
            found[title] = {
                label: (_curves(runs, head), [forgetting_after_tasks(run["heads"][head]) for run in runs])
                for label, runs in own.items()
            }
    return found


def accuracy_panels(rows: dict[str, list[Run]]) -> dict[str, dict[str, list[list[float]]]]:
    """Return the average accuracy after each task, by "METHOD, HEAD" and row.

    A row is named by what follows its method's name; rows with settings in their name are left out. Each panel also has
    the classifier in closed form that is best at the end. Methods on plain models, all of their rows, have two panels
    together: those that keep exemplars have their own.
    """
    methods = {name: runs for name, runs in rows.items() if of_method(runs)}
    plain = {name: runs for name, runs in rows.items() if "@" not in name and name not in methods}
    frozen = [name for name, runs in plain.items() if CLOSED in runs[0]["heads"]]
    frozen = sorted(frozen, key=lambda name: np.mean([run["heads"][CLOSED]["average_accuracy"] for run in rows[name]]))
    prompted = [name for name in plain if name not in frozen]
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for method in dict.fromkeys(name.partition("-")[0] for name in prompted):
        for head, title in HEADS.items():
            panel = panels.setdefault(f"{method}, {title}", {})
            panel.update({name: _curves(plain[name], CLOSED) for name in frozen[-1:]})
            own = [name for name in prompted if name.partition("-")[0] == method]
            panel.update({name.partition("-")[2]: _curves(plain[name], head) for name in own})
    for title, kept in (("methods without exemplars", False), ("methods with exemplars", True)):
        chosen = {name: runs for name, runs in methods.items() if (runs[0]["memory"]["images"] > 0) is kept}
        if chosen:
            panels[title] = {name: _curves(plain[name], CLOSED) for name in frozen[-1:]}
            panels[title].update({name: _curves(runs, "linear") for name, runs in chosen.items()})
    return panels


def _curves(runs: list[Run], head: str) -> list[list[float]]:
    """Return the average accuracy after each task, for each run; one value where all tasks were learned as one."""
    found = [run["heads"][head]["per_task_average_accuracy"] for run in runs]
    return [[value for value in averages if value is not None] for averages in found]


def sensitivity_points(
    rows: dict[str, list[Run]], swept: str
) -> tuple[dict[str, dict[Any, dict[str, list[float]]]], dict[str, Any]]:
    """Return the results of rows `swept@field=value` by field, value and series, and the plain row's values of these.

    A field's points are those of the seeds that all of its rows have, so that they are paired; a field whose rows have
    no seed in common is left out.
    """
    found: dict[str, dict[Any, list[Run]]] = {}
    usual: dict[str, Any] = {}
    for name, runs in rows.items():
        base, _, setting = name.partition("@")
        if base == swept and setting and "," not in setting:
            field = setting.partition("=")[0]
            found.setdefault(field, {})[_setting(runs[0], field)] = runs
    for field, values in found.items():
        if swept in rows:
            usual[field] = _setting(rows[swept][0], field)
            values.setdefault(usual[field], rows[swept])
    points = {
        field: {value: _series([run for run in runs if run["seed"] in seeds]) for value, runs in values.items()}
        for field, values in found.items()
        if (seeds := _common_seeds(values.values()))
    }
    return points, usual


def _common_seeds(rows: Iterable[list[Run]]) -> set[int]:
    return set.intersection(*({run["seed"] for run in runs} for runs in rows))


def _setting(run: Run, field: str) -> Any:
    """Return the value of a setting, whichever part it belongs to."""
    parts = (part for part in run["settings"].values() if field in part)
    return next(parts)[field]


def _series(runs: list[Run]) -> dict[str, list[float]]:
    found = {title: [run["heads"][head]["average_accuracy"] for run in runs] for head, title in HEADS.items()}
    return {**found, "drift": [run["drift"][-1] for run in runs]}
