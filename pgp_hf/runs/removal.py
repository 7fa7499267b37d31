"""Delete what runs have written, and nothing else: files by known names, and those that a list of digests describes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .reading import read_json, sha256

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")  # `atomic.replacing`


def written(folder: Path, known: Collection[str], lists: Iterable[str] = ()) -> list[str]:
    """Return the files in a folder that a run has written, by their POSIX path inside it.

    Args:
        folder: to look in; links to folders are not followed.
        known: paths that a run uses.
        lists: names of files with digests, by which further paths are recognised, whose content must be as noted there.
    """
    noted: dict[str, Any] = {}
    for name in lists:
        noted |= listed(folder / name)
    found = [name for name in {**dict.fromkeys(known), **noted} if _is_file(folder, name)]
    found = [name for name in found if name in known or _is_as_noted(folder / name, noted[name])]
    return [*found, *temporaries(folder, known)]


def temporaries(folder: Path, known: Collection[str]) -> list[str]:
    """Return files that a run was writing when it died, for which it has used temporary names."""
    found = []
    for inside in sorted({str(PurePosixPath(name).parent) for name in known}):
        for path in (folder / inside).glob(".*.tmp"):
            stands_for = _TEMPORARY.fullmatch(path.name)
            if stands_for and str(PurePosixPath(inside) / stands_for["name"]) in known:
                found.append(str(PurePosixPath(inside) / path.name))
    return [name for name in found if _is_file(folder, name)]


def remove(folder: Path, names: Iterable[str]) -> None:
    """Delete files by their path in a folder, and then the folders that are empty, up to this one."""
    names = list(names)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    parents = {parent for name in names for parent in PurePosixPath(name).parents}
    for parent in sorted(parents, key=lambda parent: -len(parent.parts)):
        remove_empty(folder / parent)


def remove_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def remove_temporary(folder: Path) -> None:
    """Remove a folder of ours that was never given its name, with all that is in it."""
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def listed(path: Path) -> Mapping[str, Any]:
    """Return what a list of digests notes of each file; nothing for one that is damaged, or leaves its folder."""
    try:
        files = read_json(path)["files"] if path.is_file() else {}
        inside = [PurePosixPath(name) for name in files]
    except (ValueError, KeyError, TypeError):
        return {}
    damaged = not isinstance(files, dict) or not all(isinstance(noted, dict) for noted in files.values())
    return {} if damaged or any(name.is_absolute() or ".." in name.parts for name in inside) else files


def merge(source: Path, target: Path) -> None:
    """Move a file or folder to a place where a folder may be already, whose own files stay."""
    if not os.path.lexists(target):
        os.replace(source, target)
    elif all(path.is_dir() and not path.is_symlink() for path in (source, target)):
        for path in sorted(source.iterdir()):
            merge(path, target / path.name)
        remove_empty(source)


def _is_file(folder: Path, name: str) -> bool:
    """Return whether a path is a file, and no folder on the way is a link."""
    path = folder / name
    inside = [parent for parent in PurePosixPath(name).parents if parent.parts]  # not the folder itself
    return path.is_file() and not any((folder / parent).is_symlink() for parent in inside)


def _is_as_noted(path: Path, noted: Mapping[str, Any]) -> bool:
    return os.path.getsize(path) == noted.get("bytes") and sha256(path) == noted.get("sha256")
