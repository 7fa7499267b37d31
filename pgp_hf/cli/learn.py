"""Teach a finished run the classes of new images. None of its old images is needed.

    pgp-hf learn out/l2p_pgp --train_dir new_photos --output_dir out/more

`new_photos` has one subfolder for each class, named after it; new images of known
classes may be among them. The run is a folder that a training left, one of its task
folders, or a repository on the Hub (with --revision task-3). A new --output_dir gets a run of its
own, with the earlier tasks and the new one; with that of the run itself, the new task is
added there, and no finished task changes. Settings of the training are those of the run,
unless options say otherwise.

Test images are those of --test_dir, or a share of the new images. How well the run
still knows its old classes is measured where their test images are given:
--known_test_dir or --known_test_dataset. An interrupted command is repeated with
--resume_from_checkpoint true; `accelerate launch -m pgp_hf learn ...` runs it in
several processes.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets

from ..data import source as source_data
from ..report.formatting import fill
from ..runs.revision import Revision
from ..runs.sources import locate
from ..training.arguments import PGPTrainingArguments
from ..training.settings import RECORDED
from ..training.trainer import StreamTrainer
from . import console, helping
from .arguments import DataArguments, check_source, string_labels_as_classes
from .config_file import CommandLine, expand
from .experiment import resume_argument
from .folders import labelled_images
from .growth import growth_table, known_classes
from .parsing import into_dataclasses, new_parser

# how error messages name arguments in Python, and what that is on the command line
_OPTIONS = {**console.OPTIONS, r"test_dataset\b": "--known_test_dir", r"label_names\b": "--class_names"}


@dataclass
class LearnArguments:
    """Say where the new images are, and the test images of the classes that are known.

    Args:
        revision: of the run, the last task by default.
        backbone: Hub id or folder of the frozen model, if the run does not name it.
        train_dir: local folder of new training images, with one subfolder per class.
        test_dir: local folder of new test images, likewise.
        dataset_name: Hub id, or local folder of parquet or image files, instead of `train_dir`.
        dataset_config_name: configuration of the data set, if there are several.
        dataset_revision: branch, tag or commit on the Hub.
        dataset_split: the only split to use; `test_fraction` of it is held out for testing.
        image_column_name: image column, if there are several.
        label_column_name: label column, if there are several.
        class_names: names of the classes 0, 1, ..., or such as 3=cat, for a label column of integers.
        test_fraction: fraction of each class that is held out if there are no test images.
        max_train_samples_per_class: maximum number of training images per class.
        max_eval_samples_per_class: maximum number of test images per class.
        known_test_dir: local folders with the run's own test images, with one subfolder per class.
        known_test_dataset: Hub id or local folder of the run's own test images.
    """

    revision: str | None = field(
        default=None,
        metadata={"help": "task-1, task-2, ...: go on from the state after that task; the last by default"},
    )
    backbone: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the frozen model, if the run does not name it"}
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "local folder of new training images, with one subfolder per class"}
    )
    test_dir: str | None = field(
        default=None,
        metadata={
            "help": "local folder of test images of the new classes, with one subfolder per class",
            "aliases": ["--validation_dir", "--validation-dir"],
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, or local folder of parquet or image files, in place of --train_dir"},
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
    image_column_name: str | None = field(default=None, metadata={"help": "image column, if there are several"})
    label_column_name: str | None = field(default=None, metadata={"help": "label column, if there are several"})
    class_names: list[str] | None = field(
        default=None,
        metadata={"help": "where labels are integers: names of the classes 0, 1, ..., or 3=cat 7=dog"},
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "fraction of each class that is held out if there are no test images"}
    )
    max_train_samples_per_class: int | None = field(
        default=None, metadata={"help": "maximum number of training images per class"}
    )
    max_eval_samples_per_class: int | None = field(
        default=None, metadata={"help": "maximum number of test images per class"}
    )
    known_test_dir: list[str] | None = field(
        default=None,
        metadata={
            "help": "local folders with what the run was tested on, with one subfolder per class; folders of training "
            "images from which test images were held out will do. Without them, accuracies of known classes are not "
            "measured"
        },
    )
    known_test_dataset: str | None = field(
        default=None, metadata={"help": "Hub id or local folder of these test images, in place of --known_test_dir"}
    )

    def new_images(self) -> tuple[datasets.Dataset, datasets.Dataset | None, dict[str, Any]]:
        """Return the new training images, test images if there are any, and how `learn` is to read them.

        Raises:
            ValueError: no images, two sources of them, or images without labels.
        """
        if bool(self.train_dir) == bool(self.dataset_name):
            raise ValueError(
                "give the new images by --train_dir, a folder with one subfolder per class, or else by --dataset_name."
            )
        check_source(self)
        if self.test_dir and not self.train_dir:
            raise ValueError("--test_dir goes with --train_dir: a data set has its own test split, or none.")
        test: datasets.Dataset | None
        if self.train_dir:
            train, test = labelled_images([self.train_dir], "--train_dir"), None
            if self.test_dir:
                test = labelled_images([self.test_dir], "--test_dir", train.features["label"].names)
                train = labelled_images([self.train_dir], "--train_dir", test.features["label"].names)
            label, image = "label", "image"
        else:
            data = DataArguments(
                dataset_name=self.dataset_name,
                dataset_config_name=self.dataset_config_name,
                dataset_revision=self.dataset_revision,
                dataset_split=self.dataset_split,
            )
            train, test, _ = source_data.resolve_splits(data.source(), None, None)
            label, image = source_data.resolve_columns(train, self.label_column_name, self.image_column_name)
            train, test = string_labels_as_classes(train, test, label)
        same = ("test_fraction", "max_train_samples_per_class", "max_eval_samples_per_class")
        reading = {"label_column": label, "image_column": image, "label_names": _named_labels(self.class_names)}
        return train, test, {**reading, **{name: getattr(self, name) for name in same}}

    def known_test_images(self, manifest: Mapping[str, Any]) -> datasets.Dataset | datasets.DatasetDict | None:
        """Return the test images of known classes, as far as they are given.

        Args:
            manifest: content of the run's `stream.json`.

        Raises:
            ValueError: two sources, or one without such images.
        """
        if self.known_test_dir and self.known_test_dataset:
            raise ValueError("give --known_test_dir or --known_test_dataset, not both.")
        if self.known_test_dir:
            return labelled_images(self.known_test_dir, "--known_test_dir")
        if not self.known_test_dataset:
            return None
        splits, column = source_data.load(self.known_test_dataset)[0], manifest.get("label_column", "label")
        return datasets.DatasetDict(
            {split: string_labels_as_classes(data, None, column)[0] for split, data in splits.items()}
        )


def _named_labels(given: Sequence[str] | None) -> Sequence[str] | dict[int, str] | None:
    """Return names of classes, by label where each is given as "3=cat".

    Raises:
        ValueError: names with and without a label, or several for one label.
    """
    pairs = [pair for one in given or () if (pair := re.fullmatch(r"(-?\d+)=(.+)", one))]
    if not given or not pairs:
        return given
    named = {int(pair[1]): pair[2] for pair in pairs}
    if len(named) < len(given):
        raise ValueError(
            f"--class_names {shlex.join(given)}: expected a name for each label 0, 1, ..., or all of them as LABEL=NAME, each "
            "label once."
        )
    return named


class Command(NamedTuple):
    """The command line.

    Attributes:
        run: the run that goes on.
        before: its files.
        new: the new images.
        training: settings.
        resume: whether to go on with a task that has begun in the output folder.
    """

    run: str
    before: Revision
    new: LearnArguments
    training: PGPTrainingArguments
    resume: bool


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command.

    Args:
        argv: the command line without the program, `sys.argv[1:]` by default; the first may be a file of options.
        prog: name of the program in its help.

    Raises:
        TypeError, ValueError, OSError, FloatingPointError: what it refuses, or why it cannot finish.
    """
    learn(parse(argv, prog))


def as_options(message: str) -> str:
    """Return an error message with the names of arguments in Python replaced by those of options."""
    return console.as_options(message, _OPTIONS)


def parse(argv: Sequence[str] | None, prog: str | None) -> Command:
    """Parse the command line, with the recorded settings of the run as defaults.

    Raises:
        ValueError: an unknown argument, no `--output_dir`, or a run that cannot be read.
        SystemExit: after `--help`, and for a value that an option refuses.
    """
    parser = new_parser(
        (LearnArguments, PGPTrainingArguments),
        helping.text("learn", "pgp-hf learn" if prog is None else prog),
        prog=prog,
        usage="%(prog)s [CONFIG] RUN_OR_REPO --train_dir DIR --output_dir DIR [--OPTION VALUE ...]",
        description=__doc__,
    )
    parser.add_argument("run", metavar="RUN_OR_REPO", help="folder of a run or a task, or a repository on the Hub")
    parser.set_defaults(output_dir=None)
    line = _with_run(sys.argv[1:] if argv is None else argv)
    early, _ = parser.parse_known_args(line.tokens)
    if early.output_dir is None:
        raise ValueError("--output_dir is missing: name a new folder for the run that goes on.")
    before = Revision.read(locate(early.run, early.revision, token=early.hub_token), early.revision)
    if before.results is None:
        raise ValueError(f"{early.run} is an adapter without a run: it has learned no task to go on from.")
    parser.set_defaults(**recorded(before.results, early.gradient_accumulation_steps))
    new, training, rest = into_dataclasses(parser, line)
    resume = resume_argument(training.resume_from_checkpoint)
    if isinstance(resume, str):
        raise ValueError(f"--resume_from_checkpoint {resume}: say true to go on with what is in --output_dir.")
    return Command(rest.run, before, new, training, bool(resume))


def _with_run(argv: Sequence[str]) -> CommandLine:
    """Return the options of a command line; a file of options may name the run, as "run"."""
    line = expand(argv)
    named = [token for token in line.tokens if line.file and token.startswith("--run=")]
    tokens = [token for token in line.tokens if token not in named]
    first = argv[1] if line.file and len(argv) > 1 else "-"
    runs = [token.removeprefix("--run=") for token in named if first.startswith("-")]
    return line._replace(tokens=[*runs, *tokens])


def recorded(results: Mapping[str, Any], micro_batches: int = 1) -> dict[str, Any]:
    """Return the settings that a run's last task was trained with, as far as `results.json` has them.

    Only those that a task's result depends on: a revision from elsewhere decides nothing else here.

    Args:
        results: content of `results.json`.
        micro_batches: number of batches that make a step here.
    """
    training = results.get("training")
    found = {name: results.get(name) for name in ("seed", "eval_mask", "compensate_drift")}
    found.update(training if isinstance(training, dict) else {})
    kept = {name: found[name] for name in RECORDED if found.get(name) is not None}
    if isinstance(images := found.get("images_per_step"), int):
        processes = int(os.environ.get("WORLD_SIZE", 1))  # the arguments, which know it, are made from this
        kept["per_device_train_batch_size"] = max(1, images // (micro_batches * processes))
    return kept


def learn(command: Command) -> None:
    """Learn the new images, and print what was known and what is new.

    Raises:
        TypeError, ValueError, OSError, FloatingPointError: as `StreamTrainer.from_pretrained` and `learn`.
    """
    run, before, new, args, resume = command
    train, test, reading = new.new_images()
    known_test = new.known_test_images(before.manifest or {})
    trainer = StreamTrainer.from_pretrained(run, new.revision, args, known_test, backbone=new.backbone)
    if trainer.is_world_process_zero():
        print(fill(f"{run}, task-{before.tasks}, knows {known_classes(trainer.stream)}"), flush=True)
    trainer.learn(train, test, resume_from_checkpoint=resume, **reading)
    if trainer.is_world_process_zero():
        print(report(trainer, before.tasks))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def report(trainer: StreamTrainer, known: int) -> str:
    """Return a table of what was known and what is new, and what can be done with the run.

    Args:
        trainer: after it has learned.
        known: number of tasks that were learned before.
    """
    results, folder, tasks = trainer.results.to_dict(), trainer.folder.root, trainer.stream.num_tasks
    lines = [
        "",
        "Accuracy (%) on the test images of each task, before the new classes came and now:",
        "",
        growth_table(results, trainer.stream.manifest(), known),
        "",
    ]
    if not all(trainer.stream.has_test(t) for t in range(tasks)):
        lines += ["Not measured: tasks whose test images are not here (--known_test_dir, --known_test_dataset).", ""]
    quoted, drawn = shlex.quote(str(folder)), "" if trainer.args.figures == "none" else ", figures/"
    return "\n".join(
        [
            *lines,
            f"Written to {folder}: the model after task {tasks}, results.json, README.md (model card){drawn};",
            f"  task-1 ... task-{tasks}: the same after each task. Next:",
            f"  pgp-hf predict {quoted} photo.jpg",
            f"  pgp-hf learn {quoted} --train_dir newer_photos --output_dir {quoted}_more",
        ]
    )
