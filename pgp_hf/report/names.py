"""Choose the names that a model card may show: Hub ids in full, local folders by the last part of their path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeGuard

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import embedded
from .formatting import escape


def is_hub_id(name: object) -> TypeGuard[str]:
    """Return whether `name` can be an id on the Hub; an existing folder of that name counts as local."""
    if not isinstance(name, str) or Path(name).is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_owned(name: object) -> TypeGuard[str]:
    """Return whether `name` is an id with an owner; without one, it may be the name of any folder or dataset builder."""
    return is_hub_id(name) and "/" in name


def public_name(name: str) -> str:
    """Return a Hub id as it is, and the last part of anything that looks like a path."""
    if is_hub_id(name):
        return name
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return last if last.strip(".~") else "unnamed"


def name_dataset(name: str | None) -> str:
    """Return a dataset's name in Markdown, with a link where it is known to be on the Hub."""
    if not name:
        return "unnamed dataset"
    return f"[{name}](https://huggingface.co/datasets/{name})" if is_owned(name) else escape(public_name(name))


def name_base(base: str) -> str | None:
    """Return the name of the model that a run started from in Markdown; None for one without a name."""
    if embedded.resolve(base) is not None:
        return f"`{base}`, a small backbone inside the package"
    if is_owned(base):
        return f"[`{base}`](https://huggingface.co/{base})"
    return f"`{public_name(base)}`" if base else None


def name_model(repo_id: str | None, *parts: str | None) -> str:
    """Return the last part of `repo_id`, or else all parts that are not None, joined by hyphens."""
    if repo_id:
        return public_name(repo_id).split("/")[-1]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, parts)).lower()).strip("-")
