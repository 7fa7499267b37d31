"""Find image files."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted, by their endings; none is opened."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in endings and file.is_file())
