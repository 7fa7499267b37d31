"""Find images in local folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets

from ..data.files import check_links, check_utf8, image_files


def labelled_images(folders: Sequence[str], option: str, names: Sequence[str] = ()) -> datasets.Dataset:
    """Return the images of folders with one subfolder per class, which may be a single one; no image is opened.

    Rows come folder by folder, each in the order that `load_dataset("imagefolder")` has. Hidden files are left out.

    Args:
        folders: of the classes' subfolders.
        option: that names the folders on the command line, for error messages.
        names: further classes to number, in alphabetical order with those of the subfolders.

    Raises:
        ValueError: no such folder, no images, a link to more of them, or an image outside the subfolders of classes.
    """
    files = [file for folder in folders for file in _in_subfolders(folder, option)]
    labels = [file.parent.name for file in files]
    classes = datasets.ClassLabel(names=sorted({*labels, *names}))
    images = datasets.Dataset.from_dict(
        {"image": list(map(str, files)), "label": labels},
        features=datasets.Features({"image": datasets.Image(), "label": classes}),
    )
    images.info.dataset_name = " and ".join(Path(folder).resolve().name for folder in folders)
    return images


def _in_subfolders(folder: str, option: str) -> list[Path]:
    """Return the images of a folder with one subfolder per class."""
    root, layout = Path(folder), f"expected one subfolder per class that holds its images itself, {folder}/CLASS/IMAGE"
    if not root.is_dir():
        raise ValueError(f"{option} {folder} is not a folder here: {layout}.")
    check_links(root)
    inside = [file.relative_to(root) for file in image_files(root)]
    found = sorted(str(file) for file in inside if not any(part.startswith(".") for part in file.parts))
    if not found:
        raise ValueError(f"{option} {folder} holds no images: {layout}.")
    for file in map(Path, found):
        check_utf8(root / file)
        if len(file.parts) != 2:
            raise ValueError(f"{option}: {root / file} is not in the subfolder of a class: {layout}.")
        if file.parts[0].startswith("__"):  # which a training does not read
            raise ValueError(
                f"{option}: {root / file.parts[0]} cannot be a class, since its name begins with '__': rename it."
            )
    return [root / file for file in found]
