"""Find images in local folders."""

from __future__ import annotations

from pathlib import Path

import datasets
from PIL import Image


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, by their endings; none is opened."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in endings and file.is_file())


def labelled_images(folder: str, option: str) -> datasets.Dataset:
    """Return the images of a folder with one subfolder per class, and the class names as labels; no image is opened.

    Rows come in the order that `load_dataset("imagefolder")` has, and hidden files are left out; but a single class is
    enough.

    Args:
        folder: of the classes' subfolders.
        option: that names the folder on the command line, for error messages.

    Raises:
        ValueError: no such folder, no images, or an image outside the subfolders of classes.
    """
    root, layout = Path(folder), f"expected one subfolder per class that holds its images itself, {folder}/CLASS/IMAGE"
    if not root.is_dir():
        raise ValueError(f"{option} {folder} is not a folder here: {layout}.")
    inside = [file.relative_to(root) for file in image_files(root)]
    found = sorted(str(file) for file in inside if not any(part.startswith((".", "__")) for part in file.parts))
    if not found:
        raise ValueError(f"{option} {folder} holds no images: {layout}.")
    for file in map(Path, found):
        if len(file.parts) != 2:
            raise ValueError(f"{option}: {root / file} is not in the subfolder of a class: {layout}.")
    columns = {"image": [str(root / file) for file in found], "label": [Path(file).parent.name for file in found]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    images = datasets.Dataset.from_dict(columns, features=features)
    images.info.dataset_name = root.resolve().name
    return images
