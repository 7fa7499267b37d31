"""Hold the readers of saved projections, which come from outside: this folder neither opens files nor uses the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, Protocol, TypeVar

Read = TypeVar("Read")
ReadOut = TypeVar("ReadOut", covariant=True)


class Reader(Protocol[ReadOut]):
    """A function that reads from a folder or a repository on the Hub."""

    def __call__(self, repo_or_dir: str | Path, revision: str | None = None, **hub: object) -> ReadOut: ...


class HandedIn(Generic[Read]):
    """The reader behind a `from_pretrained`, once it has been handed in.

    Attributes:
        reader: called with `(repo_or_dir, revision, **hub)`; None before.
    """

    def __init__(self) -> None:
        self.reader: Reader[Read] | None = None

    def __call__(self, repo_or_dir: str | Path, revision: str | None, **hub: object) -> Read:
        """Call the reader.

        Raises:
            RuntimeError: no reader was handed in.
        """
        if self.reader is None:
            raise RuntimeError(
                "from_pretrained has no reader, because this folder is used outside the pgp_hf package: import it as "
                "pgp_hf.projection, or provide your own functions with set_readers(config=..., projection=...)."
            )
        return self.reader(repo_or_dir, revision, **hub)
