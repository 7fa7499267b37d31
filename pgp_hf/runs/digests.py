"""Keep the digests of all files that a finished task has: `digests.json`, which is written last.

{"files": {"adapter_model.safetensors": {"sha256": "...", "bytes": 123}, ...}, "features": {"sha256": ..., "bytes": ...}}

`features` is that of the run's `features/task-t.safetensors`, null where no test image was there. The first task in the
folder of a run that goes on from a single revision also has `earlier_features`, by the names of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import reading
from .atomic import write_json
from .folder import DIGESTS, LARGE
from .listing import Digest, parse_digests

CARD, FIGURES = "README.md", "figures"
"""Files that people edit: they are listed, but not checked."""


class AlteredFileError(ValueError):
    """Report a file that is damaged or was altered, not one that is missing or belongs to another run."""


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
            files, earlier = parse_digests(content["files"]), parse_digests(content.get("earlier_features", {}))
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

    def check(self, name: str, copy: Path | None = None) -> None:
        """Raise ValueError unless the file of this name, or its copy elsewhere, is the one that the run wrote."""
        self._compare(self._listed(name), copy or self.folder / name)

    def check_read(self, names: Iterable[str]) -> None:
        """Raise ValueError unless those of a revision's files that are read are as the run wrote them.

        Of tensors, whose content is checked when they are read, only the size is compared.
        """
        for name in dict.fromkeys(names):
            path = self.folder / name
            if path.exists():
                self._compare(self._listed(name), path, size_only=not name.endswith(".json"))
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
            self._compare(digest, path)
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

    def _compare(self, digest: Digest, path: Path, size_only: bool = False) -> None:
        """Raise ValueError unless a file is the one that was noted."""
        if difference := digest.difference(path, DIGESTS, size_only):
            raise AlteredFileError(
                f"{path} is not the file that the run wrote: {difference}. It is damaged or was altered: fetch it again, or "
                "use the revision before it."
            )
