"""Measure and draw how prompts and keys move with the tasks, from the files of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..runs.folder import ADAPTER, ADAPTER_CONFIG
from ..runs.reading import read_json, read_tensors
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
    from matplotlib.figure import Figure

PROMPTS_AND_KEYS = "prompts_and_keys.png"
Changes = Mapping[str, Mapping[str, Sequence[float | None]]]
"""By the kind of parameter, `{"during": [...], "since": [...]}`: percent of its length, a value for each task."""


def changes_of(folders: Sequence[Path]) -> dict[str, dict[str, list[float | None]]]:
    """Return how far an adapter's prompts and keys have moved, during each task and since the first.

    Args:
        folders: of the tasks, in order, without gaps. What grew in between is compared as far as both have it.

    Returns:
        By the kind of parameter, such as "prompt" and "key", `{"during": [...], "since": [...]}`: the length of the
        change as a percentage of the earlier length, over all parameters of the kind; None for the first task, and where
        the earlier length is zero. Kinds that are zero throughout are left out. Empty where there are fewer than two
        tasks, or no prompts.
    """
    states = [_prompts(folder) for folder in folders]
    if len(states) < 2 or not all(states):
        return {}
    kinds = [kind for kind in states[0] if all(kind in state for state in states)]
    found = {
        kind: {
            "during": [
                None,
                *(_change(before[kind], after[kind]) for before, after in zip(states, states[1:], strict=False)),
            ],
            "since": [0.0, *(_change(states[0][kind], after[kind]) for after in states[1:])],
        }
        for kind in kinds
    }
    return {kind: of for kind, of in found.items() if any(value is not None for value in of["during"])}


def _prompts(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the adapter's own parameters by their kind and name; none for a whole model, or an adapter without prompts."""
    if not ((config := folder / ADAPTER_CONFIG).is_file() and (file := folder / ADAPTER).is_file()):
        return {}
    prefix = f"{str(read_json(config).get('peft_type')).lower()}_"
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(file).items():
        last = name.rpartition(".")[2]
        if last.startswith(prefix) and not last.endswith("_features") and tensor.numel():
            found.setdefault(last.removeprefix(prefix).replace("_", " "), {})[name] = tensor
    return found


def _change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float | None:
    """Return the length of the change in percent of the earlier length, None where that is zero."""
    moved = length = 0.0
    for name, old in before.items():
        if name not in after or after[name].ndim != old.ndim:
            continue
        shared = tuple(slice(min(sizes)) for sizes in zip(old.shape, after[name].shape, strict=True))
        a, b = old[shared].to(torch.float64), after[name][shared].to(torch.float64)
        moved, length = moved + float((b - a).square().sum()), length + float(a.square().sum())
    return 100 * (moved / length) ** 0.5 if length else None


def prompts_and_keys(changes: Changes, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw how far prompts and keys have moved with the tasks, as a share of their length.

    Args:
        changes: from [`changes_of`].
        path: the PNG file to write, with an SVG beside it; its folder is made.

    Raises:
        ValueError: nothing to draw, or `path` does not end in `.png`.
    """
    if not changes:
        raise ValueError("no parameter is known after two tasks: nothing can be drawn.")
    looks = line_looks(changes)
    fig = new_figure(8.4, 2.7)
    titles = {"during": "Change during the task (% of length)", "since": "Change since task 1 (% of length)"}
    grid, _ = grid_of_panels(fig, 1, 2, 2)
    for axes, (name, title) in zip(grid, titles.items(), strict=True):
        own = {label: np.array(of[name], dtype=float) for label, of in changes.items()}
        tasks = max(map(len, own.values()))
        for label, values in own.items():
            axes.plot(np.arange(1, len(values) + 1), values, label=label, **{**common_look(tasks), **looks[label]})
        below = number_tasks(axes, tasks)
        scale_y(axes, np.concatenate(list(own.values())), 1, True)
        dress_panel(axes, title, below)
    add_legend(fig, grid, columns=4)
    return finish(fig, path)
