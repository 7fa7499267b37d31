"""Hold an output folder, so that no two processes write there at the same time.

The operating system releases the lock when the process that holds it ends, for whatever reason, so a lock is never stale.
Forked children, such as the workers of a data loader, do not keep it: they may outlive the process for a while.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .atomic import write_json
from .reading import read_json

LOCK, HOLDER = ".run.lock", ".run.lock.json"  # filelock may empty the first, and Windows keeps it unreadable
SECONDS = 1.0
"""Time to wait for a process that is just ending."""
_CANNOT_LOCK = {getattr(errno, name, None) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP")}


@dataclass
class _Held:
    lock: FileLock
    created: list[Path]  # folders that were made for the lock, the innermost first
    times: int = 1


_held: dict[Path, _Held] = {}
_changing = threading.Lock()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder during the block; it may be held already by this process. Folders that are missing are created.

    Raises:
        ValueError: another process holds it.
    """
    folder = folder.resolve()
    with _changing:
        if folder in _held:
            _held[folder].times += 1
        elif (one := _take(folder)) is not None:
            _held[folder] = one
    try:
        yield
    finally:
        with _changing:
            if folder in _held:
                _held[folder].times -= 1
                if not _held[folder].times:
                    _release(folder, _held.pop(folder))


def _take(folder: Path) -> _Held | None:
    """Lock a folder; return None on a file system that has no locks."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=SECONDS, poll_interval=0.05)
    except Timeout:
        raise ValueError(
            f"output_dir={folder} is being written by {described(folder)}: wait until it has ended, stop it, or choose "
            "another output_dir."
        ) from None
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        warnings.warn(
            f"The file system of {folder} cannot lock files ({error}): make sure that no other process writes there.",
            stacklevel=4,
        )
        return None
    began = time.strftime("%Y-%m-%d %H:%M:%S%z")
    noted = {"host": socket.gethostname(), "pid": os.getpid(), "began": began, "started": _started(os.getpid())}
    write_json(folder / HOLDER, {name: value for name, value in noted.items() if value is not None})
    return _Held(lock, created)


def _release(folder: Path, one: _Held) -> None:
    (folder / HOLDER).unlink(missing_ok=True)
    with contextlib.suppress(PermissionError):  # Windows keeps a file that is open; there filelock removes it
        (folder / LOCK).unlink(missing_ok=True)  # while locked, so that nobody can lock a file that is about to vanish
    one.lock.release()
    for path in one.created:
        with contextlib.suppress(OSError):  # it is not empty
            path.rmdir()


def described(folder: Path) -> str:
    """Describe the process that holds a folder, for an error message."""
    noted = _noted(folder)
    if noted is None:
        return "another process"
    return f"process {noted['pid']} on {noted['host']} since {noted['began']}"


def is_held(folder: Path) -> bool:
    """Return whether a process is writing to a folder, by what it has noted there: nothing is locked to find out.

    One on another machine is taken to be alive.
    """
    noted = _noted(folder)
    if noted is None:
        return False
    if noted["host"] != socket.gethostname() or os.name == "nt":  # where a signal of 0 is not a question
        return True
    if noted["pid"] == os.getpid():
        return folder.resolve() in _held
    try:
        os.kill(noted["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    # the number of a process that died may be another one's by now
    then, now = noted.get("started"), _started(noted["pid"])
    return then is None or now is None or then == now


def _started(pid: int) -> str | None:
    """Return when a process began, in ticks since the system did; None where the system does not say so."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[19].decode()
    except (OSError, IndexError):
        return None


def _noted(folder: Path) -> dict[str, Any] | None:
    try:
        noted = read_json(folder / HOLDER)
    except ValueError:  # it has just begun, or just ended
        return None
    right = type(noted.get("pid")) is int and noted["pid"] > 0 and {"host", "began"} <= noted.keys()
    return {name: str(value)[:100] if name != "pid" else value for name, value in noted.items()} if right else None


def _let_go() -> None:
    """Close the parent's locks in a forked child. They are not released: that would unlock them for the parent as well."""
    global _changing
    _changing = threading.Lock()
    for one in _held.values():
        context = getattr(one.lock, "_context", None)
        opened = getattr(context, "lock_file_fd", None)
        if context is not None and isinstance(opened, int):  # filelock 4 has done so itself
            context.lock_file_fd = None
            with contextlib.suppress(OSError):
                os.close(opened)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
