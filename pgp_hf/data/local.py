"""Load local folders, whatever their names: `datasets` takes some for patterns, variables or readers of its own."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns
from datasets.load import infer_module_for_data_files
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard

from .files import check_links, check_utf8, holds_images, is_image

_PATTERN = re.compile(r"[*?\[]")
_BY_NAME = ("train", "validation", "test")  # the splits that datasets finds by the names of files and folders


def load_folder(folder: str | os.PathLike[str], **settings: Any) -> datasets.DatasetDict:
    """Load the splits of a folder of parquet or image files.

    Args:
        folder: that exists.
        settings: of the builder, such as `drop_labels`.

    Raises:
        ValueError: a file whose name `datasets` would not take literally, or that it would read twice or leave out; a
            folder like that with a README.md that chooses files, or one that `save_to_disk` has written.
    """
    root = os.path.realpath(folder)  # as datasets does; absolute, since it has a reader called "imagefolder" itself
    _refuse_saved(Path(root))
    _check_literal(root)
    if not _PATTERN.search(root):
        return _built(datasets.load_dataset_builder(root, **settings), root)
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
    return _built(datasets.load_dataset_builder(module, data_files=files, **{**defaults, **settings}), root)


def load_labelled_folder(folder: str, **settings: Any) -> datasets.DatasetDict:
    """Load the splits of a folder as `load_folder` does, and images of a single class with their label.

    `datasets` leaves that label out.

    Raises:
        ValueError: as `load_folder`; several folders of the same name that hold the images.
    """
    splits = load_folder(folder, **settings)
    any_split = next(iter(splits.values()))
    if any_split.info.builder_name != "imagefolder" or list(any_split.features) != ["image"]:
        return splits
    labelled = load_folder(folder, **settings, drop_labels=False)
    names = next(iter(labelled.values())).features["label"].names
    flat = any(entry.is_file() for entry in os.scandir(folder))
    if set(names) & {*splits, *([Path(folder).resolve().name] if flat else [])}:
        return splits
    for data in labelled.values():
        files = data.cast_column("image", datasets.Image(decode=False))["image"]
        folders = sorted({os.path.dirname(file["path"]) for file in files})
        if len(folders) > 1:
            raise ValueError(
                f"{folders[0]} and {folders[1]} would be one class, {Path(folders[0]).name!r}: expected one subfolder per "
                "class that holds its images itself, CLASS/IMAGE; move the images up into the folders of their classes"
            )
    return labelled


def load_image_folders(folders: Mapping[str, str]) -> datasets.DatasetDict:
    """Load a folder of images as each split, given by the split's name.

    Raises:
        ValueError: a folder without images, or with a file whose name `datasets` would not take literally, or that it
            would leave out.
    """
    files = DataFilesDict()
    for split, folder in folders.items():
        root = os.path.abspath(folder)
        _check_literal(root)
        if not holds_images(root):
            raise ValueError(f"{folder} holds no images: expected one subfolder per class, {folder}/CLASS/IMAGE.")
        with _plain(root) as base:
            files.update(_files({split: ["**"]}, base, root))
    return _built(
        datasets.load_dataset_builder("imagefolder", data_files=files), *map(os.path.abspath, folders.values())
    )


def find_metadata(folders: Iterable[str]) -> str | None:
    """Return a file in folders of images from which `datasets` reads other columns; None if there is none."""
    paths = (os.path.join(place, name) for folder in folders for place, _, names in os.walk(folder) for name in names)
    return next(filter(_is_metadata, paths), None)


def is_reader(name: str) -> bool:
    """Return True if `datasets` has a reader of this name, which would read the working directory."""
    return (Path(datasets.packaged_modules.__path__[0]) / name).is_dir()


def _built(builder: datasets.DatasetBuilder, *roots: str) -> datasets.DatasetDict:
    """Read the files of a builder, those of the folders `roots`."""
    splits = _splits(builder.config.data_files or {})
    if isinstance(builder, ImageFolder) and not any(_is_metadata(file) for file in splits):
        for root in roots:
            _check_left_out(splits, root)
    builder.download_and_prepare()
    return builder.as_dataset()


def _splits(files: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the split of each file; raise ValueError for one in two of them, which would be trained on and tested on."""
    found: dict[str, str] = {}
    for split in (name for name in _BY_NAME if name in files):
        for file in map(os.path.normpath, dict.fromkeys(files[split])):
            if file in found and not _is_metadata(file):  # which may describe the images of several
                raise ValueError(
                    f"{file} would be in the splits {found[file]!r} and {split!r}, since its path has words for both: rename "
                    "one folder, or name the folder of each split: on the command line by --train_dir and --validation_dir, "
                    "in Python by datasets.load_dataset('imagefolder', data_files={'train': '.../train/**', ...})"
                )
            found[file] = split
    return found


def _check_left_out(splits: Mapping[str, str], root: str) -> None:
    """Raise ValueError for an image that is not read, though others are that lie in the same folder or in one beside it.

    Other images may lie elsewhere for other purposes, such as unlabelled ones next to the folders of the splits.
    """
    images = {file: split for file, split in splits.items() if _ending(file) in ImageFolder.EXTENSIONS}
    read = {os.path.dirname(file) for file in images}
    beside = {os.path.dirname(folder) for folder in read if folder != root}
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if place not in read and (place == root or os.path.dirname(place) not in beside):
            continue
        for name in sorted(files):
            path = os.path.join(place, name)
            if not name.startswith(".") and is_image(name) and path not in images and os.path.isfile(path):
                shown = path if path.isprintable() else repr(path)
                raise ValueError(f"{shown} would be left out: {_reason(path, root, images)}")


def _reason(path: str, root: str, images: Mapping[str, str]) -> str:
    """Return why `datasets` leaves out an image, and what to do."""
    special = next((part for part in Path(path).relative_to(root).parts[:-1] if part.startswith("__")), None)
    if special is not None:
        return f"datasets does not read folders whose names begin with '__', such as {special!r}; rename it"
    if _ending(path) not in ImageFolder.EXTENSIONS:
        return f"datasets does not read {_ending(path)} files; convert it, or remove it"
    if not path.isprintable():
        return "datasets does not find this name; rename it"
    other, split = next(iter(images.items()))
    return (
        f"the path of {other} has a word for the split {split!r}, and datasets then reads nothing else; put the folders of "
        f"all classes into {root}/train, or on the command line name {root} by --train_dir"
    )


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _is_metadata(file: str) -> bool:
    return os.path.basename(file) in ImageFolder.METADATA_FILENAMES


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
