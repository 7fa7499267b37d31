"""Lay out tables of text, as Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]


def markdown(rows: Rows, left: Collection[str] | None = None) -> str:
    """Return a Markdown table.

    Args:
        rows: the header, then the rows, each with a cell for every column of the header.
        left: titles of the columns to align to the left, all others being aligned to the right; None sets no
            alignment.
    """
    header, *body = map(_line, rows)
    if left is None:
        rule = "|" + "---|" * len(rows[0])
    else:
        rule = _line(["---" if title in left else "---:" for title in rows[0]])
    return "\n".join([header, rule, *body])


def plain(rows: Rows) -> str:
    """Return a table for a terminal: the first column aligned to the left, the others to the right.

    Args:
        rows: the header, then the rows, each with a cell for every column of the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]
    return "\n".join([header, "-" * len(header), *body])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
