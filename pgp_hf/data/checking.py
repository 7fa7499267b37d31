"""Check arguments, and shorten lists for error messages."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import Any


def shorten(values: Iterable[Any], limit: int = 10) -> str:
    """Return `values` for an error message: the first `limit`, then how many more there are."""
    values = list(values)
    more = f", ... ({len(values) - limit} more)" if len(values) > limit else ""
    return "[" + ", ".join(map(repr, values[:limit])) + more + "]"


def check_int(name: str, value: Any, low: int, high: int | None = None, *, expected: str = "an integer") -> int:
    """Return `value` as a plain int; raise TypeError unless it is an integer, ValueError unless within low..high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__})")
    number = operator.index(value)
    if number < low or (high is not None and number > high):
        span = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {span}, got {value}")
    return number


def check_optional_int(name: str, value: Any, low: int, none: str) -> int | None:
    """Return `value` as [`check_int`] does, or None if it is None; `none` explains None in the error message."""
    return None if value is None else check_int(name, value, low, expected=f"an integer or None ({none})")


def check_share(name: str, value: float | None) -> float | None:
    """Return `value` as a float, or None if it is None; raise TypeError or ValueError unless it lies between 0 and 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number between 0 and 1, got {value!r} ({type(value).__name__})")
    if value is not None and not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")
    return None if value is None else float(value)
