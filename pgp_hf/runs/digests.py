"""Keep the digests of all files that a finished task has: `digests.json`, which is written last.

{"files": {"adapter_model.safetensors": {"sha256": "...", "bytes": 123}, ...}, "features": {"sha256": ..., "bytes": ...}}

`features` is that of the run's `features/task-t.safetensors`, null where no test image was there. The first task in the
folder of a run that goes on from a single revision also has `earlier_features`, by the names of the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from . import reading
from .atomic import write_json
from .folder import DIGESTS, LARGE

CARD, FIGURES = "README.md", "figures"
"""Files that people edit: they are listed, but not checked."""


class AlteredFileError(ValueError):
    """Say that a file is damaged or was altered, unlike one that is merely of another run or not there."""


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

    def check_size(self, path: Path) -> None:
        """Raise ValueError unless a file has this size."""
        if (size := path.stat().st_size) != self.bytes:
            raise AlteredFileError(
                f"{path} is not the file that the run wrote: it has {size} bytes, {self.bytes} by {DIGESTS}. It is "
                "damaged or was altered: fetch it again, or use the revision before it."
            )

    def check(self, path: Path) -> None:
        """Raise ValueError unless a file has this size and this digest."""
        self.check_size(path)
        if reading.sha256(path) != self.sha256:
            raise AlteredFileError(
                f"{path} is not the file that the run wrote: its digest differs from the one in {DIGESTS}. It is damaged "
                "or was altered: fetch it again, or use the revision before it."
            )


@dataclass(frozen=True)
class Digests:
    """The content of `digests.json`.

    Attributes:
        folder: of the task.
        files: by their POSIX path in the folder, all but `digests.json` itself.
        features: of the file with the features of the task's test images; None if there is none.
        earlier_features: of those of earlier tasks whose folders are not in the run's, by name.
    """

    folder: Path
    files: dict[str, Digest]
    features: Digest | None = None
    earlier_features: dict[str, Digest] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: Path,
        features: Path | None = None,
        earlier: Iterable[Path] = (),
        known: Mapping[str, str] | None = None,
    ) -> Digests:
        """Return the digests of the files in a folder.

        Args:
            folder: of a task that is being written.
            features: file with the features of the task's test images, which need not exist.
            earlier: those of earlier tasks.
            known: digests that need not be computed again, by path.
        """
        known = known or {}
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return cls(
            folder,
            {name: Digest.of(path, known.get(name)) for name, path in paths.items() if name != DIGESTS},
            Digest.of(features) if features is not None and features.is_file() else None,
            {path.name: Digest.of(path) for path in earlier if path.is_file()},
        )

    @classmethod
    def read(cls, folder: Path) -> Digests | None:
        """Read those of a task's folder, or of a copy of one; None for a run of an earlier version, which has none.

        Raises:
            ValueError: a damaged file.
        """
        path = folder / DIGESTS
        if not path.exists():
            return None
        content = reading.read_json(path)
        try:
            if not {"files", "features"} <= content.keys() <= {"files", "features", "earlier_features"}:
                raise ValueError(f"it has {', '.join(content)[:120]} where files and features are expected")
            files, earlier = _parse_all(content["files"]), _parse_all(content.get("earlier_features", {}))
            features = content["features"]
            return cls(folder, files, features if features is None else Digest.parse(features), earlier)
        except ValueError as error:
            raise AlteredFileError(
                f"{path} is damaged ({error}): fetch the folder again, or use the revision before it."
            ) from error

    def write(self, folder: Path | None = None) -> None:
        """Write `digests.json`, by default into the folder of the files."""
        content: dict[str, Any] = {
            "files": {name: asdict(digest) for name, digest in self.files.items()},
            "features": None if self.features is None else asdict(self.features),
        }
        if self.earlier_features:
            content["earlier_features"] = {name: asdict(one) for name, one in self.earlier_features.items()}
        write_json((folder or self.folder) / DIGESTS, content)

    @property
    def checked(self) -> list[str]:
        """Return the files that are checked: all but those that people edit."""
        return [name for name in self.files if name != CARD and not name.startswith(f"{FIGURES}/")]

    def check(self, name: str) -> None:
        """Raise ValueError unless the file of this name is the one that the run wrote."""
        self._listed(name).check(self.folder / name)

    def check_read(self, names: Iterable[str]) -> None:
        """Raise ValueError unless those of a revision's files that are read are as the run wrote them.

        Of tensors, whose content is checked when they are read, only the size is compared.
        """
        for name in dict.fromkeys(names):
            path = self.folder / name
            if path.exists():
                listed = self._listed(name)
                listed.check(path) if name.endswith(".json") else listed.check_size(path)
            elif name in self.files and name not in LARGE:
                raise AlteredFileError(
                    f"{self.folder} has no {name}, which {DIGESTS} lists: the download or copy is incomplete."
                )

    def check_features(self, path: Path, own: bool) -> None:
        """Raise ValueError unless a file with the features of test images is the one that the run wrote.

        Args:
            path: of the file.
            own: whether it is of this task, and not of an earlier one, which may not be listed.
        """
        digest = self.features if own else self.earlier_features.get(path.name)
        if digest is not None:
            digest.check(path)
        elif own:
            raise AlteredFileError(
                f"{path} is not listed in {self.folder / DIGESTS}, so the run did not write it: remove it."
            )

    def _listed(self, name: str) -> Digest:
        if name not in self.files:
            raise AlteredFileError(
                f"{self.folder / name} is not listed in {DIGESTS}, so the run did not write it: remove it, or fetch the "
                "folder again."
            )
        return self.files[name]


def _parse_all(content: Any) -> dict[str, Digest]:
    """Return digests by path; raise ValueError for a path that leaves the folder, or another content."""
    if not isinstance(content, dict):
        raise ValueError("it has no object of digests by path")
    for name in content:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name or ":" in name:
            raise ValueError(f"{name!r} is not a path in this folder")
    return {name: Digest.parse(entry) for name, entry in content.items()}
