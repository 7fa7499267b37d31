"""Write small tables as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_LONGEST = 8  # names in a cell


def table(title: str, head: Sequence[object], rows: Sequence[Sequence[object]], shades: Any = None) -> str:
    """Return a table; all texts are escaped.

    Args:
        title: stands above it.
        head: of the columns.
        rows: of cells; None is left empty.
        shades: of cells, rows of numbers from 0 (white) to 1 (dark grey) that its text contrasts with, or None for a cell
            without one; by default there are none.
    """
    cells = [
        "".join(_cell(value, shades[i][j] if shades else None) for j, value in enumerate(row))
        for i, row in enumerate(rows)
    ]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    columns = "".join(f"<th>{escape(str(name))}</th>" for name in head)
    return f"<div><p><b>{escape(title)}</b></p><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"


def tasks_table(title: str, classes: Sequence[Sequence[str]], counts: Sequence[Sequence[int]]) -> str:
    """Return a table of tasks, by the names of their classes and their numbers of training and test images."""
    rows = [[t + 1, shorten_names(names), *counts[t]] for t, names in enumerate(classes)]
    return table(title, ["task", "classes", "training images", "test images"], rows)


def shorten_names(names: Sequence[str], most: int = _LONGEST) -> str:
    """Return the first names, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _cell(value: object, shade: float | None) -> str:
    style = ""
    if shade is not None:
        grey = round(255 - 175 * min(max(shade, 0.0), 1.0))
        style = f' style="background-color: rgb({grey}, {grey}, {grey}); color: {"white" if grey < 119 else "black"}"'
    return f"<td{style}>{'' if value is None else escape(str(value))}</td>"
