"""Check the values of a dataclass against its annotations: numbers, truth values and choices."""

from __future__ import annotations

import enum
import inspect
import math
import numbers
import types
from collections.abc import Hashable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_fields(given: object, skip: Sequence[type] = ()) -> None:
    """Check every field of a dataclass that is annotated as a number, a truth value or a choice, or any of these or None.

    Fields of other types, such as text and lists, are left alone. NumPy's numbers become Python's, which JSON takes.

    Args:
        given: the instance.
        skip: base classes whose fields are left alone, unless they are declared anew.

    Raises:
        TypeError: a value of another type; the message names the field and what was expected.
        ValueError: a value that is none of the choices, or not a number (NaN).
    """
    cls: Hashable = type(given)  # type: ignore[assignment]  # mypy takes the __hash__ of instances for the class's
    own = _declared(cls, tuple(skip))
    for name, kinds in _kinds(cls).items():
        if name in own:
            object.__setattr__(given, name, check_value(name, getattr(given, name), *kinds))  # it may be frozen


def check_value(name: str, value: Any, *kinds: Any) -> Any:
    """Return a value as Python's own type, as `check_fields` does for a field of one of these types."""
    if value is None and type(None) in kinds:
        return value
    if choices := [choice for kind in kinds for choice in _choices(kind)]:
        if isinstance(value, str | bool | enum.Enum) and getattr(value, "value", value) in choices:
            return value
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(str, choices))}.")
    if isinstance(value, numbers.Real) and math.isnan(value):
        raise ValueError(f"{name}={value} is not a number: use {_expected(kinds)}.")
    for kind in kinds:
        if (plain := _as(kind, value)) is not None:
            return plain
    article = (
        "" if value is None else f" is {'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"
    )
    raise TypeError(f"{name}={value!r:.80}{article}: expected {_expected(kinds)}.")


@cache
def _declared(cls: type, skip: tuple[type, ...]) -> set[str]:
    """Return the names of the fields that a class and its bases declare, some bases left out."""
    return {name for base in cls.__mro__ if base not in skip for name in inspect.get_annotations(base)}


@cache
def _kinds(cls: type) -> dict[str, tuple[Any, ...]]:
    """Return the types that each field may have, of those fields that can be checked."""
    hints = get_type_hints(cls)
    found = {one.name: _arms(hints[one.name]) for one in fields(cls)}
    return {name: kinds for name, kinds in found.items() if all(map(_can_check, kinds)) or any(map(_is_enum, kinds))}


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _can_check(kind: Any) -> bool:
    return kind in (int, float, bool, type(None)) or get_origin(kind) is Literal or _is_enum(kind)


def _choices(kind: Any) -> list[Any]:
    if _is_enum(kind):
        return [one.value for one in kind]
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _as(kind: Any, value: Any) -> int | float | bool | None:
    """Return a value as this kind, None if it is not one; a truth value is no number, although Python takes it for one."""
    truth = type(value).__name__ in ("bool", "bool_")  # NumPy's own is no subclass
    if kind is bool:
        return bool(value) if truth else None
    if truth or kind not in (int, float) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _expected(kinds: tuple[Any, ...]) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}
    return " or ".join(words[kind] for kind in kinds)
