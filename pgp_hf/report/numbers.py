"""Collect the numbers of a model card: rows of its tables, and the metrics in its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from ..runs.checks import first_task
from .formatting import MISSING, as_measured, as_text, escape, is_number, one_line
from .names import is_owned, public_name

_SUMMARY = {
    "average_accuracy": "Average accuracy",
    "forgetting": "Forgetting",
    "forgetting_clipped": "Forgetting, clipped",
    "backward_transfer": "Backward transfer",
    "learning_accuracy": "Learning accuracy",
}
_INDEXED = {"average_accuracy": "accuracy", "forgetting": "forgetting"}  # the metrics' types on the Hub


def run_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return a header and rows: one for the run, or one for each head, starting with the head that predicts."""
    heads, used = results.get("heads") or {}, results.get("head")
    changed = results.get("changed_selections")
    moved = [_at(results.get("drift"), -1, 3)]
    moved += [_at(changed, -1, 1, 100)] if changed else []
    summary, header = _SUMMARY, [*_SUMMARY.values(), "Drift", *(["Changed"] if changed else [])]
    if first_task(results):  # nothing else is defined
        summary = {"average_accuracy": _SUMMARY["average_accuracy"]}
        header, moved = [*summary.values()], []

    def row(of: Mapping[str, Any]) -> list[str]:
        return [*(as_measured(of[key], 2) if key in of else MISSING for key in summary), *moved]

    if not heads:
        return [header, row(results)]
    names = sorted(heads, key=lambda name: (name != used, name))
    rows = [[f"{name} (used to predict)" if name == used else name, *row(heads[name])] for name in names]
    return [["Head", *header], *rows]


def task_rows(
    results: Mapping[str, Any], manifest: Mapping[str, Any], trained: int, links: Mapping[int, str]
) -> list[list[str]]:
    """Return a header and a row per finished task; with one accuracy each if all tasks were learned as one.

    Args:
        results, manifest: content of `results.json` and `stream.json`.
        trained: number of finished tasks.
        links: by 0-based index, addresses of tasks' revisions elsewhere.
    """
    matrix, tasks = results["accuracy_matrix"], manifest.get("tasks") or []
    names, changed = manifest.get("label_names") or [], results.get("changed_selections")
    others = {name: of for name, of in (results.get("heads") or {}).items() if name != results.get("head")}
    protected = any(results.get("projection_rank") or [])
    rows = [
        [
            "Task", "Classes", "Train / test images", "When learned", "Now", "Average so far",
            *(f"Average so far, {name}" for name in others), "Drift", *(["Changed"] if changed else []),
            *(["Rank"] if protected else []),
        ]
    ]  # fmt: skip
    for i in range(trained):
        task = tasks[i] if i < len(tasks) else {}
        images = [as_text((task.get(part) or {}).get("num_images")) for part in ("train", "test")]
        rows.append(
            [
                f"[{i + 1}]({links[i]})" if i in links else str(i + 1),
                _classes(task.get("classes") or [], names),
                " / ".join(images),
                _at(matrix[i], i, 1),
                _at(matrix[trained - 1], i, 1),
                _at(results.get("per_task_average_accuracy"), i, 1),
                *(_at(of.get("per_task_average_accuracy"), i, 1) for of in others.values()),
                _at(results.get("drift"), i, 3),
                *([_at(changed, i, 1, 100)] if changed else []),
                *([_at(results.get("projection_rank"), i, 0)] if protected else []),
            ]
        )
    if first_task(results):
        return [[*rows[0][:3], "Accuracy"], *([*row[:3], row[4]] for row in rows[1:])]
    return rows


def eval_results(
    results: Mapping[str, Any], manifest: Mapping[str, Any], datasets: Sequence[str], trained: int
) -> list[EvalResult] | None:
    """Return average accuracy and forgetting, where known, in the form that the Hub's leaderboards read.

    Args:
        results, manifest: content of `results.json` and `stream.json`.
        datasets: names of those that the tasks are from; a path is named by its last part.
        trained: number of finished tasks.
    """
    scenario, num_tasks = results["scenario"], int(results["num_tasks"])
    names = list(map(public_name, datasets)) or ["unnamed dataset"]
    public = names[0] if len(names) == 1 else " and ".join(name.split("/")[-1] for name in names)
    so_far = f", after task {trained}" if trained < num_tasks else ""
    shift = {"shift": manifest["shift"]} if manifest.get("shift") else {}
    conditions = {"after_task": trained, "head": results.get("head"), "eval_mask": results.get("eval_mask")}
    found = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=datasets[0] if len(datasets) == 1 and is_owned(datasets[0]) else "other",  # an id on the Hub
            dataset_name=f"Split {public.split('/')[-1]} ({num_tasks} tasks, {scenario.replace('_', '-')}{so_far})",
            dataset_split="validation" if manifest.get("train_val_split") else "test",
            dataset_args={"scenario": scenario, "num_tasks": num_tasks, **shift, "seed": results.get("seed")},
            metric_type=kind,
            metric_name=_SUMMARY[key],
            metric_value=round(float(results[key]), 2),
            metric_args={name: value for name, value in conditions.items() if value is not None},
        )
        for key, kind in _INDEXED.items()
        if is_number(results.get(key))
    ]
    return found or None


def _classes(classes: Sequence[int], names: Sequence[str], most: int = 5) -> str:
    shown = [_short(names[c]) if c < len(names) else str(c) for c in classes[:most]]
    between = "; " if any("," in name for name in shown) else ", "  # as in "tench, Tinca tinca"
    rest = f" and {len(classes) - most} more" if len(classes) > most else ""
    return between.join(map(escape, shown)) + rest or MISSING


def _short(name: object, most: int = 32) -> str:
    line = one_line(name)
    return line if len(line) <= most else f"{line[: most - 1].rstrip(' ,;')}…"


def _at(values: Any, index: int, digits: int, scale: int = 1) -> str:
    """Return an entry of a list with `digits` decimals; a dash where the list has none."""
    if not values or index >= len(values):
        return MISSING
    value = values[index]
    return as_measured(scale * value if is_number(value) and scale > 1 else value, digits)
