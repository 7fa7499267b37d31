"""Copy what may leave the machine: the files named here, stripped of local paths."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import embedded
from ..report import card as model_card
from ..runs.atomic import write_json
from ..runs.digests import CARD, Digests
from ..runs.folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    BASES,
    DESCRIPTION,
    DIGESTS,
    EXEMPLARS,
    MANIFEST,
    METHOD,
    METHOD_STATE,
    MODEL,
    MODEL_CONFIG,
    PROCESSOR,
    RESULTS,
    config_name,
)
from ..runs.listing import Digest
from ..runs.reading import read_json

UPLOADED_FILES = (
    ADAPTER_CONFIG,
    ADAPTER,
    MODEL_CONFIG,
    MODEL,
    BASES,
    DESCRIPTION,
    METHOD_STATE,
    METHOD,
    MANIFEST,
    RESULTS,
    CARD,
    PROCESSOR,
    "processor_config.json",
    "figures/*.png",
    DIGESTS,
)
"""The only files that are uploaded, but for stored training images, for which one has to ask."""

_PATH = re.compile(r"(~?/|[A-Za-z]:[\\/]|\\\\|file:/)")  # the beginning of an absolute path, on any system
_CLASS_NAMES = ("id2label", "label2id", "label_names", "class_names")  # may begin with a slash, as "/m/01g317" does


def listed(folder: Path, exemplars: bool = False) -> list[str]:
    """Return the files of `folder` that may be uploaded, by their POSIX path inside it; `exemplars`: stored images too."""
    paths = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    others = (MODEL, MODEL_CONFIG) if config_name(folder) == ADAPTER_CONFIG else ()
    return [path for path in paths if is_ours(path, exemplars) and path not in others]


def is_ours(path: str, exemplars: bool = False) -> bool:
    """Return whether a path in a repository is one of the files that are uploaded; `exemplars`: stored images too."""
    patterns = (*UPLOADED_FILES, EXEMPLARS) if exemplars else UPLOADED_FILES
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def snapshot(
    folder: Path,
    target: Path,
    *,
    repo_id: str,
    base_model: str | None = None,
    exemplars: bool = False,
    license: str | None = None,
) -> list[str]:
    """Copy a finished task to `target` as it is uploaded.

    Absolute paths in JSON are reduced to their last part, such as the name of a dataset's folder.
    `base_model_name_or_path` stays when it is a Hub id or the name of an embedded backbone; a local folder becomes
    `base_model`, or null. The card is rendered anew, with `repo_id` in its code. Files without such entries are copied
    byte for byte. The digests are those of the copies, and leave out cards and figures.

    Args:
        folder: the finished task.
        target: the folder to fill.
        repo_id: the repository that the copy is for.
        base_model: Hub id of a backbone that was loaded from a local folder.
        exemplars: copy stored images as well.
        license: for the card, which claims none without.

    Returns:
        The files, by their path in the repository.

    Raises:
        ValueError: a folder that is not a finished task, or a file that is damaged or was altered.
    """
    digests = Digests.read(folder)
    config = config_name(folder)
    contents = {name: read_json(folder / name) for name in (RESULTS, MANIFEST, config, DESCRIPTION)}
    base = contents[config].get("base_model_name_or_path")
    named = embedded.name_of(base) or (base_model if base is None or _is_local(base) else base)
    for path in listed(folder, exemplars):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        content = read_json(folder / path) if path.endswith(".json") else None
        public = _without_paths(content)
        if path == config and (config == ADAPTER_CONFIG or base is not None):
            public["base_model_name_or_path"] = named
        if public == content:
            shutil.copyfile(folder / path, target / path)
        else:
            # an earlier version wrote, and perhaps uploaded, results in the other form
            write_json(target / path, public, rows=path == RESULTS and digests is not None)
    contents[config]["base_model_name_or_path"] = named or base  # a card shows the last part of a local path
    model_card.save_card(target / CARD, *contents.values(), repo_id=repo_id, license=license)
    if digests is not None:
        _public_digests(digests, target).write(target)
    return listed(target, exemplars)


def _public_digests(digests: Digests, target: Path) -> Digests:
    """Return the digests of a copy of a task's files; raise ValueError if a file is not as the run wrote it.

    Those of large files are there in any case: they may be uploaded, or have been, without being here now. Those of
    features, which another machine computes with other last bits, are left out.
    """
    ours = [name for name in digests.checked if is_ours(name, exemplars=True)]
    digests.check_read(ours)  # whether all are there
    files = {name: digest for name, digest in digests.files.items() if name in ours}
    for name in ours:
        if (target / name).exists():
            digests.check(name)
            files[name] = Digest.of(target / name)
    return replace(digests, files=files, features=None, earlier_features={})


def _is_local(name: str) -> bool:
    """Return whether a backbone's name is a path, and neither a Hub id nor the name of an embedded backbone."""
    if embedded.resolve(name) is not None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def _without_paths(value: Any) -> Any:
    """Return a JSON value in which absolute paths are reduced to their last part; class names stay as they are."""
    if isinstance(value, dict):
        return {key: item if key in _CLASS_NAMES else _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and _PATH.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value
