"""Parse the command line of the examples: options made from dataclasses, with presets as their defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from transformers import HfArgumentParser

from .. import presets
from ..training.arguments import PGPTrainingArguments
from ..tuners.base.config import PromptConfig
from .arguments import Arguments, DataArguments, ModelArguments, RunArguments
from .dry_run import describe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# defaults for the embedded digits, used if no source is named
EMBEDDED = {"num_tasks": 5, "num_train_epochs": 3, "augmentation": "none"}
SOURCES = {"--model_name_or_path", "--dataset_name", "--train_dir"}
HELP = {"-h", "--help"}
# arguments of transformers that mean something else for a stream, or are refused and left out of the help
_OWN_HELP = {
    "metric_for_best_model": "what chooses a checkpoint or ends a task early, on the images of --train_val_split: "
    "eval_current_accuracy by default, eval_mean_accuracy, or the same with loss",
    "greater_is_better": "whether greater values of --metric_for_best_model are better; by default, unless it is a loss",
    "resume_from_checkpoint": "true continues the run in --output_dir exactly where it stopped; the folder of a run or of one "
    "of its tasks, or owner/name@task-3 on the Hub, continues that run in --output_dir",
    "auto_find_batch_size": "halve the batch size when memory runs out, in training, statistics and evaluation",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "batch_eval_metrics", "enable_jit_checkpoint"),
        argparse.SUPPRESS,
    ),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the lines of the description, and show the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def option(token: str) -> str:
    """Return the option that a token names: "--learning_rate", also for "--learning-rate=0.1"."""
    return token.partition("=")[0].replace("-", "_").replace("__", "--", 1)


def prompt_arguments(config: type[PromptConfig], **more: Any) -> type:
    """Make a dataclass of the arguments that a configuration names in `command_line`, with its defaults and help.

    Args:
        config: the adapter's configuration.
        more: further arguments, each a `dataclasses.field` with a default of the argument's type.
    """
    own = copied_fields(config, config.command_line)
    return make_dataclass("PromptArguments", [*own, *((name, type(one.default), one) for name, one in more.items())])


def copied_fields(config: type[DataclassInstance], names: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """Return fields of a configuration for `make_dataclass`; the parser changes what it is given, and these are copies."""
    hints, known = get_type_hints(config), {one.name: one for one in fields(config)}
    return [
        (name, hints[name], field(default=one.default, default_factory=one.default_factory, metadata=one.metadata))
        for name, one in ((name, known[name]) for name in names)
    ]


def new_parser(kinds: Sequence[type], **settings: Any) -> HfArgumentParser:
    """Make the parser of options that are the fields of dataclasses; `settings` are argparse's own."""
    parser = HfArgumentParser(
        kinds,  # type: ignore[arg-type]  # annotated with a NewType, which no class can match
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # `option` would not recognise them
        **settings,
    )
    for action in parser._actions:
        action.help = _OWN_HELP.get(action.dest, action.help)
    return parser


def read(
    kinds: Sequence[type], argv: Sequence[str], defaults: Mapping[str, Any], description: str | None
) -> tuple[Any, ...]:
    """Read a command line into dataclasses.

    Args:
        kinds: the dataclasses, whose fields are the options.
        argv: the command line without the program.
        defaults: by option, values that replace the fields' own defaults.
        description: shown by `--help`.

    Raises:
        ValueError: an unknown argument.
        SystemExit: after `--help`, and for a value that an option refuses.
    """
    parser = new_parser(kinds, description=description)
    if any(issubclass(kind, PGPTrainingArguments) for kind in kinds):
        defaults = {**_for_device(set(map(option, argv))), **defaults}
    # argparse reads text as if it were on the command line, and leaves lists as they are
    parser.set_defaults(**{name: each if isinstance(each, list) else str(each) for name, each in defaults.items()})
    return parser.parse_args_into_dataclasses(list(argv))


def _for_device(given: set[str]) -> dict[str, Any]:
    """Return defaults for a GPU: bfloat16, and whole batches of images processed there; a preset's images stay exact."""
    if not torch.cuda.is_available() or "--use_cpu" in given:
        return {}
    defaults = {} if given & {"--bf16", "--fp16"} else {"bf16": torch.cuda.is_bf16_supported()}
    if not given & {"--exact_images", "--preset"}:
        defaults |= {"exact_images": False, "process_on_device": True}
    return defaults


def parse(description: str | None, prompts: type, method: str, argv: Sequence[str] | None = None) -> Arguments:
    """Parse the arguments of an example; with `--dry_run`, print the settings that result and exit.

    Args:
        description: shown by `--help`.
        prompts: dataclass of the adapter's own arguments, see `prompt_arguments`.
        method: of the presets that `--preset` names and of the output folder, for example "l2p".
        argv: the command line without the program, `sys.argv[1:]` by default.

    Raises:
        ValueError: an unknown preset or argument, or arguments that are mutually exclusive.
        SystemExit: after `--help` and `--dry_run`, and for a value that an option refuses.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = set(map(option, argv))
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    name = early.parse_known_args(argv)[0].preset
    preset = None if name is None else presets.load(method, name)
    defaults: dict[str, Any] = {}
    if preset is not None:
        defaults = {"output_dir": f"out/{method}_{name}", **presets.arguments(preset, given)}
    elif not given & (SOURCES | HELP):  # --help shows the defaults for the user's own data
        defaults = {"output_dir": f"out/{method}_pgp", **EMBEDDED}
        if not given & {"--output_dir", "--overwrite_output_dir", "--resume_from_checkpoint"}:
            defaults["overwrite_output_dir"] = True  # the default folder is scratch
    kinds = (ModelArguments, DataArguments, prompts, RunArguments, PGPTrainingArguments)
    arguments = Arguments(*read(kinds, argv, defaults, description))
    arguments.data.choose_tasks(given)
    arguments.model.kind = "clip" if method == "clip" else "vit"
    if arguments.run.dry_run:
        if arguments.training.process_index == 0:
            print(describe(method, preset, arguments))
        sys.exit(0)
    return arguments
