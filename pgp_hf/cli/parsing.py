"""Parse the training commands: options made from dataclasses, with presets and a file as their defaults."""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

import torch
from transformers import HfArgumentParser

from .. import presets
from ..report.formatting import WIDTH, one_line, printable
from ..training.arguments import PGPTrainingArguments
from ..tuners.base.config import PromptConfig
from . import helping
from .arguments import Arguments, DataArguments, ModelArguments, RunArguments
from .config_file import CommandLine, expand, refuse_unknown
from .dry_run import describe
from .recipes import recipe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# defaults for the embedded digits, used if no source is named
EMBEDDED = {"num_tasks": 5, "num_train_epochs": 3, "augmentation": "none"}
SOURCES = {"--model_name_or_path", "--dataset_name", "--train_dir"}
HELP = {"-h", "--help", "--help_all"}
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
    """Keep the lines of the description, and show each option without its spelling with hyphens, and its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(shutil.get_terminal_size().columns, WIDTH))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(name for name in action.option_strings if "-" not in name[2:]) + values


class OptionParser(HfArgumentParser):
    """Read options that are the fields of dataclasses."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        self.exit(2, f"error: {printable(one_line(message))}\n")


def prompt_arguments(config: type[PromptConfig], **more: Any) -> type:
    """Make a dataclass of the arguments that a configuration names in `command_line`, with its defaults, help and checks.

    Args:
        config: the adapter's configuration.
        more: further arguments, each a `dataclasses.field` with a default of the argument's type.
    """

    def check(given: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is warned of is warned of when the adapter is made
            config(**vars(given))

    own = [
        *copied_fields(config, config.command_line),
        *((name, type(one.default), one) for name, one in more.items()),
    ]
    return make_dataclass("PromptArguments", own, namespace={"__post_init__": check})


def copied_fields(config: type[DataclassInstance], names: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """Return fields of a configuration for `make_dataclass`; the parser changes what it is given, and these are copies."""
    hints, known = get_type_hints(config), {one.name: one for one in fields(config)}
    return [
        (name, hints[name], field(default=one.default, default_factory=one.default_factory, metadata=one.metadata))
        for name, one in ((name, known[name]) for name in names)
    ]


class _Show(argparse.Action):
    """Print a text and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        print(self.const)
        parser.exit()


def new_parser(kinds: Sequence[type], short: str | None = None, **settings: Any) -> OptionParser:
    """Make the parser of options that are the fields of dataclasses.

    Args:
        kinds: the dataclasses.
        short: what `--help` prints; the help of all options by default, which `--help_all` prints in any case.
        settings: argparse's own.
    """
    parser = OptionParser(
        kinds,  # type: ignore[arg-type]  # annotated with a NewType, which no class can match
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # `option` would not recognise them
        add_help=False,
        **{"usage": "%(prog)s [CONFIG] [--OPTION VALUE ...]", **settings},
    )
    if short is not None:
        own: dict[str, Any] = {"nargs": 0, "const": short, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        parser.add_argument("-h", "--help", action=_Show, help="show the options of this package, and exit", **own)
    full = ["--help_all"] if short is not None else ["-h", "--help", "--help_all"]
    parser.add_argument(*full, action="help", help="show all options, and exit")
    for action in parser._actions:
        action.help = _OWN_HELP.get(action.dest, action.help)
    return parser


def read(
    kinds: Sequence[type],
    line: CommandLine,
    defaults: Mapping[str, Any],
    description: str | None,
    short: str | None = None,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """Read a command line into dataclasses.

    Args:
        kinds: the dataclasses, whose fields are the options.
        line: the command line, with the options of a file.
        defaults: by option, values that replace the fields' own defaults.
        description: shown with all options.
        short: what `--help` prints; all options by default.
        prog: name of the program in its help.

    Raises:
        ValueError: an unknown argument.
        SystemExit: after `--help`, and for a value that an option refuses.
    """
    parser = new_parser(kinds, short, prog=prog, description=description)
    if any(issubclass(kind, PGPTrainingArguments) for kind in kinds):
        defaults = {**_for_device(line.given()), **defaults}
    # argparse reads text as if it were on the command line, and leaves lists as they are
    parser.set_defaults(**{name: each if isinstance(each, list) else str(each) for name, each in defaults.items()})
    return into_dataclasses(parser, line)


def _for_device(given: set[str]) -> dict[str, Any]:
    """Return defaults for a GPU: bfloat16, and whole batches of images processed there; a preset's images stay exact."""
    if not torch.cuda.is_available() or "--use_cpu" in given:
        return {}
    defaults = {} if given & {"--bf16", "--fp16"} else {"bf16": torch.cuda.is_bf16_supported()}
    if not given & {"--exact_images", "--preset"}:
        defaults |= {"exact_images": False, "process_on_device": True}
    return defaults


def into_dataclasses(parser: OptionParser, line: CommandLine) -> tuple[Any, ...]:
    """Read a command line by a parser, with a namespace of what belongs to no dataclass at the end, if anything does.

    Raises:
        ValueError: an unknown argument.
        SystemExit: after `--help`, and for a value that an option refuses.
    """
    refuse_unknown(parser.parse_known_args(line.tokens)[1], {action.dest for action in parser._actions}, line)
    parser.set_defaults(**dict.fromkeys(line.nothing))
    return parser.parse_args_into_dataclasses(line.tokens, look_for_args_file=False)


def parse(
    description: str | None,
    prompts: type,
    method: str,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> Arguments:
    """Parse the arguments of a training command; with `--dry_run`, print the settings that result and exit.

    Args:
        description: shown by `--help_all`.
        prompts: dataclass of the adapter's own arguments, see `prompt_arguments`.
        method: of the presets that `--preset` names and of the output folder, for example "l2p".
        argv: the command line without the program, `sys.argv[1:]` by default; the first may be a file of options.
        prog: name of the program in its help.

    Raises:
        ValueError: an unknown preset or argument, or arguments that are mutually exclusive.
        SystemExit: after `--help` and `--dry_run`, and for a value that an option refuses.
    """
    line = expand(sys.argv[1:] if argv is None else argv)
    given = line.given()
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    name = early.parse_known_args(line.tokens)[0].preset
    preset = None if name is None else presets.load(method, name)
    defaults: dict[str, Any] = {}
    main_job: dict[str, Any] = {}
    if preset is not None:
        defaults = {"output_dir": f"out/{method}_{name}", **presets.arguments(preset, given)}
    elif not given & (SOURCES | HELP):  # --help shows the defaults for the user's own data
        main_job = recipe(method, given)
        defaults = {"output_dir": f"out/{method}_pgp", **EMBEDDED, **main_job}
        if not given & {"--output_dir", "--overwrite_output_dir", "--resume_from_checkpoint"}:
            defaults["overwrite_output_dir"] = True  # the default folder is scratch
    kinds = (ModelArguments, DataArguments, prompts, RunArguments, PGPTrainingArguments)
    prog = f"pgp-hf train {method}" if prog is None else prog
    arguments = Arguments(*read(kinds, line, defaults, description, helping.text(method, prog), prog))
    arguments.data.choose_tasks(given)
    arguments.model.kind = "clip" if method == "clip" else "vit"
    arguments.run.main_job = bool(main_job)
    if arguments.run.dry_run:
        if arguments.training.process_index == 0:
            print(describe(method, preset, arguments))
        sys.exit(0)
    return arguments
