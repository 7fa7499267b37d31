"""Declare the arguments of the command lines: data, projection and head."""

from __future__ import annotations

import argparse
import os
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets

from .. import embedded
from ..data import source as source_data
from ..data.local import find_metadata, load_image_folders
from ..data.stream import TaskStream
from ..projection import CONDITIONS, ProjectionConfig
from ..projection.config import APPLY_TO, PROBE_SPACES
from ..training.arguments import PGPTrainingArguments
from ..tuners.base.config import PromptConfig
from .model_arguments import ModelArguments


def check_source(given: Any) -> None:
    """Raise ValueError for an option of a source of images that is not the one in use."""
    for name in ("dataset_config_name", "dataset_revision", "dataset_split"):
        if getattr(given, name) is not None and given.dataset_name is None:
            raise ValueError(f"--{name} goes with --dataset_name, which is not given.")
    if getattr(given, "validation_dir", None) is not None and given.train_dir is None:
        raise ValueError("--validation_dir goes with --train_dir: a data set has its own test split, or none.")


@dataclass
class DataArguments:
    """Describe the stream of tasks.

    Args:
        dataset_name: Hub id, or local folder of parquet or image files; scikit-learn's digits if no source is named.
        dataset_config_name: configuration of the data set, if there are several.
        dataset_revision: branch, tag or commit on the Hub.
        dataset_split: the only split to use; `test_fraction` of it is held out for testing.
        train_dir: local folder of training images, with one subfolder per class.
        validation_dir: local folder of test images, with one subfolder per class.
        image_column_name: image column, if there are several.
        label_column_name: label column, if there are several.
        num_tasks: number of tasks that the classes are divided into; None with `increment`.
        init_classes: number of classes of the first task; `increment` by default.
        increment: number of classes of each further task, instead of `num_tasks`.
        scenario: how tasks are learned and tested; "online" means one epoch per task.
        shift: "renderings" shows each task's images in a rendering of its own; None leaves them as they are.
        class_order: order in which the classes arrive, "random" or by "label".
        class_order_seed: seed of the class order, and of the images kept and held out; the run's seed by default.
        test_fraction: fraction of each class that is held out if there are no test images.
        train_val_split: fraction of each class's training images that are held out, to evaluate on them instead of the
            test images.
        max_train_samples_per_class: maximum number of training images per class.
        max_eval_samples_per_class: maximum number of test images per class.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, or local folder of parquet or image files; without a source of images, scikit-learn's "
            "handwritten digits are used"
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "configuration of the data set, if there are several"}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the data set on the Hub"}
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "use only this split, and hold out test_fraction of it for testing"}
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "local folder of training images, with one subfolder per class"}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "local folder of test images, with one subfolder per class"}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "image column, if there are several"})
    label_column_name: str | None = field(default=None, metadata={"help": "label column, if there are several"})
    num_tasks: int | None = field(default=10, metadata={"help": "number of tasks that the classes are divided into"})
    init_classes: int | None = field(
        default=None, metadata={"help": "number of classes of the first task, with --increment, which is the default"}
    )
    increment: int | None = field(
        default=None, metadata={"help": "number of classes of each further task, instead of --num_tasks"}
    )
    scenario: Literal["class_incremental", "task_incremental", "online"] = field(
        default="class_incremental",
        metadata={"help": "how tasks are learned and tested; online means one epoch per task"},
    )
    shift: Literal["renderings"] | None = field(
        default=None,
        metadata={
            "help": "let the tasks see the world differently: 'renderings' shows each task's images in a rendering of its "
            "own, drawn by the seed (inverted, edges, grey, turned, ...)"
        },
    )
    class_order: Literal["random", "label"] = field(
        default="random",
        metadata={"help": "order in which the classes arrive: shuffled with the seed, or by label"},
    )
    class_order_seed: int | None = field(
        default=None,
        metadata={"help": "seed of the class order, and of the images kept and held out; --seed if not given"},
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "fraction of each class that is held out if there are no test images"}
    )
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "fraction of each class's training images that is held out for validation: the run is evaluated on these "
            "images, and the test images are left alone"
        },
    )
    max_train_samples_per_class: int | None = field(
        default=None, metadata={"help": "maximum number of training images per class"}
    )
    max_eval_samples_per_class: int | None = field(
        default=None, metadata={"help": "maximum number of test images per class"}
    )

    def __post_init__(self) -> None:
        check_source(self)

    def choose_tasks(self, given: Container[str]) -> None:
        """Let `increment` replace the default of `num_tasks`.

        Args:
            given: the options on the command line.

        Raises:
            ValueError: options that are mutually exclusive, or one that needs another.
        """
        sizes = [name for name in ("--init_classes", "--increment") if name in given]
        if sizes and "--num_tasks" in given and self.num_tasks is not None:  # null in a file
            raise ValueError(f"--num_tasks and {' and '.join(sizes)} are mutually exclusive: leave one out.")
        if self.init_classes is not None and self.increment is None:
            raise ValueError("--init_classes needs --increment, the number of classes of each further task.")
        if self.increment is not None:
            self.num_tasks = None

    def load(self, seed: int) -> TaskStream:
        """Load the stream; labels that are strings become classes in alphabetical order.

        Args:
            seed: of the class order, the images kept and the images held out, unless `class_order_seed` is given.

        Raises:
            ValueError: arguments that contradict each other or the data; the message has the fix.
        """
        train, test, _ = source_data.resolve_splits(self.source(), None, None)
        label, image = source_data.resolve_columns(train, self.label_column_name, self.image_column_name)
        train, test = string_labels_as_classes(train, test, label)
        return TaskStream.from_dataset(
            train,
            test_dataset=test,
            num_tasks=self.num_tasks if self.increment is None else None,
            init_classes=self.init_classes,
            increment=self.increment,
            label_column=label,
            image_column=image,
            scenario=self.scenario,
            shift=self.shift,
            seed=seed if self.class_order_seed is None else self.class_order_seed,
            class_order=_label_order(train, label) if self.class_order == "label" else None,
            test_fraction=self.test_fraction,
            train_val_split=self.train_val_split,
            max_train_samples_per_class=self.max_train_samples_per_class,
            max_eval_samples_per_class=self.max_eval_samples_per_class,
        )

    def source(self) -> datasets.DatasetDict:
        """Load the splits of the source that is named, or else the embedded digits.

        Raises:
            ValueError: two sources, images without labels, a split that is not there.
        """
        if self.dataset_name and self.train_dir:
            raise ValueError("give --dataset_name or --train_dir, not both.")
        if self.train_dir:
            return self._folders(self.train_dir)
        return self._named(self.dataset_name) if self.dataset_name else embedded.digits()

    def _folders(self, train_dir: str) -> datasets.DatasetDict:
        folders = {"train": train_dir} | ({"validation": self.validation_dir} if self.validation_dir else {})
        for option, folder in zip(("--train_dir", "--validation_dir"), folders.values(), strict=False):
            if not os.path.isdir(folder):
                raise ValueError(f"{option} {folder} is not a folder here: expected one with a subfolder per class.")
        splits = load_image_folders(folders)
        if self.label_column_name is None and "label" not in splits["train"].features:
            if file := find_metadata(folders.values()):
                raise ValueError(
                    f"{file} takes the place of the folders' names as labels: name the column of the labels by "
                    "--label_column_name, or move the file elsewhere."
                )
            raise ValueError(
                f"the images in {' and '.join(folders.values())} have no labels: expected "
                "one subfolder per class that holds its images itself, FOLDER/CLASS/IMAGE, and at least two classes. Move "
                "images that are nested deeper, as in Tiny ImageNet's archive, up into the folder of their class."
            )
        root = Path(train_dir).resolve()
        named = root.parent if root.name.lower() in ("train", "training") else root
        for data in splits.values():
            data.info.dataset_name = named.name  # and not that of the reader
        return splits

    def _named(self, name: str) -> datasets.DatasetDict:
        splits, public = source_data.load(name, self.dataset_revision, self.dataset_config_name)
        split = self.dataset_split or "train"
        if split not in splits:
            raise ValueError(
                f"dataset {public!r} has no split {split!r}, only {source_data.shorten(splits)}: name one with "
                "--dataset_split; its images are then divided into training and test images by --test_fraction."
            )
        if self.dataset_split:
            splits = datasets.DatasetDict(train=splits[split])
        for data in splits.values():
            data.info.dataset_name = public  # with its owner, for the stream's manifest
        return splits


def string_labels_as_classes(
    train: datasets.Dataset, test: datasets.Dataset | None, column: str
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return both splits, with `column` turned into a `ClassLabel` where it holds strings; one with names has its own."""
    splits = [train] if test is None else [train, test]
    texts = [getattr(data.features.get(column), "dtype", None) in ("string", "large_string") for data in splits]
    if not any(texts):
        return train, test
    found = {name for data, text in zip(splits, texts, strict=True) if text for name in data.unique(column)} - {None}
    classes = datasets.ClassLabel(names=sorted(map(str, found)))
    splits = [data.cast_column(column, classes) if text else data for data, text in zip(splits, texts, strict=True)]
    return splits[0], splits[1] if len(splits) > 1 else None


def _label_order(train: datasets.Dataset, column: str) -> range | None:
    """Return all label ids in order; None without such a column, an error that the stream reports."""
    if column not in train.features:
        return None
    feature = train.features[column]
    return range(feature.num_classes if isinstance(feature, datasets.ClassLabel) else len(train.unique(column)))


def _setting(name: str, **metadata: Any) -> Any:
    """Declare an argument with the default and the help of a `ProjectionConfig` field."""
    known = ProjectionConfig.__dataclass_fields__[name]
    return field(default=known.default, metadata={**known.metadata, **metadata})


class FloatOrNone(float):
    """Read a number that may be "none" from the command line."""

    def __new__(cls, text: str) -> float | None:  # type: ignore[misc]  # HfArgumentParser calls a field's class to read it
        try:
            return None if text.lower() == "none" else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'none'") from None


@dataclass
class RunArguments:
    """Choose preset, projection, head and comparison.

    Args:
        preset: name of published settings.
        dry_run: print all settings and stop.
        projection: `method` of the `ProjectionConfig`.
        energy, key_energy, value_energy, apply_to, max_images, probes, probe_space, hold_key_norm, ln_penalty,
            softness, equal_images, all_keys, bf16_probes: the other fields of the `ProjectionConfig`.
        head: the classifier, "linear" or "statistics".
        no_compare: train this run alone, without its unprojected twin and the classifiers on frozen features.

    Attributes:
        main_job: True if the recipe is that of `recipes`, beside which PGP as published is trained.
    """

    preset: str | None = field(
        default=None,
        metadata={
            "help": "name of published settings, such as cifar100-10; options on the command line take precedence"
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "print all settings that result, and stop"})
    projection: str = _setting("method", choices=["none", *CONDITIONS])
    energy: float = _setting("energy")
    key_energy: FloatOrNone | None = _setting("key_energy")
    value_energy: FloatOrNone | None = _setting("value_energy")
    apply_to: str = _setting("apply_to", choices=list(APPLY_TO))
    max_images: int | None = _setting("max_images")
    probes: int = _setting("probes")
    probe_space: str = _setting("probe_space", choices=list(PROBE_SPACES))
    hold_key_norm: bool = _setting("hold_key_norm")
    ln_penalty: float = _setting("ln_penalty")
    softness: float = _setting("softness")
    equal_images: bool = _setting("equal_images")
    all_keys: bool = _setting("all_keys")
    bf16_probes: bool = _setting("bf16_probes")
    head: Literal["linear", "statistics"] = field(
        default="linear", metadata={"help": PromptConfig.__dataclass_fields__["head"].metadata["help"]}
    )
    no_compare: bool = field(
        default=False,
        metadata={
            "help": "train this run alone: skip its unprojected twin, which is otherwise trained first, and the "
            "classifiers on frozen features"
        },
    )
    main_job: bool = field(default=False, init=False)

    def config(self) -> ProjectionConfig:
        """Return the projection's settings."""
        same = {name: getattr(self, name) for name in ProjectionConfig.__dataclass_fields__ if name != "method"}
        return ProjectionConfig(method=self.projection, **same)


class Arguments(NamedTuple):
    """All arguments of an example; `prompts` are the adapter's own."""

    model: ModelArguments
    data: DataArguments
    prompts: Any
    run: RunArguments
    training: PGPTrainingArguments
