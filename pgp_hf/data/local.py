"""Load local folders, whatever their names: `datasets` takes some for patterns, variables or readers of its own."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns
from datasets.load import infer_module_for_data_files
from huggingface_hub import DatasetCard

from .files import check_links, check_utf8, holds_images

_PATTERN = re.compile(r"[*?\[]")


def load_folder(folder: str | os.PathLike[str], **settings: Any) -> datasets.DatasetDict:
    """Load the splits of a folder of parquet or image files.

    Args:
        folder: that exists.
        settings: of the builder, such as `drop_labels`.

    Raises:
        ValueError: a file whose name `datasets` would not take literally, a folder like that with a README.md that
            chooses files, or one that `save_to_disk` has written.
    """
    root = os.path.realpath(folder)  # as datasets does; absolute, since it has a reader called "imagefolder" itself
    _refuse_saved(Path(root))
    _check_literal(root)
    if not _PATTERN.search(root):
        return _built(datasets.load_dataset_builder(root, **settings))
    card = Path(root) / "README.md"
    if card.is_file() and DatasetCard.load(card).data.get("configs"):
        raise ValueError(
            f"{root} has a README.md that chooses files by patterns, and {_PATTERN.findall(root)[0]!r} in its own path, "
            "which would be part of them: rename the folder"
        )
    with _plain(root) as base:
        files = _files(get_data_patterns(base), base, root)
    module, defaults = infer_module_for_data_files(files)
    if module == "parquet":
        files = files.filter(extensions=[".parquet"])
    return _built(datasets.load_dataset_builder(module, data_files=files, **{**defaults, **settings}))


def load_image_folders(folders: Mapping[str, str]) -> datasets.DatasetDict:
    """Load a folder of images as each split, given by the split's name.

    Raises:
        ValueError: a folder without images, or with a file whose name `datasets` would not take literally.
    """
    files = DataFilesDict()
    for split, folder in folders.items():
        root = os.path.abspath(folder)
        _check_literal(root)
        if not holds_images(root):
            raise ValueError(f"{folder} holds no images: expected one subfolder per class, {folder}/CLASS/IMAGE.")
        with _plain(root) as base:
            files.update(_files({split: ["**"]}, base, root))
    return _built(datasets.load_dataset_builder("imagefolder", data_files=files))


def is_reader(name: str) -> bool:
    """Return True if `datasets` has a reader of this name, which would read the working directory."""
    return (Path(datasets.packaged_modules.__path__[0]) / name).is_dir()


def _built(builder: datasets.DatasetBuilder) -> datasets.DatasetDict:
    builder.download_and_prepare()
    return builder.as_dataset()


def _refuse_saved(root: Path) -> None:
    """Raise ValueError for what `save_to_disk` has written, of which only the tables would be read, without their types."""
    for marks in (("dataset_dict.json",), ("state.json", "dataset_info.json")):
        if all((root / mark).is_file() for mark in marks):
            raise ValueError(
                f"{root} was written by save_to_disk, as its {marks[0]} shows: use datasets.load_from_disk and pass the "
                "dataset"
            )


def _check_literal(root: str) -> None:
    """Raise ValueError if `datasets` takes the path of a folder, or of a file in it, for another, or leaves it out."""
    check_links(root)
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]  # which are not read
        for path in (os.path.join(place, name) for name in files):
            check_utf8(path)
            if "::" in path:
                raise ValueError(
                    f"the '::' in {path} would be taken for the mark of a file within an archive: rename it"
                )
            if "$" in path and (taken := os.path.expandvars(path)) != path:
                raise ValueError(f"{path} would be taken for {taken}, by an environment variable: rename it")


@contextmanager
def _plain(root: str) -> Iterator[str]:
    """Yield a path of a folder that has no pattern in it: its own, or a link to it."""
    if not _PATTERN.search(root):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="pgp_hf-") as place:
        link = Path(place) / "folder"
        link.symlink_to(root, target_is_directory=True)
        yield str(link)


def _files(patterns: Mapping[str, list[str]], base: str, root: str) -> DataFilesDict:
    """Return the files that patterns find from `base`, by their paths from `root`, which is the same folder."""
    found = DataFilesDict.from_patterns(patterns, base_path=base)
    return DataFilesDict(
        {
            split: DataFilesList([root + file.removeprefix(base) for file in files], files.origin_metadata)
            for split, files in found.items()
        }
    )
