"""Check that a revision's files are consistent; each check raises ValueError with the file and the problem."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.manifest import divide
from .folder import ADAPTER_CONFIG, DESCRIPTION, MANIFEST, MODEL_CONFIG


def check_stream_file(manifest: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless `stream.json` divides the classes of the model into tasks and names them.

    Args:
        config: content of `adapter_config.json` or, where a whole model has learned, `config.json`.
    """
    names, count = manifest.get("label_names"), manifest.get("num_classes")
    try:
        divide(manifest)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} does not describe a stream ({type(error).__name__}: {error}).") from error
    except ValueError as error:
        raise ValueError(f"{path} has {error}") from error
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: label_names are not {count} strings, one per class.")
    if (own := config.get("id2label")) is not None:
        _check_names(names, own, path, ADAPTER_CONFIG if "peft_type" in config else MODEL_CONFIG)


def _check_names(names: list[str], own: Any, path: Path, file: str) -> None:
    """Raise ValueError if the model, by `id2label` in its file, lacks a class, or has one of these names for another.

    Other names are the user's own, such as texts of CLIP or placeholders.
    """
    if not isinstance(own, dict) or len(own) != len(names):
        raise ValueError(f"{path} has {len(names)} classes, but id2label in {file} has another number.")
    labels = {name: label for label, name in enumerate(names)}
    for label, name in enumerate(names):
        found = own.get(str(label))
        if not isinstance(found, str) or labels.get(found, label) != label:
            raise ValueError(
                f"{path} names class {label} {name!r:.80}, but id2label in {file} names it {found!r:.80}: expected the same "
                "names. Fetch the folder again."
            )


def check_results_file(results: dict[str, Any], manifest: dict[str, Any], path: Path) -> int:
    """Return the number of finished tasks; raise ValueError unless `results.json` is complete and fits `stream.json`."""
    size = manifest["num_tasks"]
    if results.get("num_tasks") != size or results.get("scenario") != manifest.get("scenario"):
        raise ValueError(f"{path} and {MANIFEST} disagree about num_tasks or scenario.")
    tasks = _check_matrix(results, size, path)
    _check_lists(results, tasks, path)
    digests = results.get("sha256", {})
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(f"{path}: sha256 is not an object of digests by file name.")
    if results.get("continues") is not None:
        _check_origin(results["continues"], tasks, path)
    return tasks


def finished_tasks(results: Mapping[str, Any]) -> int:
    """Return the number of tasks that had ended when the last row of the accuracy matrix was measured."""
    if "finished_tasks" in results:
        return results["finished_tasks"]
    # a file of before there were tasks without test images: each row is complete
    matrix = results.get("accuracy_matrix") or []
    return max((i + 1 for i, row in enumerate(matrix) if row and row[0] is not None), default=0)


def first_task(results: Mapping[str, Any]) -> int:
    """Return the 0-based index of the first task with a row, above 0 where several tasks were learned as one."""
    if "finished_tasks" in results:
        return results.get("first_task", 0)
    matrix = results.get("accuracy_matrix") or []
    return next((i for i, row in enumerate(matrix) if any(value is not None for value in row or ())), 0)


def origin_on_hub(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the newest revision on the Hub that a run goes on from, be it through local folders; None if there is none.

    The tasks of that revision are in its repository, or linked there.
    """
    origin = results.get("continues")
    while origin and not origin.get("repo"):
        origin = origin.get("continues")
    return origin or None


def check_basis(name: str, shape: tuple[int, ...], parameter: tuple[int, ...] | None, info: Any, path: Path) -> None:
    """Raise ValueError unless a basis `(*batch, n, r)` fits its parameter and its description."""
    if parameter is None:
        raise ValueError(f"{path}: {name!r} has a basis, but is not a parameter of the model beside it.")
    if not isinstance(info, dict):
        raise ValueError(f"{path}: {name!r} is not described in {DESCRIPTION}.")
    seen, batch, complement = info.get("shape"), info.get("batch_dims"), info.get("complement")
    fits = (
        isinstance(seen, list)
        and type(batch) is int
        and len(seen) == batch + 2
        and all(type(n) is int and n > 0 for n in seen)
        and math.prod(seen) == math.prod(parameter)
        and shape == (*seen[:batch], seen[-1], info.get("rank") if complement is None else shape[-1])
        and shape[-1] <= shape[-2]
        and (complement is None or _is_flags(complement, math.prod(seen[:batch])))
    )
    if not fits:
        raise ValueError(
            f"{path}: the basis of {name!r} has shape {shape}, its description shape={seen}, batch_dims={batch}, "
            f"rank={info.get('rank')}, the parameter {parameter}: expected (*batch, n, rank) for the parameter seen as "
            "(*batch, rows, n)."
        )


def _is_flags(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(flag) is bool for flag in value)


def check_method_file(method: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless `method.json` has a `name` and `settings`; `state` and `card` may be absent."""
    if not isinstance(method.get("name"), str):
        raise ValueError(f"{path} has name={method.get('name')!r}: expected the name of a method.")
    for key, value in {"settings": None, "state": {}, "card": {}, **method}.items():
        if key in ("settings", "state", "card") and not isinstance(value, dict):
            raise ValueError(f"{path} has {key}={str(value)[:60]}: expected an object.")


def _check_matrix(results: dict[str, Any], size: int, path: Path) -> int:
    """Return the number of tasks that had ended; raise ValueError unless the accuracy matrix of `size` tasks fits it."""
    matrix = results.get("accuracy_matrix")
    if (
        not isinstance(matrix, list)
        or len(matrix) != size
        or not all(isinstance(row, list) and len(row) == size and all(map(_is_percent, row)) for row in matrix)
    ):
        raise ValueError(f"{path}: accuracy_matrix is not {size} rows of {size} numbers in 0 to 100, or null.")
    told, first, tasks = "finished_tasks" in results, first_task(results), finished_tasks(results)
    if told and not (_is_count(tasks, 1, size) and _is_count(first, 0, tasks - 1)):
        raise ValueError(
            f"{path} has finished_tasks={tasks!r}, first_task={first!r}: expected a number from 1 to the {size} tasks of "
            "the stream, and one from 0 to below it."
        )
    rows = range(first, tasks)
    if told:
        _check_gaps(results, rows, path)
    elif not rows or any((value is None) == (i in rows) for i, row in enumerate(matrix) for value in row[: i + 1]):
        raise ValueError(
            f"{path}: accuracy_matrix lacks entries: row i has tasks 0 to i once task i has ended, and only the first rows "
            "may be missing, each as a whole."
        )
    return tasks


def _check_gaps(results: dict[str, Any], rows: range, path: Path) -> None:
    """Raise ValueError unless an accuracy matrix has values in these rows alone, and lacks those that no average has.

    Within the rows, null stands for a task whose test images were not there.
    """
    matrix, averages = results["accuracy_matrix"], results.get("per_task_average_accuracy")
    if any(value is not None for i, row in enumerate(matrix) if i not in rows for value in row[: i + 1]):
        raise ValueError(
            f"{path}: accuracy_matrix has values outside the rows {rows.start} to {rows.stop - 1}, which finished_tasks and "
            "first_task allow."
        )
    if not isinstance(averages, list) or len(averages) != rows.stop:
        raise ValueError(
            f"{path}: per_task_average_accuracy={str(averages)[:60]} is not {rows.stop} values, one per finished task."
        )
    for i in rows:
        lacks = None in matrix[i][: i + 1]
        if lacks != (averages[i] is None):
            what = "lacks entries" if lacks else "lacks no entry"
            raise ValueError(
                f"{path}: accuracy_matrix {what} in row {i}, and per_task_average_accuracy[{i}] is {averages[i]}: expected "
                f"{'null' if lacks else 'their mean'}."
            )


def _check_lists(results: dict[str, Any], tasks: int, path: Path) -> None:
    """Raise ValueError unless drift and rank have a value per finished task; no drift where nothing was compared."""
    matrix, first = results["accuracy_matrix"], first_task(results)
    for name in ("drift", "projection_rank"):
        values = results.get(name)
        gaps = "finished_tasks" in results and name == "drift"
        if (
            not isinstance(values, list)
            or len(values) != tasks
            or not all((_is_number(v) and v >= 0) or (v is None and gaps and i > first) for i, v in enumerate(values))
        ):
            raise ValueError(
                f"{path}: {name}={str(values)[:60]} is not {tasks} numbers from 0, one per finished task."
            )
    for i in range(first + 1, tasks):
        if results["drift"][i] is not None and all(value is None for value in matrix[i][first:i]):
            raise ValueError(
                f"{path}: drift[{i}]={results['drift'][i]}, but no accuracy of an earlier task in row {i} of "
                "accuracy_matrix: expected null."
            )


def _check_origin(origin: Any, tasks: int, path: Path) -> None:
    """Raise ValueError unless `continues` names a revision of fewer than `tasks` tasks, and so on for its own origin."""
    while origin is not None:
        if (
            not isinstance(origin, dict)
            or not isinstance(origin.get("repo"), str | None)
            or not (isinstance(origin.get("revision"), str) and re.fullmatch(r"[\w./-]+", origin["revision"]))
            or not _is_commit(origin.get("commit"))
            or not _is_count(origin.get("tasks"), 1, tasks - 1)
        ):
            raise ValueError(
                f"{path} has continues={str(origin)[:120]}: expected repo (an id, or null), revision, commit (or null) and "
                f"a number of tasks from 1 to below {tasks}."
            )
        tasks, origin = origin["tasks"], origin.get("continues")


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_commit(value: Any) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{7,64}", value) is not None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_percent(value: Any) -> bool:
    return value is None or (_is_number(value) and 0 <= value <= 100)
