"""Locate a revision in a local folder, or download it from the Hub; no file is read here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from . import reading
from .folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    BASES,
    CHECKPOINTS,
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
    TASK,
    config_name,
)

RUN_FILES = (MANIFEST, RESULTS, DESCRIPTION, BASES)
"""Files that every finished task has; an adapter without a run has none of them."""
REVISION_FILES = (ADAPTER_CONFIG, ADAPTER, PROCESSOR, *RUN_FILES, METHOD_STATE, METHOD, DIGESTS)
"""All files of a revision that are read; runs of earlier versions lack the digests and those of the method."""
MODEL_FILES = (MODEL_CONFIG, MODEL, *REVISION_FILES[2:])
"""The same where a whole model has learned, and not an adapter."""
# files that other loaders read: this package only searches them for requests to run code
OTHERS = (MODEL_CONFIG, "processor_config.json")
_TO_CONTINUE = re.compile(rf"README\.md|figures/[\w-]+\.png|{re.escape(EXEMPLARS)}")


def locate(
    repo_or_dir: str | os.PathLike[str],
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    card: bool = False,
) -> Path:
    """Return the local folder with the files of a revision, downloaded first when it is on the Hub.

    Args:
        repo_or_dir: a run's output folder, one of its task folders (or a copy), or the id of a repository on the Hub.
        revision: "task-1", "task-2", ...; None for the last task; on the Hub also a branch or commit.
        token, cache_dir, local_files_only: as in every `from_pretrained`.
        card: also download the card, its figures and stored images, which a run that is continued takes over.

    Raises:
        ValueError: neither a folder nor the id of a repository; no such revision; a folder or repository with pickled
            files or with files that are too large.
        ConnectionError: the Hub cannot be reached, and the revision is not in the cache.
    """
    if Path(repo_or_dir).is_dir():
        return _local(Path(repo_or_dir), revision)
    repo = check_id(repo_or_dir, "a run's folder, one of its task folders")
    where = f"{repo}@{revision or 'main'}"
    listing: tuple[str, dict[str, int]] | None = None
    unreachable: HTTPError | None = None
    if not (local_files_only or constants.HF_HUB_OFFLINE):
        try:
            listing = _listing(repo, revision, token)
        except HfHubHTTPError as error:  # the Hub has answered
            if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
                error.append_to_message(f"\nThere is no folder {repo} here either.")
            raise
        except HTTPError as error:
            unreachable = error  # the cache may know the revision
    wanted: Iterable[str] | None = None if listing is None else _choose(listing[1], where, card)
    offline = local_files_only or unreachable is not None
    cache = None if cache_dir is None else Path(cache_dir)

    def fetch(file: str, at: str | None) -> Path:
        return Path(hf_hub_download(repo, file, revision=at, token=token, cache_dir=cache, local_files_only=offline))

    try:
        # by the revision's name, so that the cache knows it without a network; the rest come from the same commit
        if wanted is None:
            folder, wanted = _fetch_description(fetch, revision)
        else:
            folder = fetch(ADAPTER_CONFIG if ADAPTER_CONFIG in wanted else MODEL_CONFIG, revision).parent
    except LocalEntryNotFoundError as error:
        nowhere = f"there is no folder {repo} here, and {where} is not in the cache"
        if unreachable is None:
            raise LocalEntryNotFoundError(f"{nowhere}, the only place to look while offline.") from error
        raise ConnectionError(f"{nowhere}; the Hub cannot be reached ({unreachable}).") from error
    if listing is not None and listing[0] != folder.name:
        raise ValueError(f"{where} moved from {listing[0]} to {folder.name} just now: load it again.")
    _fetch_all(wanted, lambda file: fetch(file, folder.name), where)
    return folder


def check_id(given: str | os.PathLike[str], folder: str) -> str:
    """Return the id of a repository on the Hub, given where there is no folder of that name.

    Args:
        given: the id.
        folder: what else could have been given, for the message.

    Raises:
        ValueError: no such id, so that a path must be meant.
    """
    text = str(given)
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        wrong = f"{text} is a file" if Path(text).is_file() else f"the folder {text} does not exist"
        raise ValueError(f"{wrong}: expected {folder}, or the id of a repository on the Hub, owner/name.") from error
    if Path(text).is_file():
        raise ValueError(f"{text} is a file: expected {folder}, or the id of a repository on the Hub, owner/name.")
    return text


def _local(folder: Path, revision: str | None) -> Path:
    """Return the folder of a revision in a local folder."""
    if revision not in (None, "main"):
        folder = _task_folder(folder, revision)
    name = config_name(folder)
    _require((folder / name).is_file(), folder)
    files = (file.relative_to(folder) for file in folder.rglob("*"))
    # checkpoints of earlier versions hold pickles; none are read here
    reading.refuse_pickles((str(file) for file in files if CHECKPOINTS not in file.parts), folder)
    if name == ADAPTER_CONFIG:
        _require((folder / ADAPTER).is_file(), folder)
    elif not (folder / MODEL).is_file():
        raise ValueError(without_weights(folder))
    return folder


def _task_folder(folder: Path, revision: str) -> Path:
    chosen = folder / revision if TASK.fullmatch(revision) else None
    if chosen is None or not chosen.is_dir():
        found = sorted(int(m[1]) for file in folder.iterdir() if (m := TASK.fullmatch(file.name)))
        raise ValueError(
            f"revision={revision!r} is not in {folder}: "
            + (f"choose one of {', '.join(f'task-{t}' for t in found)}." if found else "it holds one revision.")
        )
    return chosen


def without_weights(folder: Path) -> str:
    """Return an error message for a task's folder that has a whole model's description, but not its weights."""
    return (
        f"{folder} has {MODEL_CONFIG}, but no {MODEL}: by default a run keeps a whole model's weights for its newest task "
        "alone. Load that one, or train with --save_full_weights all, which keeps them for every task."
    )


def _require(there: bool, where: str | Path) -> None:
    if not there:
        raise ValueError(
            f"{where} has no {ADAPTER_CONFIG} and {ADAPTER}, and no {MODEL_CONFIG} and {MODEL}: expected a run's folder, "
            "one of its task folders, or a repository with such files."
        )


def _fetch_description(fetch: Callable[[str, str | None], Path], revision: str | None) -> tuple[Path, Iterable[str]]:
    """Fetch the file that describes the model, without a listing; return its folder, and the files to fetch with it."""
    try:
        return fetch(ADAPTER_CONFIG, revision).parent, (*REVISION_FILES, *OTHERS)
    except EntryNotFoundError:  # it is not in the repository, or not in the cache
        try:
            return fetch(MODEL_CONFIG, revision).parent, (*MODEL_FILES, *OTHERS)
        except EntryNotFoundError:
            pass
        raise


def _listing(repo: str, revision: str | None, token: str | bool | None) -> tuple[str, dict[str, int]]:
    """Return a revision's commit, and the sizes of its files by path."""
    api = HfApi(token=token)
    try:
        # a single request without retries: a missing network shows here, and quickly
        commit = api.model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    except RevisionNotFoundError as error:
        refs = api.list_repo_refs(repo)
        names = [ref.name for ref in (*refs.tags, *refs.branches)]
        raise ValueError(f"{repo} has no revision {revision!r}: it has {', '.join(names) or 'none'}.") from error
    assert commit is not None  # only lists of models come without it
    entries = api.list_repo_tree(repo, recursive=True, revision=commit)
    return commit, {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def _choose(sizes: dict[str, int], where: str, card: bool) -> list[str]:
    """Choose the files of a repository to download; raise ValueError if it has forbidden files or lacks an adapter."""
    reading.refuse_pickles(sizes, where)
    known = (*(REVISION_FILES if ADAPTER_CONFIG in sizes else MODEL_FILES), *OTHERS)
    wanted = [file for file in sizes if file in known or (card and _TO_CONTINUE.fullmatch(file))]
    for file in wanted:
        most = reading.MAX_TENSORS if file.endswith(".safetensors") else reading.MAX_JSON
        if sizes[file] > most:
            raise ValueError(f"{where}: {file} has {sizes[file]} bytes, at most {most} are allowed.")
    _require({ADAPTER_CONFIG, ADAPTER} <= {*wanted} or {MODEL_CONFIG, MODEL} <= {*wanted}, where)
    return wanted


def _fetch_all(files: Iterable[str], fetch: Callable[[str], Path], where: str) -> None:
    for file in files:
        try:
            fetch(file)
        except EntryNotFoundError as error:  # no listing: it is not in the cache, and perhaps not in the repository
            if file in (ADAPTER, MODEL):
                raise ValueError(f"{where} has no {file}, or it is not in the cache ({error}).") from error
