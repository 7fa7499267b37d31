"""Read a run's top level safely while a training process is replacing its files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .folder import COPYING, RESULTS, RunFolder
from .lock import described, is_held

T = TypeVar("T")
SECONDS = 60.0
"""Longest wait, in seconds; copying a large file takes most of it."""


def settled(where: str | os.PathLike[str], revision: str | None, read: Callable[[], T]) -> T:
    """Return what `read` returns, which reads a revision; it is called again if a run has replaced files meanwhile.

    Args:
        where: a run's folder; anything else, such as a single task or the id of a repository, does not change.
        revision: of the run. Only the last one, which has no name, is at the top level.
        read: raises ValueError for files that do not fit together.

    Raises:
        ValueError: as `read`; files that are still being copied after a while, or whose run died while it copied them.
    """
    folder, ends = Path(where), time.monotonic() + SECONDS
    while revision in (None, "main") and folder.is_dir():
        _wait(folder, ends)
        before = _newest(folder)
        try:
            return read()
        except (ValueError, OSError) as error:
            if _newest(folder) == before and not (folder / COPYING).exists():
                if is_held(folder) and RunFolder(folder).is_empty():
                    raise ValueError(
                        f"{folder} is in training by {described(folder)}, and no task of it has ended yet: load it later."
                    ) from error
                raise
    return read()


def _newest(folder: Path) -> tuple[int, int] | None:
    """Return what changes when the files of a task are copied."""
    try:
        found = (folder / RESULTS).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _wait(folder: Path, ends: float) -> None:
    """Wait until no file is being copied."""
    while (folder / COPYING).exists():
        alive = is_held(folder)
        if alive and time.monotonic() < ends:
            time.sleep(0.05)
            continue
        try:
            name = (folder / COPYING).read_text(encoding="utf-8").strip()[:20]
        except FileNotFoundError:  # the copy has just ended
            return
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{folder / COPYING} cannot be read ({error}): expected the name of the task whose files are being copied "
                "to the top level. Remove it and resume the run, or load a single task, such as revision='task-1'."
            ) from error
        state = (
            f"is being written by {described(folder)}"
            if alive
            else f"is incomplete, since its run was interrupted while it copied the files of {name} there"
        )
        resume = "" if alive else ", or resume the run, which completes the copy"
        raise ValueError(f"{folder} {state}: load revision={name!r}, which is whole{resume}.")
