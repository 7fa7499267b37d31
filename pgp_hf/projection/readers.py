"""Readers of saved projections, handed in from outside: this folder neither opens files nor knows the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from .config import ProjectionConfig
    from .state import Projection

Read = TypeVar("Read", covariant=True)


class Reader(Protocol[Read]):
    """A function that reads from a folder or a repository on the Hub."""

    def __call__(self, repo_or_dir: str | Path, revision: str | None = None, **hub: object) -> Read: ...


class Readers(NamedTuple):
    """The readers behind `ProjectionConfig.from_pretrained` and `Projection.from_pretrained`."""

    config: Reader[ProjectionConfig]
    projection: Reader[Projection]


_readers: Readers | None = None


def set_readers(config: Reader[ProjectionConfig], projection: Reader[Projection]) -> None:
    """Hand in the functions behind `from_pretrained`; each is called with `(repo_or_dir, revision, **hub)`.

    Args:
        config: returns the settings of a saved projection.
        projection: returns a saved projection with its bases.
    """
    global _readers
    _readers = Readers(config, projection)


def current_readers() -> Readers:
    """Return the readers that were handed in.

    Raises:
        RuntimeError: none were handed in.
    """
    if _readers is None:
        raise RuntimeError(
            "from_pretrained has no reader, since the projection folder is used without the package around it: import "
            "it as pgp_hf.projection, or hand in functions of your own with set_readers(config=..., projection=...)."
        )
    return _readers
