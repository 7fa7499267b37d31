"""The methods by their registered names."""

from __future__ import annotations

from typing import TypeVar

from .base import ContinualMethod

METHODS: dict[str, type[ContinualMethod]] = {}

Method = TypeVar("Method", bound=type[ContinualMethod])


def register(method: Method) -> Method:
    """Register a class of methods under its `name`; usable as a decorator.

    Raises:
        ValueError: another class has the name.
    """
    known = METHODS.setdefault(method.name, method)
    if known is not method:
        raise ValueError(
            f"method {method.name!r} is registered already ({known.__module__}.{known.__qualname__}): choose another name."
        )
    return method


def create(name: str, **settings: object) -> ContinualMethod:
    """Make a method by its registered name.

    Args:
        name: one of `METHODS`.
        settings: fields of the method's configuration.

    Raises:
        ValueError: an unknown name or setting.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown: choose one of {', '.join(sorted(METHODS))}.")
    method = METHODS[name]
    return method(method.configure(**settings))
