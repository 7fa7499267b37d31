"""Say in a sentence what a comparison shows, computed from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .formatting import is_number

Row = Mapping[str, Any]  # content of `results.json`, or of a frozen classifier's row


def verdict(projected: Row, twin: Row) -> str | None:
    """Compare a run with its unprojected twin: how far old features moved, and what became of the accuracy.

    Args:
        projected: the run's results.
        twin: those of the twin.

    Returns:
        One sentence; None where there is nothing to compare, as after a single task, or without old test images.
    """
    moved, other = projected["drift"][-1], twin["drift"][-1]
    accuracy, before = projected["average_accuracy"], twin["average_accuracy"]
    if not all(map(is_number, (moved, other, accuracy, before))) or not other:
        return None
    here = f"old images' features moved {moved:.3f} instead of {other:.3f}"
    reached, better = _accuracy(accuracy, before)
    if moved >= other:
        return f"Projection does not pay here: with it, {here}, and average accuracy is {reached}."
    less = f" ({other / moved:.1f} times less)" if moved else ""
    if better >= 0:
        return f"With projection, {here}{less}, and average accuracy is {reached}."
    return f"With projection, {here}{less}, but that costs accuracy here: the average is {reached}."


def _accuracy(accuracy: float, before: float) -> tuple[str, float]:
    """Return two accuracies as text, and their difference, 0.0 if the text shows none."""
    now, then = f"{accuracy:.1f}", f"{before:.1f}"
    if now == then and f"{accuracy:.2f}" != f"{before:.2f}":
        now, then = f"{accuracy:.2f}", f"{before:.2f}"
    if now == then:
        return f"the same, {now} %", 0.0
    return f"{now} instead of {then} %", accuracy - before


def frozen_wins(rows: Mapping[str, Row], embedded: bool) -> str | None:
    """Say why classifiers on frozen features are above all runs that were trained; None if they are not.

    Args:
        rows: results by the name of the row; runs that were trained have a "method", and features of a backbone with
            random weights, a lower bound, have names that begin with "random".
        embedded: whether images and backbone are those of this package.
    """
    accuracies = {name: row["average_accuracy"] for name, row in rows.items()}
    known = [accuracies[name] for name, row in rows.items() if "method" in row and is_number(accuracies[name])]
    frozen = [name for name, row in rows.items() if "method" not in row and not name.startswith("random, ")]
    if not known or not frozen:
        return None
    best = max(frozen, key=lambda name: accuracies[name])
    if accuracies[best] <= max(known):
        return None
    wins = f"{best} wins here ({accuracies[best]:.2f} %)"
    if not embedded:
        linear = all(row.get("head") == "linear" for row in rows.values() if "method" in row)
        hint = " A head of class statistics often does better: --head statistics." if linear else ""
        return (
            f"{wins}: the frozen backbone's own features separate these classes better than trained prompts do.{hint}"
        )
    return (
        f"{wins}: digits are easy for a backbone that was pre-trained on glyphs. For a stream where prompts win, and "
        "projection pays, see model_cards/cifar100-shifted."
    )
