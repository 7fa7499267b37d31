"""Kill a run at a file operation, go on, and compare what it leaves with a run that nobody killed.

The files of a run change at file operations alone: whoever kills it before each of them, and in the middle of each, has
tried every state in which a kill can leave its folder.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pgp_hf.runs.folder import LARGE, QUERIES
from pgp_hf.runs.reading import sha256

# audit events of Python; the number of their arguments that are paths. Rust writes the safetensors files unseen, but
# each of them is renamed then
PATHS = {
    "open": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
}
LOCKS = (".run.lock", ".run.lock.json")
TIMED = ("seconds", "train_images_per_second")
PLACES = ("base_model_name_or_path",)

Kill = Literal["before", "within", "full"]


def on_operation(root: Path, act: Callable[[int, str, str], None]) -> None:
    """Call `act(number, event, path)` just before each operation, counted from 1, that changes files under `root`.

    This lasts until the process ends.
    """
    count, busy, top = 0, False, os.path.abspath(root)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count, busy
        if busy or event not in PATHS or (event == "open" and not _writes(args[2])):
            return
        given = [os.fsdecode(path) for path in args[: PATHS[event]] if isinstance(path, str | bytes | os.PathLike)]
        if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # relative to an open folder, as in shutil.rmtree
            given = [os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path) for path in given]
        paths = [path for path in given if os.path.abspath(path).startswith(top) and not path.endswith(LOCKS)]
        if paths and _changes(event, given[0]):
            count, busy = count + 1, True
            try:
                act(count, event, paths[0])
            finally:
                busy = False

    sys.addaudithook(hook)


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _changes(event: str, path: str) -> bool:
    """Return False for operations that find their work done, such as removing what is not there."""
    return os.path.lexists(path) == (event != "os.mkdir") or event == "open"


def keep_states(root: Path, to: Path, step: int = 1) -> None:
    """Copy the run's folder before every `step`-th operation: what a kill there would leave, without a run for each.

    `to` gets these folders, by the operation's number, and `operations.txt` with a line for each operation: event and path.
    """
    to.mkdir()
    lines = (to / "operations.txt").open("w", buffering=1)

    def act(number: int, event: str, path: str) -> None:
        print(event, os.path.relpath(path, root), file=lines)
        if number % step == 0 and root.exists():
            shutil.copytree(root, to / str(number), symlinks=True)

    on_operation(root, act)


def leave_half(run: Path, operation: str) -> bool:
    """Leave what a kill within an operation would; return False where that is nothing of its own.

    A file that is about to be renamed has been written by half, and nothing of one that has been opened.
    """
    event, _, name = operation.partition(" ")
    path = run / name
    if event == "os.rename" and path.is_file():
        os.truncate(path, path.stat().st_size // 2)
    elif event == "open" and not path.is_dir():
        path.write_bytes(b"")
    else:
        return False
    return True


def kill_at(number: int, root: Path, kill: Kill) -> None:
    """Kill this process at an operation.

    Args:
        number: of the operation.
        root: the run's folder.
        kill: "before" the operation; "within" it, as `leave_half` does; "full" for a disk that is full from there on, of
            which the run dies by itself.
    """

    def act(at: int, event: str, path: str) -> None:
        if kill == "full":
            if at >= number and event in ("open", "os.mkdir", "shutil.copyfile"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        elif at == number:
            if kill == "within":
                leave_half(root, f"{event} {os.path.relpath(path, root)}")
            os.write(2, f"killed {kill} operation {at}: {event} {path}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    on_operation(root, act)


def content(run: Path) -> dict[str, Any]:
    """Return what must be equal in two runs, by file: bits of tensors, JSON but for measured times and places."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or path.name in LOCKS or path.parent.name == QUERIES:  # a cache, which may have less
            continue
        if path.suffix == ".safetensors":
            found[name] = sha256(path)
        elif path.name == "digests.json":
            found[name] = _checked(path, run)
        elif path.suffix == ".json":
            read = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {key: value for key, value in read.items() if key not in TIMED + PLACES}
        else:  # cards, which tell the times, and figures
            found[name] = "there"
    return found


def _checked(path: Path, run: Path) -> list[str]:
    """Return the names that a file of digests has, after comparing them with the files."""
    listed = json.loads(path.read_text(encoding="utf-8"))
    for name, entry in listed["files"].items():
        file = path.parent / name
        if file.name in (*LARGE, "README.md") and not file.exists():  # kept for the newest task alone, or deleted
            continue
        assert (entry["sha256"], entry["bytes"]) == (sha256(file), file.stat().st_size), file
    return sorted(listed["files"])
