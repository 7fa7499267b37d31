"""Format values and free text for a model card."""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections.abc import Mapping
from typing import Any, TypeGuard

WIDTH = 100  # columns of what is printed
MISSING = "–"
NOT_MEASURED = "not measured"


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def as_number(value: object, digits: int) -> str:
    """Return a number with `digits` decimals, a dash for anything else."""
    return f"{value:.{digits}f}" if is_number(value) else MISSING


def as_measured(value: object, digits: int) -> str:
    """Return a number of a run with `digits` decimals; of None, that it was not measured."""
    return NOT_MEASURED if value is None else as_number(value, digits)


def as_text(value: object) -> str:
    """Return a value as text, a dash for None."""
    return MISSING if value is None else str(value)


def as_settings(settings: Mapping[str, Any]) -> str:
    """Return settings as code, such as `` `energy=0.5`, `apply_to="update"` ``; "none" if there are none."""
    quoted = {name: f'"{value}"' if isinstance(value, str) else value for name, value in settings.items()}
    return ", ".join(f"`{name}={value}`" for name, value in quoted.items()) or "none"


def as_sentence(text: str) -> str:
    """Return a clause as a sentence on one line: with a capital letter and a full stop."""
    line = one_line(text)
    return f"{line[:1].upper()}{line[1:].removesuffix('.')}." if line else ""


def one_line(text: object) -> str:
    """Replace every run of white space in a text with one space."""
    return " ".join(str(text).split())


def fill(text: str, indent: str = "") -> str:
    """Return a text in lines of at most `WIDTH` columns, without breaking paths; `indent` is for all but the first."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def printable(text: object) -> str:
    """Return a text for a terminal: characters that steer it, or hide or turn others, are written as `\\x1b` and the like."""
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in str(text))


def _steers(c: str) -> bool:
    # control characters, what is invisible (directions of writing too), halves of surrogate pairs (in file names that are
    # not UTF-8), line ends; but scripts and emoji need the zero-width joiner and non-joiner
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"


def escape(text: object) -> str:
    """Escape free text for one line, or one table cell, of Markdown."""
    return re.sub(r"[\\|`*\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(text)).replace("<", "&lt;")
