"""What the example scripts share: their arguments, the stream, the backbone, the paired run and its table."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
from accelerate.utils import set_seed
from peft import PeftConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
)
from transformers.utils import logging

from . import _stream_data as source_data
from . import artifacts, embedded, metrics, plots, presets
from .baselines.frozen import cls_features, frozen_matrices
from .images import ImageCollator
from .projection import ProjectionConfig
from .stream import TaskStream
from .trainer import PGPTrainer
from .training_args import PGPTrainingArguments


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
                f"dataset {name!r} has no split {split!r}, only {source_data.some(splits)}: name one with "
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

    @property
    def source(self) -> str:
        return self.model_name_or_path or str(embedded.vit_path())

    def processor(self) -> Any:
        """The backbone's image processor, at `image_size`, with `image_mean` and `image_std`.

        Raises:
            ValueError: a mean or deviation of another number of channels, a deviation that is not above 0.
        """
        processor = AutoImageProcessor.from_pretrained(
            self.source, revision=self.model_revision or "main", backend="pil"
        )
        if self.image_size is not None:
            processor.size = {"height": self.image_size, "width": self.image_size}
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

    def interpolates(self, model: PreTrainedModel) -> bool:
        """Whether inputs have another size than the backbone was trained at."""
        return self.image_size is not None and self.image_size != model.config.image_size


@dataclass
class RunArguments:
    """Preset, projection and comparison."""

    preset: str | None = field(
        default=None,
        metadata={"help": "published settings by name, such as cifar100-10; anything given on the command line wins"},
    )
    dry_run: bool = field(default=False, metadata={"help": "print all resolved settings and stop"})
    projection: Literal["pgp", "none"] = field(
        default="pgp", metadata={"help": "gradient projection: that of PGP (ICLR 2024), or none"}
    )
    energy: float = field(
        default=ProjectionConfig.energy,
        metadata={"help": ProjectionConfig.__dataclass_fields__["energy"].metadata["help"]},
    )
    key_energy: float = field(
        default=ProjectionConfig.key_energy,  # type: ignore[assignment]
        metadata={"help": "the same for the keys and old queries, in (0, 1]"},
    )
    value_energy: float | None = field(
        default=ProjectionConfig.value_energy,
        metadata={"help": ProjectionConfig.__dataclass_fields__["value_energy"].metadata["help"]},
    )
    apply_to: Literal["update", "gradient"] = field(
        default="update", metadata={"help": ProjectionConfig.__dataclass_fields__["apply_to"].metadata["help"]}
    )
    max_images: int | None = field(
        default=None, metadata={"help": ProjectionConfig.__dataclass_fields__["max_images"].metadata["help"]}
    )
    no_compare: bool = field(
        default=False,
        metadata={"help": "skip the unprojected twin, which otherwise is trained first, and the frozen rows"},
    )

    def config(self) -> ProjectionConfig:
        return ProjectionConfig(
            method=self.projection,
            energy=self.energy,
            key_energy=self.key_energy,
            value_energy=self.value_energy,
            apply_to=self.apply_to,
            max_images=self.max_images,
        )


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
    given = {argument.split("=")[0].replace("-", "_").replace("__", "--", 1) for argument in argv}
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
    if arguments[3].dry_run:
        if arguments[4].process_index == 0:
            print(presets.describe(method, preset, *arguments))
        parser.exit()
    return arguments


def run(
    name: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    args: PGPTrainingArguments,
    adapter: Callable[[bool], PeftConfig],
) -> dict[str, Any]:
    """Train the run and, unless told otherwise, its unprojected twin; print and write the comparison.

    Both start from the same seed, the same class order and the same initial prompts, and see the same images in the
    same order.

    Args:
        name: of the method, for example "L2P".
        adapter: makes the adapter's configuration, given whether position embeddings are interpolated.

    Returns:
        Results by row name.
    """
    resume: Any = {"true": True, "false": None}.get(
        str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint
    )
    stream, processor = data_args.load(args.seed), model_args.processor()
    rows: dict[str, dict[str, Any]] = {}

    def train(projection: ProjectionConfig, output_dir: Path) -> PGPTrainer:
        set_seed(args.seed)
        backbone = model_args.backbone(stream)
        model = get_peft_model(backbone, adapter(model_args.interpolates(backbone)))
        arguments = replace_output(args, output_dir)
        trainer = PGPTrainer(model, arguments, stream, projection=projection, processing_class=processor)
        label = name if projection.method == "none" else f"{name}-{projection.method.upper()}"
        if trainer.is_world_process_zero():
            print(f"\n{label} -> {output_dir}", flush=True)
        trainer.train(resume_from_checkpoint=resume)
        rows[label] = trainer.results.to_dict()
        return trainer

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's own
    output_dir, projection = Path(args.output_dir), run_args.config()
    compare = not run_args.no_compare
    if compare and projection.method != "none":
        train(replace(projection, method="none"), output_dir / "baseline")
    trainer = train(projection, output_dir)
    if trainer.is_world_process_zero():
        if compare:
            rows = {**frozen_rows(trainer, stream, model_args), **rows}
        report(rows, output_dir)
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers at its errors alone."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def replace_output(args: PGPTrainingArguments, output_dir: Path) -> PGPTrainingArguments:
    """The same training arguments with another `output_dir`."""
    other = copy.copy(args)
    other.output_dir = str(output_dir)
    return other


def frozen_rows(trainer: PGPTrainer, stream: TaskStream, model_args: ModelArguments) -> dict[str, dict[str, Any]]:
    """Results of the backbone without prompts; for the embedded one also with random weights, as a floor."""
    model = trainer.tuner.model
    backbones = {"frozen": trainer.tuner.backbone}
    if model_args.model_name_or_path is None:
        set_seed(trainer.args.seed)
        backbones = {"random": AutoModel.from_config(model.config).to(model.device), **backbones}
    rows = {}
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        for label, backbone in backbones.items():
            train, test = (
                [
                    cls_features(
                        backbone,
                        images(t),
                        ImageCollator(trainer.processing_class),
                        batch_size=trainer.args.eval_batch_size,
                        interpolate_pos_encoding=model_args.interpolates(model),
                    )
                    for t in tqdm(
                        range(stream.num_tasks),
                        desc=f"  {label} features",
                        leave=False,
                        disable=trainer.args.disable_tqdm,
                    )
                ]
                for images in (stream.train, stream.test)
            )
            for name, matrix in frozen_matrices(stream, train, test).items():
                drift = [0.0] * stream.num_tasks
                rows[f"{label}, {name}"] = {**metrics.summarize(matrix), "accuracy_matrix": matrix, "drift": drift}
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A plain-text table: average accuracy after each task, then the figures at the end of the stream."""
    tasks = max(len(row["per_task_average_accuracy"]) for row in rows.values())
    head = ["", *(f"task {t + 1}" for t in range(tasks)), "avg acc", "forgetting", "drift"]
    body = [
        [
            name,
            *(f"{value:.2f}" for value in row["per_task_average_accuracy"]),
            f"{row['average_accuracy']:.2f}",
            f"{row['forgetting']:.2f}",
            f"{row['drift'][-1]:.3f}",
        ]
        for name, row in rows.items()
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *body]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def report(rows: dict[str, dict[str, Any]], output_dir: Path) -> None:
    """Print the table, write it and its curves, and say where everything is."""
    print(
        "\nAverage accuracy over the tasks seen, after each task (%); at the end: average accuracy, forgetting, drift\n"
    )
    print(table(rows))
    artifacts.write_json(output_dir / "comparison.json", rows)
    trained = {name: row for name, row in rows.items() if "method" in row}
    plots.task_curves(trained, output_dir / "figures" / "comparison.png")
    tasks = max(len(row["drift"]) for row in trained.values())
    print(
        f"\nWritten to {output_dir}: the adapter after the last task, bases, results.json, README.md (model card);"
        f"\n  task-1 ... task-{tasks}: the same as it stood after each task; figures/: accuracy matrix, curves, comparison;"
        f"\n  comparison.json: this table"
        + ("; baseline/: the same files of the run without projection." if (output_dir / "baseline").exists() else ".")
    )
