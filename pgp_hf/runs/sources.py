"""Where a revision is: in a local folder, or on the Hub, from where its files are fetched. No file is read here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from . import reading
from .folder import ADAPTER, ADAPTER_CONFIG, BASES, CHECKPOINTS, DESCRIPTION, MANIFEST, PROCESSOR, RESULTS

RUN_FILES = (MANIFEST, RESULTS, DESCRIPTION, BASES)
REVISION_FILES = (ADAPTER_CONFIG, ADAPTER, PROCESSOR, *RUN_FILES)
# read by other loaders, never by this package: looked at for requests to run code
OTHERS = ("config.json", "processor_config.json")
TASK = re.compile(r"task-([1-9]\d{0,5})")
_CARD = re.compile(r"README\.md|figures/[\w-]+\.png")


def locate(
    repo_or_dir: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    card: bool = False,
) -> Path:
    """Local folder with the files of a revision, downloaded first when it is on the Hub.

    Args:
        repo_or_dir: a run's output folder, one of its task folders (or a copy), or the id of a repository on the Hub.
        revision: "task-3" and so on, None for the last task; on the Hub also a branch or commit.
        token, cache_dir, local_files_only: as in every `from_pretrained`.
        card: download the card and its figures too.

    Raises:
        ValueError: neither a folder nor the id of a repository; no such revision; a folder or repository with pickled
            files or too large ones.
        ConnectionError: the Hub is out of reach, and the revision is not in the cache.
    """
    if Path(repo_or_dir).is_dir():
        return _local(Path(repo_or_dir), revision)
    name = str(repo_or_dir)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder here nor the id of a repository on the Hub.") from error
    where = f"{name}@{revision or 'main'}"
    wanted: Iterable[str] = (*REVISION_FILES, *OTHERS)
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    commit, unreachable = None, None
    if not (local_files_only or constants.HF_HUB_OFFLINE):
        try:
            commit, sizes = _listing(name, revision, token)
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError):  # the Hub has answered
                raise
            unreachable, options["local_files_only"] = error, True  # the cache may know it
    if commit:
        reading.refuse_pickles(sizes, where)
        wanted = [file for file in sizes if file in wanted or (card and _CARD.fullmatch(file))]
        for file in wanted:
            if sizes[file] > (most := reading.MAX_TENSORS if file.endswith(".safetensors") else reading.MAX_JSON):
                raise ValueError(f"{where}: {file} has {sizes[file]} bytes, allowed are {most}.")
        _need(ADAPTER_CONFIG in wanted and ADAPTER in wanted, where)
    try:
        # by its name, which the cache then knows without a network; the rest come from the same commit
        folder = Path(hf_hub_download(name, ADAPTER_CONFIG, revision=revision, **options)).parent
    except LocalEntryNotFoundError as error:
        if unreachable is None:
            raise
        raise ConnectionError(
            f"the Hub cannot be reached ({unreachable}), and {where} is not in the cache."
        ) from error
    if commit not in (None, folder.name):
        raise ValueError(f"{where} moved from {commit} to {folder.name} just now: load it again.")
    for file in wanted:
        try:
            hf_hub_download(name, file, revision=folder.name, **options)
        except EntryNotFoundError as error:  # without a listing: not in the cache, and perhaps not in the repository
            if file == ADAPTER:
                raise ValueError(f"{where} has no {ADAPTER}, or it is not in the cache ({error}).") from error
    return folder


def _local(folder: Path, revision: str | None) -> Path:
    if revision not in (None, "main"):
        chosen = folder / revision if TASK.fullmatch(revision) else None
        if chosen is None or not chosen.is_dir():
            found = sorted((int(m[1]) for file in folder.iterdir() if (m := TASK.fullmatch(file.name))), key=int)
            raise ValueError(
                f"revision={revision!r} is not in {folder}: "
                + (f"choose one of {', '.join(f'task-{t}' for t in found)}." if found else "it holds one revision.")
            )
        folder = chosen
    _need((folder / ADAPTER_CONFIG).is_file(), folder)
    files = (file.relative_to(folder) for file in folder.rglob("*"))
    # a task in training has Trainer's checkpoints beside the finished ones
    reading.refuse_pickles((str(file) for file in files if CHECKPOINTS not in file.parts), folder)
    _need((folder / ADAPTER).is_file(), folder)
    return folder


def _need(there: bool, where: str | Path) -> None:
    if not there:
        raise ValueError(
            f"{where} has no {ADAPTER_CONFIG} and {ADAPTER}: expected a run's folder, one of its task folders, or a "
            "repository with such files."
        )


def _listing(repo: str, revision: str | None, token: str | bool | None) -> tuple[str, dict[str, int]]:
    """Commit of a revision, and the sizes of its files by path."""
    api = HfApi(token=token)
    try:
        # one request that is not repeated: without a network, this is where it shows
        commit = api.model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    except RevisionNotFoundError as error:
        refs = api.list_repo_refs(repo)
        names = [ref.name for ref in (*refs.tags, *refs.branches)]
        raise ValueError(f"{repo} has no revision {revision!r}: it has {', '.join(names) or 'none'}.") from error
    entries = api.list_repo_tree(repo, recursive=True, revision=commit)
    return commit, {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
