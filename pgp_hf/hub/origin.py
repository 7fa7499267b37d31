"""Find out where a run that goes on from a revision on the Hub may be uploaded.

Tasks that are in another repository are not copied. The run goes on in the revision's own repository if the revision is
the newest there and the token may write to it; otherwise it needs one of its own.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from ..runs.checks import origin_on_hub
from ..runs.folder import RESULTS, RunFolder
from ..runs.reading import read_json
from .queue import explain, within

LONGEST = 30.0
"""Seconds after which a question to the Hub counts as not answered: training must not wait for it."""
_MAY_NOT = (401, 403, 404)  # a repository that the token may not see looks like one that does not exist


def task_numbers(tags: Iterable[str]) -> list[int]:
    """Return the numbers of the tags task-1, task-2, ... in order."""
    return sorted(int(tag[5:]) for tag in tags if re.fullmatch(r"task-\d+", tag))


def origin_of(folder: RunFolder) -> dict[str, Any] | None:
    """Return the revision on the Hub that a run goes on from, by its newest task; None where there is none."""
    tasks = folder.finished_tasks()
    return origin_on_hub(read_json(folder.task(tasks - 1) / RESULTS)) if tasks else None


def choose_repo(repo_id: str | None, output_dir: str | Path, origin: Mapping[str, Any] | None) -> str:
    """Return the repository to upload to: the one asked for, the origin's, or one with the name of `output_dir`."""
    return repo_id or (origin["repo"] if origin else Path(output_dir).absolute().name)


def check_origin(repo_id: str | None, origin: Mapping[str, Any], finished: int, token: str | None) -> None:
    """Raise ValueError unless a run may be uploaded that goes on from a revision on the Hub.

    A repository of its own is not asked for: like that of any run, it is looked at when the first upload begins. If the
    Hub does not answer, a warning says that this is not known yet: uploads are tried in the background, and nothing that
    is there can be overwritten.

    Args:
        repo_id: the repository that was asked for; None for the revision's own.
        origin: what `origin_on_hub` returns.
        finished: number of tasks that the run has finished, all of which may be there.
        token: as everywhere in `huggingface_hub`.
    """
    repo, revision, reasons = origin["repo"], origin["revision"], []
    if repo_id is not None and repo_id.rpartition("/")[2] != repo.rpartition("/")[2]:
        return

    def ask() -> None:
        api = HfApi(token=token)
        if repo_id is None or _full_id(repo_id, api) == repo:
            reasons.append(_reason(origin, finished, api))

    try:
        within(LONGEST, ask)
    except (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError) as error:
        warnings.warn(
            f"The Hub cannot be asked whether task-{finished + 1} may go to {repo} ({explain(error, token)}). Training "
            f"begins, and uploads are tried in the background: they succeed if the token may write to {repo} and "
            f"{revision} is the newest there. hub_model_id chooses another repository.",
            stacklevel=4,
        )
    if any(reasons):
        raise ValueError(
            f"{repo} at {revision} cannot be continued there: {reasons[0]}. Pass hub_model_id='owner/name', a new "
            f"repository of your own: it gets the tasks after {revision}, and its card links the earlier ones. Or leave "
            "out push_to_hub."
        )


def _full_id(repo_id: str, api: HfApi) -> str:
    """Return a repository's id with its owner, by default the token's user."""
    if "/" in repo_id:
        return repo_id
    try:
        return f"{api.whoami()['name']}/{repo_id}"
    except LocalTokenNotFoundError:
        return repo_id  # the uploads report that


def _reason(origin: Mapping[str, Any], finished: int, api: HfApi) -> str | None:
    """Return the reason why a run cannot go on in the repository of its origin; None if it can."""
    try:
        api.auth_check(origin["repo"], write=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in _MAY_NOT:
            raise
        return f"the token may not write to it ({error.response.status_code})"
    there = task_numbers(tag.name for tag in api.list_repo_refs(origin["repo"]).tags)
    if origin["tasks"] not in there:
        return f"it has no tag task-{origin['tasks']}"
    if there[-1] > finished:
        return (
            f"its newest task is task-{there[-1]}, and published revisions are never changed (without revision=..., the "
            "newest is continued)"
        )
    return None
