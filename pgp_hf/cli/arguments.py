"""The command line of the examples: data, backbone, projection and training, with presets."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPModel,
    CLIPTokenizer,
    HfArgumentParser,
    PreTrainedModel,
)
from transformers.utils import logging

from .. import embedded, presets
from ..data import source as source_data
from ..data.stream import TaskStream
from ..projection import CONDITIONS, ProjectionConfig
from ..projection.config import APPLY_TO, PROBE_SPACES
from ..training.arguments import PGPTrainingArguments
from ..tuners.base.config import PromptConfig


@dataclass
class DataArguments:
    """The stream of tasks."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, or local folder of parquet or image files; without it, the handwritten digits of scikit-learn"
        },
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})
    dataset_split: str | None = field(
        default=None,
        metadata={"help": "take this split alone, for training and, by test_fraction, for testing"},
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "local folder of training images, one folder a class"}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "the same for test images"})
    image_column_name: str | None = field(default=None, metadata={"help": "image column, when there are several"})
    label_column_name: str | None = field(default=None, metadata={"help": "label column, when there are several"})
    num_tasks: int = field(default=10, metadata={"help": "tasks that the classes are cut into"})
    scenario: Literal["class_incremental", "task_incremental", "online"] = field(
        default="class_incremental", metadata={"help": "how tasks are learned and tested; online is one epoch a task"}
    )
    class_order: Literal["random", "label"] = field(
        default="random",
        metadata={"help": "order in which classes arrive: drawn by the seed, or that of their labels"},
    )
    class_order_seed: int | None = field(
        default=None, metadata={"help": "seed of the class order and of the images kept; --seed when not given"}
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "share of each class that is held out when there are no test images"}
    )
    max_train_samples_per_class: int | None = field(default=None, metadata={"help": "training images kept per class"})
    max_eval_samples_per_class: int | None = field(default=None, metadata={"help": "test images kept per class"})

    def load(self, seed: int) -> TaskStream:
        """The stream; labels that are strings become classes in alphabetical order.

        Args:
            seed: of the class order, the images kept and the images held out, unless `class_order_seed` is given.

        Raises:
            ValueError: arguments that contradict each other or do not fit the data; the message has the fix.
        """
        if self.dataset_name and self.train_dir:
            raise ValueError("give --dataset_name or --train_dir, not both.")
        if self.train_dir:
            folders = {"train": f"{self.train_dir}/**"}
            if self.validation_dir:
                folders["validation"] = f"{self.validation_dir}/**"
            source: Any = datasets.load_dataset("imagefolder", data_files=folders)
        else:
            source = self._named(self.dataset_name) if self.dataset_name else embedded.digits()
        train, test, _ = source_data.resolve_splits(source, None, None)
        label, image = source_data.resolve_columns(train, self.label_column_name, self.image_column_name)
        train, test = _string_labels_as_classes(train, test, label)
        return TaskStream.from_dataset(
            train,
            test_dataset=test,
            num_tasks=self.num_tasks,
            label_column=label,
            image_column=image,
            scenario=self.scenario,
            seed=seed if self.class_order_seed is None else self.class_order_seed,
            class_order=_label_order(train, label) if self.class_order == "label" else None,
            test_fraction=self.test_fraction,
            max_train_samples_per_class=self.max_train_samples_per_class,
            max_eval_samples_per_class=self.max_eval_samples_per_class,
        )

    def _named(self, name: str) -> datasets.DatasetDict:
        if self.dataset_revision in (None, "main") or os.path.isdir(name):
            splits, name = source_data.load(name)
        else:
            splits = datasets.load_dataset(name, revision=self.dataset_revision)
        split = self.dataset_split or "train"
        if split not in splits:
            raise ValueError(
                f"dataset {name!r} has no split {split!r}, only {source_data.shorten(splits)}: name one with "
                "--dataset_split; its images are then cut into training and test images by --test_fraction."
            )
        if self.dataset_split:
            splits = datasets.DatasetDict(train=splits[split])
        for data in splits.values():
            data.info.dataset_name = name  # with its owner, for the stream's manifest
        return splits


def _string_labels_as_classes(
    train: datasets.Dataset, test: datasets.Dataset | None, column: str
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Both splits with a `ClassLabel` where `column` holds strings."""
    if getattr(train.features.get(column), "dtype", None) not in ("string", "large_string"):
        return train, test
    splits = [train] if test is None else [train, test]
    found = {name for data in splits if column in data.features for name in data.unique(column)} - {None}
    classes = datasets.ClassLabel(names=sorted(map(str, found)))
    splits = [data.cast_column(column, classes) if column in data.features else data for data in splits]
    return splits[0], splits[1] if len(splits) > 1 else None


def _label_order(train: datasets.Dataset, column: str) -> range | None:
    """All label ids in order; None when there is no such column, which the stream reports."""
    if column not in train.features:
        return None
    feature = train.features[column]
    return range(feature.num_classes if isinstance(feature, datasets.ClassLabel) else len(train.unique(column)))


@dataclass
class ModelArguments:
    """The frozen backbone."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder of a ViT; without it, the small backbone inside this package"},
    )
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})
    image_size: int | None = field(
        default=None,
        metadata={"help": "side of the input in pixels, a multiple of the patch size; the backbone's own by default"},
    )
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "subtracted from pixel values in [0, 1], one number or one a channel; the backbone's own by default"
        },
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "the same for what they are divided by; 0 and 1 leave pixels in [0, 1]"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    kind: str = field(default="vit", init=False)  # "vit" or "clip": which embedded backbone stands in

    @property
    def source(self) -> str:
        return self.model_name_or_path or str(embedded.clip_path() if self.kind == "clip" else embedded.vit_path())

    def processor(self) -> Any:
        """The backbone's image processor, at `image_size`, with `image_mean` and `image_std`.

        Raises:
            ValueError: a mean or deviation of another number of channels, a deviation that is not above 0.
        """
        processor = AutoImageProcessor.from_pretrained(
            self.source, revision=self.model_revision or "main", backend="pil"
        )
        if self.image_size is not None:
            square = {"height": self.image_size, "width": self.image_size}
            if getattr(processor, "do_center_crop", False):  # CLIP's: short side, then the middle
                processor.size, processor.crop_size = {"shortest_edge": self.image_size}, square
            else:
                processor.size = square
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is None:
                continue
            channels = len(getattr(processor, name))
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{name}={values} has {len(values)} numbers: give one, or one for each of {channels}."
                )
            if name == "image_std" and not min(values) > 0:
                raise ValueError(f"image_std={values} must be above 0: pixel values are divided by it.")
            setattr(processor, name, [*values] * (channels // len(values)))
            processor.do_normalize = True
        return processor

    def backbone(self, stream: TaskStream) -> PreTrainedModel:
        """The backbone with a new head for the stream's classes.

        Raises:
            ValueError: an image size that the patches do not divide.
        """
        with _quiet():  # the report of a new head is no news here
            model = AutoModelForImageClassification.from_pretrained(
                self.source,
                revision=self.model_revision or "main",
                num_labels=stream.num_classes,
                id2label=stream.id2label,
                label2id={name: label for label, name in stream.id2label.items()},
                ignore_mismatched_sizes=True,
                attn_implementation=self.attn_implementation,
            )
        patch = getattr(model.config, "patch_size", 1)
        if self.image_size is not None and (self.image_size < patch or self.image_size % patch):
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of the backbone's patch size {patch}: "
                f"choose, for example, {max(1, round(self.image_size / patch)) * patch}."
            )
        # a checkpoint's own head has the same shape when its classes are as many: start from a new one all the same
        model.classifier.weight.data.normal_(std=model.config.initializer_range)
        model.classifier.bias.data.zero_()
        return model

    def clip(self) -> CLIPModel:
        """The backbone as a `CLIPModel`."""
        return CLIPModel.from_pretrained(
            self.source, revision=self.model_revision or "main", attn_implementation=self.attn_implementation
        )

    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer beside a `CLIPModel`."""
        return CLIPTokenizer.from_pretrained(self.source, revision=self.model_revision or "main")

    def interpolates(self, model: PreTrainedModel) -> bool:
        """Whether inputs have another size than the backbone was trained at."""
        config = getattr(model.config, "vision_config", model.config)
        return self.image_size is not None and self.image_size != config.image_size


def _setting(name: str, **metadata: Any) -> Any:
    """An argument with the default and the help of a `ProjectionConfig` field."""
    known = ProjectionConfig.__dataclass_fields__[name]
    return field(default=known.default, metadata={**known.metadata, **metadata})


class FloatOrNone(float):
    """How the command line reads a number that may be "none"."""

    def __new__(cls, text: str) -> float | None:  # type: ignore[misc]
        try:
            return None if text.lower() == "none" else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'none'") from None


@dataclass
class RunArguments:
    """Preset, projection, head and comparison."""

    preset: str | None = field(
        default=None,
        metadata={"help": "published settings by name, such as cifar100-10; anything given on the command line wins"},
    )
    dry_run: bool = field(default=False, metadata={"help": "print all resolved settings and stop"})
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
    head: Literal["linear", "statistics"] = field(
        default="linear", metadata={"help": PromptConfig.__dataclass_fields__["head"].metadata["help"]}
    )
    no_compare: bool = field(
        default=False,
        metadata={"help": "skip the unprojected twin, which otherwise is trained first, and the frozen rows"},
    )

    def config(self) -> ProjectionConfig:
        same = {name: getattr(self, name) for name in ProjectionConfig.__dataclass_fields__ if name != "method"}
        return ProjectionConfig(method=self.projection, **same)


def option(token: str) -> str:
    """The option that a command line's token names, "--learning_rate" for "--learning-rate=0.1" too."""
    return token.partition("=")[0].replace("-", "_").replace("__", "--", 1)


def parse(
    description: str,
    prompt_arguments: type,
    embedded_defaults: Sequence[str],
    argv: Sequence[str] | None = None,
    method: str | None = None,
):
    """Parse the arguments of an example; with `--dry_run`, print what they come to and exit.

    Args:
        description: shown by `--help`.
        prompt_arguments: dataclass of the method's own arguments.
        embedded_defaults: arguments put before the user's when neither a model nor data nor a preset are named.
        argv: the command line without the program, `sys.argv[1:]` by default.
        method: whose presets `--preset` names, for example "l2p"; None has no presets.

    Returns:
        `(model, data, prompt, run, training)` arguments.

    Raises:
        ValueError: an unknown preset, an argument that nothing takes.
        SystemExit: after `--help` and `--dry_run`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = set(map(option, argv))
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    name = early.parse_known_args(argv)[0].preset
    preset = None if name is None else presets.load(method, name)
    if preset is not None:
        argv = ["--output_dir", f"out/{method}_{name}", *presets.arguments(preset, given), *argv]
    elif not given & {"--model_name_or_path", "--dataset_name", "--train_dir"}:
        argv = [*embedded_defaults, *argv]
        if not given & {"--output_dir", "--overwrite_output_dir", "--resume_from_checkpoint"}:
            argv = ["--overwrite_output_dir", "true", *argv]  # the default folder is scratch
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, prompt_arguments, RunArguments, PGPTrainingArguments),
        description=description,
        allow_abbrev=False,  # what is given must be recognised above
    )
    arguments = parser.parse_args_into_dataclasses(argv)
    arguments[0].kind = "clip" if method == "clip" else "vit"
    if arguments[3].dry_run:
        if arguments[4].process_index == 0:
            print(presets.describe(method, preset, *arguments))
        parser.exit()
    return arguments


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers at its errors alone."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
