"""Choose what the examples train where neither data nor a recipe are named: the main job."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import fields, replace
from typing import Any

from .arguments import Arguments, RunArguments

# Projections that keep old features where they are, each with a head that profits from it.
_FUNCTIONAL = {
    "projection": "functional",
    "energy": 0.95,
    "apply_to": "both",
    "max_images": 100,
    "head": "statistics",
}
RECIPES: dict[str, dict[str, Any]] = {
    "l2p": {**_FUNCTIONAL, "head_type": "token"},
    "dualprompt": _FUNCTIONAL,
    "clip": _FUNCTIONAL,
}
_NO_RECIPE = {"preset", "dry_run", "no_compare"}


def recipe(method: str, given: Container[str]) -> dict[str, Any]:
    """Return the main job's settings by name; empty if the user has chosen a projection, a head or a part of either.

    Args:
        method: of the example, such as "l2p".
        given: the options on the command line.
    """
    chosen = {one.name for one in fields(RunArguments) if one.init} - _NO_RECIPE | RECIPES[method].keys()
    return {} if any(f"--{name}" in given for name in chosen) else RECIPES[method]


def as_published(arguments: Arguments) -> Arguments:
    """Return the main job's arguments with PGP as published: what the recipe has changed is at its default again."""
    names = {name for settings in RECIPES.values() for name in settings}
    return arguments._replace(prompts=_reset(arguments.prompts, names), run=_reset(arguments.run, names))


def _reset(settings: Any, names: Container[str]) -> Any:
    return replace(settings, **{one.name: one.default for one in fields(settings) if one.name in names and one.init})
