"""Names that a model card may hold: what is on the Hub in full, a local folder only by its last name."""

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
    """Return whether `name` is an id with its owner; without one it may be any folder's name, or a builder's."""
    return is_hub_id(name) and "/" in name


def public_name(name: str) -> str:
    """Return a Hub id as it is, and of anything that looks like a path the last part."""
    if is_hub_id(name):
        return name
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return last if last.strip(".~") else "unnamed"


def name_dataset(name: str | None) -> str:
    """Return a dataset's name in Markdown, with a link where it is known to be on the Hub."""
    if not name:
        return "unnamed dataset"
    return f"[{name}](https://huggingface.co/datasets/{name})" if is_owned(name) else escape(public_name(name))


def name_backbone(base: str) -> str:
    """Return a backbone's name in Markdown, as it stands in a sentence."""
    if embedded.resolve(base) is not None:
        return f"the frozen `{base}`, a small backbone inside the package"
    if is_hub_id(base):
        return f"the frozen [`{base}`](https://huggingface.co/{base})"
    return f"the frozen `{public_name(base)}`" if base else "a frozen backbone without a name"


def name_model(repo_id: str | None, *parts: str | None) -> str:
    """Return the last part of `repo_id`, or else the parts that there are, joined by hyphens."""
    if repo_id:
        return public_name(repo_id).split("/")[-1]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, parts)).lower()).strip("-")
