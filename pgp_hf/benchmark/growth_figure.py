"""Draw how the cost of a task grows, a panel for each quantity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..report.drawing import (
    add_legend,
    common_look,
    dress_panel,
    grid_of_panels,
    line_looks,
    new_figure,
    reference_looks,
    save,
)

NAMES = {
    "training": "training",
    "statistics": "statistics",
    "evaluation": "evaluation",
    "files": "writing files",
    "memory": "peak memory",
    "whole run": "bytes of the run",
}
STRAIGHT = "straight line"


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draw all measures relative to their smallest size, on logarithmic axes.

    Args:
        content: of `growth.json`.
        path: of the PNG file; an SVG is written beside it.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    columns = min(4, len(content))
    rows = -(-len(content) // columns)
    fig = new_figure(2.9 * columns + 0.6, 2.6 * rows + 0.5)
    grid, blank = grid_of_panels(fig, rows, columns, len(content))
    looks, reference = line_looks(NAMES.values()), reference_looks([STRAIGHT])[STRAIGHT]
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axes, (name, sweep) in zip(grid, content.items(), strict=True):
        sizes = np.asarray(sweep["sizes"], dtype=np.float64)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.plot(sizes, sizes / sizes[0], label=STRAIGHT, **reference)
        for measure, label in NAMES.items():
            if measure in sweep["measures"]:
                values = np.asarray(sweep["measures"][measure]["values"], dtype=np.float64)
                axes.plot(sizes, values / values[0], label=label, **{**common_look(len(sizes)), **looks[label]})
        dress_panel(axes, "cost, smallest = 1", name)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(plain)
    add_legend(fig, grid, 4, blank)
    save(fig, path)
