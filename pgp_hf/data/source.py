"""Read a dataset: find its splits, columns and labels, and choose rows for the tasks.

Streams are built from these functions, and the command line uses some of them to prepare datasets. Problems with a
dataset are detected here and reported together with their fix. Only the label column is read; images are read in
`pgp_hf.data.rows`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from .checking import check_optional_int, shorten
from .classes import alike
from .local import is_reader, load_labelled_folder
from .rows import ImageRows

EVAL_SPLITS = ("test", "validation", "valid", "val")
LABEL_NAMES = ("label", "labels", "fine_label")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# ---- splits ---------------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str], revision: str | None = None, config: str | None = None
) -> tuple[datasets.DatasetDict, str | None]:
    """Load a local folder of parquet or image files, or a dataset from the Hub.

    Args:
        path: the folder, whose name is taken as it is, or the Hub id.
        revision: branch, tag or commit on the Hub.
        config: name of one of its configurations, if there are several.

    Returns:
        The splits, and a name for the dataset that holds no path of this machine.

    Raises:
        ValueError: `path` is neither a folder nor a Hub id, or it does not load; the message has the reason.
    """
    text = os.fspath(path)
    local = os.path.isdir(text)
    if local:
        name = Path(text).resolve().name or None
    elif isinstance(path, str) and HUB_ID.fullmatch(text) and not is_reader(text):
        name = text
    else:
        raise ValueError(
            f"dataset {text!r} is neither an existing folder nor a Hub id ('name' or 'owner/name'); "
            f"pass a folder of parquet or image files, a Hub id, or a loaded datasets.Dataset"
        )
    chosen = {} if config is None else {"name": config}
    try:
        if local:
            return load_labelled_folder(text, **chosen), name
        return datasets.load_dataset(text, **chosen, **({} if revision is None else {"revision": revision})), name
    except Exception as error:  # load_dataset raises a dozen unrelated types; the reason is kept
        where = "folder" if local else "no such folder exists; as a Hub id"
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = reason or error  # the former says that there was an error, and not which
        raise ValueError(
            f"dataset {text!r} ({where}) could not be loaded: {type(reason).__name__}: {reason}. "
            f"Fix the path or id, or load it yourself and pass the datasets.DatasetDict"
        ) from error


def map_style(name: str, data: Any) -> datasets.Dataset:
    """Return `data` if it is a `datasets.Dataset`; otherwise raise a TypeError that says what to pass."""
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise TypeError(
            f"{name} is a streaming {type(data).__name__}, whose rows cannot be selected by label; "
            f"load it without streaming=True, or materialise it: "
            f"datasets.Dataset.from_list(list(it), features=it.features)"
        )
    if isinstance(data, datasets.DatasetDict):
        raise TypeError(
            f"{name} is a datasets.DatasetDict with the splits {shorten(data)}: pass one of them, as {name}=ds['...']"
        )
    if not isinstance(data, datasets.Dataset):
        more = ", a datasets.DatasetDict, a folder or a Hub id" if name == "dataset" else ""
        raise TypeError(f"{name} must be a datasets.Dataset{more}, got {type(data).__name__}")
    return data


def resolve_splits(
    dataset: Any, test_dataset: Any, test_split: str | None
) -> tuple[datasets.Dataset, datasets.Dataset | None, str | None]:
    """Return the train rows, the test rows (None if they have to be held out of train) and the dataset's name.

    Args:
        dataset: a `Dataset`, a `DatasetDict`, a local folder or a Hub id.
        test_dataset: test rows, if they are given separately.
        test_split: name of the test split of a `DatasetDict`; by default the first of `EVAL_SPLITS` that it has.

    Raises:
        TypeError: a streaming dataset, or something that is not a dataset.
        ValueError: splits that are missing, empty or given twice.
    """
    name: str | None = None
    if isinstance(dataset, str | os.PathLike):
        dataset, name = load(dataset)
    if test_split is not None and test_dataset is not None:
        raise ValueError(f"test_split={test_split!r} and test_dataset were both given; pass one of them")
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise ValueError(
                f"the dataset has no split 'train', only {shorten(dataset)}; "
                f"pass datasets.DatasetDict(train=ds[...], test=ds[...]), or one split as a bare Dataset"
            )
        if test_split is not None and (test_split not in dataset or test_split == "train"):
            usable = [split for split in dataset if split != "train"]
            raise ValueError(f"test_split={test_split!r} is not a split to test on; the dataset has {shorten(usable)}")
        if test_dataset is None:
            test_split = test_split or next((split for split in EVAL_SPLITS if split in dataset), None)
            test_dataset = dataset[test_split] if test_split is not None else None
        dataset = dataset["train"]
    elif test_split is not None:
        raise ValueError(
            f"test_split={test_split!r} needs a datasets.DatasetDict; for a bare Dataset use test_dataset"
        )
    train = map_style("dataset", dataset)
    test = None if test_dataset is None else map_style("test_dataset", test_dataset)
    for split, data in (("train", train), ("test", test)):
        if data is not None and len(data) == 0:
            raise ValueError(f"the {split} split has no rows")
    if name is None and train.info.dataset_name:
        name = train.info.dataset_name.replace("\\", "/").rstrip("/")
        name = name.split("/")[-1] if os.path.isabs(name) else name  # no path of this machine in a manifest
    return train, test, name


# ---- columns and labels ---------------------------------------------------------------------------------------------


def resolve_columns(data: datasets.Dataset, label_column: str | None, image_column: str | None) -> tuple[str, str]:
    """Return the names of the label and the image column; a name that is None is inferred from the features.

    Raises:
        ValueError: a column that cannot be inferred, because none fits or several do.
    """
    features = data.features
    if label_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        found = found or [name for name in LABEL_NAMES if name in features]
        label_column = _only(
            found, "label_column", f"ClassLabel column, nor one named {' or '.join(LABEL_NAMES)}", features
        )
    if image_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        hint = "; a column of paths or bytes becomes one by dataset.cast_column(name, datasets.Image())"
        image_column = _only(found, "image_column", "datasets.Image column", features, hint)
    return label_column, image_column


def _only(found: list[str], argument: str, what: str, features: datasets.Features, hint: str = "") -> str:
    """Return the only column in `found`, or raise an error about `argument`."""
    if len(found) == 1:
        return found[0]
    state = f"several candidates {shorten(found)}" if found else f"no {what}{hint}"
    raise ValueError(
        f"{argument} cannot be inferred: the dataset has {state}. Set {argument} to one of {shorten(features)}"
    )


def check_columns(split: str, data: datasets.Dataset, label_column: str, image_column: str) -> None:
    """Raise ValueError unless the label column is integer or ClassLabel and the image column is datasets.Image."""
    for argument, column in (("label_column", label_column), ("image_column", image_column)):
        if column not in data.features:
            raise ValueError(
                f"{argument}={column!r} is not a column of the {split} split; set it to one of {shorten(data.features)}"
            )
    image, label = data.features[image_column], data.features[label_column]
    if not isinstance(image, datasets.Image):
        raise ValueError(
            f"image column {image_column!r} of the {split} split is {image}, not datasets.Image; "
            f"use dataset.cast_column({image_column!r}, datasets.Image())"
        )
    integer = isinstance(label, datasets.Value) and re.fullmatch(r"u?int\d+", label.dtype)
    if not isinstance(label, datasets.ClassLabel) and not integer:
        raise ValueError(
            f"label column {label_column!r} of the {split} split is {label}, neither ClassLabel nor integer; "
            f"use dataset.class_encode_column({label_column!r}), or set label_column to one of {shorten(data.features)}"
        )


def read_labels(split: str, data: datasets.Dataset, column: str) -> np.ndarray:
    """Return the label column as stored, int64 `(rows,)`; raise ValueError if rows are unlabelled (None or -1)."""
    # Arrow, because numpy format turns an integer column with a null into floats
    values = data.select_columns([column]).with_format("arrow")[:].column(column)
    labels = values.drop_null().cast(pa.int64()).to_numpy()
    missing = values.null_count + int((labels == -1).sum())
    if missing:
        raise ValueError(
            f"{missing} of {len(values)} rows of the {split} split are unlabelled (None or -1 in {column!r}); leave "
            f"them out: dataset.filter(lambda x: x is not None and x >= 0, input_columns={column!r})"
        )
    return labels


def map_labels(
    train: datasets.Dataset, test: datasets.Dataset | None, column: str
) -> tuple[np.ndarray, np.ndarray | None, list[str], list[int]]:
    """Map the labels to ids 0..C-1.

    A ClassLabel keeps its ids and names, and the test split's classes are found by their names, whatever their order
    there. In an integer column, the distinct values of the train split are sorted and numbered.

    Returns:
        Ids of the train rows and of the test rows (None without any), the C names, and the C values in the column.

    Raises:
        ValueError: labels outside their ClassLabel, names in one split alone, or test labels that no train row has.
    """
    found, names, values = _numbered("train", train, column)
    if test is None:
        return found, None, names, values
    named = isinstance(train.features[column], datasets.ClassLabel)
    if named != isinstance(test.features[column], datasets.ClassLabel):
        has, lacks = ("train", "test") if named else ("test", "train")
        raise ValueError(
            f"label column {column!r} has class names in the {has} split and integers alone in the {lacks} split; name "
            f"these, in the order of their own values: {lacks}.cast_column({column!r}, datasets.ClassLabel(names=[...]))"
        )
    test_found, test_names, test_values = _numbered("test", test, column)
    known = {names[position]: position for position in np.unique(found).tolist()}
    unknown = [position for position in np.unique(test_found).tolist() if test_names[position] not in known]
    if unknown:
        pairs = (alike(test_names[position], name) for position in unknown for name in known)
        hint = next((f" ({pair})" for pair in pairs if pair), "")
        raise ValueError(
            f"{len(unknown)} labels are in the test split but not in train: "
            f"{shorten((test_names if named else test_values)[position] for position in unknown)}{hint}; remove those rows "
            f"from the test split, or add training images of these classes"
        )
    ids = np.array([known.get(name, -1) for name in test_names])
    return found, ids[test_found], names, values


def _numbered(split: str, data: datasets.Dataset, column: str) -> tuple[np.ndarray, list[str], list[int]]:
    """Return the class of each row of a split, as a position in its classes' names and values, which follow."""
    feature, raw = data.features[column], read_labels(split, data, column)
    if not isinstance(feature, datasets.ClassLabel):
        values = np.unique(raw)
        return np.searchsorted(values, raw), [str(value) for value in values], values.tolist()
    names = list(feature.names)
    outside = np.setdiff1d(raw, np.arange(len(names)))
    if len(outside):
        raise ValueError(
            f"label column {column!r} of the {split} split holds {shorten(outside.tolist())}, outside its ClassLabel's "
            f"0..{len(names) - 1}; name all values, in their order: "
            f"dataset.cast_column({column!r}, datasets.ClassLabel(names=[...]))"
        )
    return raw, names, list(range(len(names)))


class Labelled(NamedTuple):
    """The rows of a dataset with their labels.

    Args:
        train, test: the rows; `test` is None if there are no test rows, or they are left out.
        has_test: whether there are test rows, left out or not.
        name: of the dataset, if it has one.
        label_column, image_column: names of the columns.
        labels, test_labels: the class of each row, as a position in `names`.
        names: of the classes.
        values: of the classes in the label column.
    """

    train: datasets.Dataset
    test: datasets.Dataset | None
    has_test: bool
    name: str | None
    label_column: str
    image_column: str
    labels: np.ndarray
    test_labels: np.ndarray | None
    names: list[str]
    values: list[int]

    @property
    def named(self) -> bool:
        """Return True if the names are the dataset's, and not its integers."""
        return isinstance(self.train.features[self.label_column], datasets.ClassLabel)

    def relabelled(self, ids: Mapping[int, int], names: list[str]) -> Labelled:
        """Return the same rows with other label ids, by present ones; rows of classes without one get -1.

        `names` are the new names, and `values` become those of the classes in `ids`, in its order.
        """
        table = np.full(len(self.names), -1)
        table[list(ids)] = list(ids.values())
        test = None if self.test_labels is None else table[self.test_labels]
        kept = [self.values[position] for position in ids]
        return self._replace(labels=table[self.labels], test_labels=test, names=names, values=kept)

    def images(self) -> tuple[ImageRows, ImageRows]:
        """Return the images to train and to test on; rows that are held out keep their row numbers."""
        train = ImageRows("train", self.train, self.image_column, self.labels)
        if self.test is None or self.test_labels is None:
            return train, train
        return train, ImageRows("test", self.test, self.image_column, self.test_labels)

    def described(self, test_fraction: float | None, limits: Mapping[str, int | None]) -> dict[str, Any]:
        """Return what a manifest says of the dataset; name and fingerprints are for information only.

        Args:
            test_fraction: share of each class that is held out for testing.
            limits: from [`check_limits`].
        """
        test = self.train if self.test is None else self.test
        return {
            "dataset": {
                "name": self.name,
                "fingerprint": {"train": self.train._fingerprint, "test": test._fingerprint},
            },
            "label_column": self.label_column,
            "image_column": self.image_column,
            "label_values": self.values,
            "test_fraction": test_fraction,
            **limits,
        }


def read_dataset(
    dataset: Any,
    test_dataset: Any,
    test_split: str | None,
    label_column: str | None,
    image_column: str | None,
    use_test: bool = True,
) -> Labelled:
    """Read the labels of a dataset; raise what `resolve_splits`, `resolve_columns`, `map_labels` do.

    Args:
        dataset, test_dataset, test_split: see `resolve_splits`.
        label_column, image_column: see `resolve_columns`.
        use_test: False to leave test rows out.
    """
    train, test, name = resolve_splits(dataset, test_dataset, test_split)
    has_test, test = test is not None, test if use_test else None
    label_column, image_column = resolve_columns(train, label_column, image_column)
    for split, data in (("train", train), ("test", test)):
        if data is not None:
            check_columns(split, data, label_column, image_column)
    mapped = map_labels(train, test, label_column)
    return Labelled(train, test, has_test, name, label_column, image_column, *mapped)


def check_limits(max_train: int | None, max_eval: int | None) -> dict[str, int | None]:
    """Return the limits of images per class by their arguments' names; raise TypeError or ValueError if they are none."""
    given = {"max_train_samples_per_class": max_train, "max_eval_samples_per_class": max_eval}
    return {name: check_optional_int(name, value, 1, none="all") for name, value in given.items()}


# ---- choosing rows --------------------------------------------------------------------------------------------------
# What is drawn for a class depends on (seed, purpose, class) alone, not on the class order or on other classes.


def hold_out(
    rows: np.ndarray, labels: np.ndarray, fraction: float, seed: int, purpose: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split row numbers into those to keep and those held out, stratified.

    A class of two or more rows has at least one of each; `purpose` is 2 for test and 3 for validation.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels[rows]):
        own = rows[labels[rows] == label]
        count = min(max(round(fraction * len(own)), 1), len(own) - 1)
        held[np.random.default_rng([seed, purpose, label]).choice(own, count, replace=False)] = True
    return rows[~held[rows]], rows[held[rows]]


def at_most(rows: np.ndarray, labels: np.ndarray, limit: int | None, seed: int, split: int) -> np.ndarray:
    """Keep at most `limit` rows of each class, in row order; `split` is 0 for train and 1 for test."""
    if limit is None:
        return rows
    kept = []
    for label in np.unique(labels[rows]):
        own = rows[labels[rows] == label]
        if len(own) > limit:
            own = np.random.default_rng([seed, split, label]).choice(own, limit, replace=False)
        kept.append(own)
    return np.sort(np.concatenate(kept)) if kept else rows


def choose_rows(
    labels: np.ndarray,
    test_labels: np.ndarray | None,
    held_out: Sequence[float | None],
    seed: int,
    max_train: int | None,
    max_test: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers to train and to test on.

    Args:
        labels: of the train rows; -1 for rows to leave out.
        test_labels: of the test rows, likewise; None to test on train rows that are held out.
        held_out: shares of each class that are held out of the train rows one after the other: test rows, then
            validation rows, None for neither. What is held out last is tested on.
        seed: of what is drawn.
        max_train, max_test: number of rows kept of each class at most; None for all.
    """
    train = np.flatnonzero(labels >= 0)
    test = np.arange(0) if test_labels is None else np.flatnonzero(test_labels >= 0)
    for purpose, fraction in enumerate(held_out, 2):
        if fraction is not None:
            train, test = hold_out(train, labels, fraction, seed, purpose)
    test_labels = labels if test_labels is None else test_labels
    return at_most(train, labels, max_train, seed, split=0), at_most(test, test_labels, max_test, seed, split=1)


def cut(
    split: str, rows: np.ndarray, labels: np.ndarray, tasks: Sequence[tuple[int, ...]], names: Sequence[str]
) -> list[np.ndarray]:
    """Divide the chosen rows among the tasks, each given by its label ids; warn about classes without images.

    Raises:
        ValueError: a task without images.
    """
    own_labels = labels[rows]
    of_task = [rows[np.isin(own_labels, classes)] for classes in tasks]
    for index, own in enumerate(of_task):
        if len(own) == 0:
            classes = shorten(names[label] for label in tasks[index])
            raise ValueError(
                f"task {index} (0-based, classes {classes}) has no {split} images; "
                f"use fewer tasks, another class_order, or add {split} images of these classes"
            )
    empty = np.flatnonzero(np.bincount(own_labels, minlength=len(names)) == 0).tolist()
    if empty:
        classes = shorten(names[label] for label in empty)
        warnings.warn(f"{len(empty)} classes have no {split} images: {classes}", stacklevel=2)
    return of_task
