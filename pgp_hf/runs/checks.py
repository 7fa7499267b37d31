"""Whether a revision's files make sense together; each check raises ValueError with the file and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .folder import ADAPTER, ADAPTER_CONFIG, DESCRIPTION, MANIFEST


def check_stream_file(manifest: dict[str, Any], adapter: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless `stream.json` cuts the adapter's classes into tasks and names them."""
    names, tasks, count = (manifest.get(key) for key in ("label_names", "tasks", "num_classes"))
    try:
        classes = [label for task in tasks for label in task["classes"]]
        whole = type(count) is int and sorted(classes) == list(range(count)) and len(tasks) == manifest["num_tasks"]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a stream's manifest ({type(error).__name__}: {error}).") from error
    if not whole or not all(type(label) is int for label in classes) or not all(task["classes"] for task in tasks):
        raise ValueError(f"{path}: the tasks' classes are not 0 to {count} minus 1, each once, in num_tasks tasks.")
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: label_names are not {count} strings, one a class.")
    if (own := adapter.get("id2label")) is not None and (not isinstance(own, dict) or len(own) != count):
        raise ValueError(f"{path} has {count} classes, id2label of {ADAPTER_CONFIG} beside it another number.")


def check_results_file(results: dict[str, Any], manifest: dict[str, Any], path: Path) -> int:
    """Number of finished tasks; ValueError unless `results.json` is whole and belongs to the manifest."""
    size, matrix = manifest["num_tasks"], results.get("accuracy_matrix")
    if results.get("num_tasks") != size or results.get("scenario") != manifest.get("scenario"):
        raise ValueError(f"{path} and {MANIFEST} beside it disagree about num_tasks or scenario.")
    if (
        not isinstance(matrix, list)
        or len(matrix) != size
        or not all(isinstance(row, list) and len(row) == size and all(map(_is_percent, row)) for row in matrix)
    ):
        raise ValueError(f"{path}: accuracy_matrix is not {size} rows of {size} numbers in 0 to 100, or null.")
    tasks = finished_tasks(matrix)
    if tasks == 0 or any((value is None) != (i >= tasks) for i, row in enumerate(matrix) for value in row[: i + 1]):
        raise ValueError(f"{path}: accuracy_matrix lacks entries: row i has tasks 0 to i once task i has ended.")
    for name in ("drift", "projection_rank"):
        values = results.get(name)
        if not isinstance(values, list) or len(values) != tasks or not all(_is_number(v) and v >= 0 for v in values):
            raise ValueError(
                f"{path}: {name}={str(values)[:60]} is not {tasks} numbers from 0, one per finished task."
            )
    digests = results.get("sha256", {})
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(f"{path}: sha256 is not an object of digests by file name.")
    return tasks


def finished_tasks(matrix: list[list[float | None]]) -> int:
    """How many tasks an accuracy matrix has rows for."""
    return sum(row[0] is not None for row in matrix)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_percent(value: Any) -> bool:
    return value is None or (_is_number(value) and 0 <= value <= 100)


def check_basis(name: str, shape: tuple[int, ...], parameter: tuple[int, ...] | None, info: Any, path: Path) -> None:
    """Raise ValueError unless a basis `(*batch, n, r)` fits its parameter and its description."""
    if parameter is None:
        raise ValueError(f"{path}: {name!r} has a basis, but is no parameter in {ADAPTER} beside it.")
    if not isinstance(info, dict):
        raise ValueError(f"{path}: {name!r} is not described in {DESCRIPTION} beside it.")
    seen, batch = info.get("shape"), info.get("batch_dims")
    fits = (
        isinstance(seen, list)
        and type(batch) is int
        and len(seen) == batch + 2
        and all(type(n) is int and n > 0 for n in seen)
        and torch.Size(seen).numel() == torch.Size(parameter).numel()
        and shape == (*seen[:batch], seen[-1], info.get("rank"))
        and shape[-1] <= shape[-2]
    )
    if not fits:
        raise ValueError(
            f"{path}: the basis of {name!r} has shape {shape}, its description shape={seen}, batch_dims={batch}, "
            f"rank={info.get('rank')}, the parameter {parameter}: expected (*batch, n, rank) for the parameter seen as "
            "(*batch, rows, n)."
        )
