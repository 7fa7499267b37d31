"""Compare files with what a list notes of them: their size and the SHA-256 of their bytes, by their path in a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from . import reading


@dataclass(frozen=True)
class Digest:
    """The size of a file and the SHA-256 of its bytes, in hexadecimal digits."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path, sha256: str | None = None) -> Digest:
        """Return that of a file, whose `sha256` may be known."""
        return cls(sha256 or reading.sha256(path), path.stat().st_size)

    @classmethod
    def parse(cls, entry: Any) -> Digest:
        """Return that in a JSON object; raise ValueError for any other content."""
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"sha256", "bytes"}
            or not (isinstance(entry["sha256"], str) and re.fullmatch("[0-9a-f]{64}", entry["sha256"]))
            or not (type(entry["bytes"]) is int and entry["bytes"] >= 0)
        ):
            raise ValueError(f"{str(entry)[:120]} is not an object of sha256 (64 digits) and bytes")
        return cls(**entry)

    def difference(self, path: Path, noted_in: str, size_only: bool = False) -> str | None:
        """Return in which way a file is not the one that was noted; None if it is that one.

        Args:
            noted_in: name of the list.
            size_only: compare the size alone, without reading the file.
        """
        if (size := path.stat().st_size) != self.bytes:
            return f"it has {size} bytes, {self.bytes} by {noted_in}"
        if not size_only and reading.sha256(path) != self.sha256:
            return f"its digest differs from the one in {noted_in}"
        return None


def parse_digests(content: Any) -> dict[str, Digest]:
    """Return digests by path; raise ValueError for a path that leaves the folder, or another content."""
    if not isinstance(content, dict):
        raise ValueError("it has no object of digests by path")
    for name in content:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name or ":" in name:
            raise ValueError(f"{name!r} is not a path in this folder")
    return {name: Digest.parse(entry) for name, entry in content.items()}
