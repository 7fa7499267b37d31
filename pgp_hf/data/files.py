"""Find image files."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted, by their endings; none is opened."""
    return sorted(_found(folder))


def check_utf8(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a path that is not UTF-8, which tables and JSON cannot hold."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {os.fspath(path)!a} is not UTF-8, as it must be here: choose another.") from error


def is_image(name: str) -> bool:
    """Return whether a file is an image, by its ending."""
    return os.path.splitext(name)[1].lower() in _endings()


def holds_images(folder: str | os.PathLike[str]) -> bool:
    """Return whether there is an image file in a folder or its subfolders."""
    return next(_found(folder), None) is not None


def check_links(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError for a link, in a folder, to a folder of images: those would be left out without a word."""
    for place, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]  # which are not read
        for path in (os.path.join(place, name) for name in folders):
            if os.path.islink(path) and holds_images(path):
                raise ValueError(
                    f"{path} is a link to a folder of images, which is not followed: put the folder itself there, or leave "
                    "the link out."
                )


def _found(folder: str | os.PathLike[str]) -> Iterator[Path]:
    endings = _endings()
    return (file for file in Path(folder).rglob("*") if file.suffix.lower() in endings and file.is_file())


@functools.cache
def _endings() -> frozenset[str]:
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)
