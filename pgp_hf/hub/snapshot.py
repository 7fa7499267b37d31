"""What leaves the machine: the files of the contract alone, as copies without a path of this machine."""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import embedded
from ..report import card as model_card
from ..runs.atomic import write_json
from ..runs.folder import ADAPTER, ADAPTER_CONFIG, BASES, DESCRIPTION, MANIFEST, PROCESSOR, RESULTS
from ..runs.reading import read_json

CARD = "README.md"
UPLOADED_FILES = (
    ADAPTER_CONFIG,
    ADAPTER,
    BASES,
    DESCRIPTION,
    MANIFEST,
    RESULTS,
    CARD,
    PROCESSOR,
    "processor_config.json",
    "figures/*.png",
)
"""All that is ever uploaded."""

_PATH = re.compile(r"(~?/|[A-Za-z]:[\\/]|\\\\|file:/)")  # how an absolute path begins, on any system
_CLASS_NAMES = ("id2label", "label2id", "label_names", "class_names")  # may begin with a slash, as "/m/01g317" does


def listed(folder: Path) -> list[str]:
    """The files of `folder` that may be uploaded, by their POSIX path inside it."""
    paths = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return [path for path in paths if is_ours(path)]


def is_ours(path: str) -> bool:
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in UPLOADED_FILES)


def snapshot(folder: Path, target: Path, *, repo_id: str, base_model: str | None = None) -> list[str]:
    """Copy a finished task to `target` as the Hub may have it.

    JSON loses absolute paths: of a dataset's folder its last name stays. `base_model_name_or_path` stays when it is a
    Hub id or an embedded backbone's name; a local folder becomes `base_model`, or null. The card is rendered anew with
    `repo_id` in its snippet. Files without such entries are copied byte for byte.

    Returns:
        The files, by their path in the repository.

    Raises:
        ValueError: a folder that is no finished task.
    """
    contents = {name: read_json(folder / name) for name in (RESULTS, MANIFEST, ADAPTER_CONFIG, DESCRIPTION)}
    base = contents[ADAPTER_CONFIG].get("base_model_name_or_path")
    named = embedded.name_of(base) or (base_model if base is None or _is_local(base) else base)
    for path in listed(folder):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        content = read_json(folder / path) if path.endswith(".json") else None
        public = _without_paths(content)
        if path == ADAPTER_CONFIG:
            public["base_model_name_or_path"] = named
        if public == content:
            shutil.copyfile(folder / path, target / path)
        else:
            write_json(target / path, public)
    contents[ADAPTER_CONFIG]["base_model_name_or_path"] = named or base  # a card may have a folder's last name
    model_card.save_card(target / CARD, *contents.values(), repo_id=repo_id)
    return listed(target)


def _is_local(name: str) -> bool:
    """Whether a backbone's name is a path; embedded backbones have a name of their own."""
    if embedded.resolve(name) is not None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def _without_paths(value: Any) -> Any:
    """`value` of JSON with the last part alone of every string that is an absolute path, class names excepted."""
    if isinstance(value, dict):
        return {key: item if key in _CLASS_NAMES else _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and _PATH.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value
