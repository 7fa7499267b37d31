"""Parse the command line of `pgp-hf train baseline`, which has the settings of the chosen method among its options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, NamedTuple

from .. import presets
from ..methods import METHODS, ContinualMethod, ProjectedPrompts, create
from ..models import check_trainable
from ..training.arguments import PGPTrainingArguments
from . import helping
from .arguments import DataArguments, ModelArguments
from .config_file import expand
from .dry_run import describe_methods
from .parsing import EMBEDDED, HELP, SOURCES, copied_fields, read

ALL, DEFAULT = "all", "fine_tuning"
PRESETS = "baselines"  # their folder


@dataclass
class BaselineOptions:
    """Choose the method, what learns, and the comparison.

    Args:
        method: registered name of a method, or "all".
        trainable: what of the model learns, as `pgp_hf.set_trainable` has it.
        preset: name of a data set or of a recipe with its settings, or both names; the recipe then wins.
        dry_run: print all settings and stop.
        no_compare: leave out the classifiers on frozen features.
    """

    method: str = field(default=DEFAULT, metadata={"help": "name of a method, or all: see the list above"})
    trainable: str = field(
        default="all",
        metadata={
            "help": "what of the model learns: all; last:N, its last N blocks and whatever follows them; head; or lora:R, "
            "LoRA of rank R on queries and values, and the head"
        },
    )
    preset: list[str] | None = field(
        default=None,
        metadata={
            "help": "settings of a data set, of a recipe, or of both, and then the recipe wins over what the data set's has; "
            f"other options win over either: {', '.join(presets.names(PRESETS))}"
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "print all settings that result, and stop"})
    no_compare: bool = field(default=False, metadata={"help": "leave out the classifiers on frozen features"})


@dataclass
class BaselineTrainingArguments(PGPTrainingArguments):
    """Give all methods one recipe: AdamW without weight decay, a small learning rate for the backbone, cosine decay.

    Args:
        learning_rate: of all that learns but the head, at the start of a task.
        head_learning_rate: of the head, likewise; None for `learning_rate`.
        lr_scheduler_type: schedule within each task.

    All other arguments and defaults are those of `PGPTrainingArguments`.
    """

    learning_rate: float = field(
        default=5e-5, metadata={"help": "learning rate, at the start of a task, of all that learns but the head"}
    )
    head_learning_rate: float | None = field(
        default=1e-3, metadata={"help": "learning rate, at the start of a task, of the head"}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "schedule within each task"})


COMMON = (ModelArguments, DataArguments, BaselineOptions, BaselineTrainingArguments)


class BaselineArguments(NamedTuple):
    """All arguments of `run_baselines.py`; `settings` are the chosen method's own."""

    model: ModelArguments
    data: DataArguments
    run: BaselineOptions
    training: BaselineTrainingArguments
    settings: dict[str, Any]

    def methods(self) -> dict[str, ContinualMethod]:
        """Make the chosen method, or each of them with its default settings, by name.

        Raises:
            ValueError: a setting that the method refuses.
        """
        if self.run.method == ALL:
            return {name: create(name) for name in names()}
        return {self.run.method: create(self.run.method, **self.settings)}


def names() -> list[str]:
    """Return the names of the methods to choose from: all but the prompts', which have examples of their own."""
    return [name for name in METHODS if name != ProjectedPrompts.name]


def parse(description: str | None, argv: Sequence[str] | None = None, prog: str | None = None) -> BaselineArguments:
    """Parse the arguments; with `--dry_run`, print the settings that result and exit.

    Args:
        description: shown by `--help_all`, followed by a list of the methods.
        argv: the command line without the program, `sys.argv[1:]` by default; the first may be a file of options.
        prog: name of the program in its help.

    Raises:
        ValueError: an unknown method or argument, a value that does not fit, a method with a setting that has the name
            of another argument.
        SystemExit: after `--help` and `--dry_run`, and for a value that an option refuses.
    """
    line = expand(sys.argv[1:] if argv is None else argv)
    given = line.given()
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--method", default=DEFAULT)
    early.add_argument("--preset", nargs="+", default=[])
    known = early.parse_known_args(line.tokens)[0]
    name: str = known.method
    _check_options(name, given)
    found = _presets(known.preset)
    preset = {key: value for one in found.values() for key, value in presets.arguments(one, given).items()}
    defaults: dict[str, Any] = {"output_dir": "out/" + "_".join(["baselines", *found, name])}
    if not given & (SOURCES | HELP) and "dataset_name" not in preset:  # --help: the defaults for the user's own data
        defaults.update(EMBEDDED)
        if name != ALL and not given & {"--output_dir", "--overwrite_output_dir", "--resume_from_checkpoint"}:
            defaults["overwrite_output_dir"] = True  # the default folder is scratch
    defaults.update(preset)
    own, text = _settings_of(name), "\n".join([*([description] if description else []), "methods:", _listed()])
    short = {one.name: str(one.metadata["help"]) for one in fields(own)} if "--method" in given else None
    prog = "pgp-hf train baseline" if prog is None else prog
    help_text = helping.text("baseline", prog, short)
    model, data, run, training, settings = read([*COMMON, own], line, defaults, text, help_text, prog)
    data.choose_tasks(given)
    arguments = BaselineArguments(model, data, run, training, vars(settings))
    methods = arguments.methods()
    _check_values(arguments)
    if run.dry_run:
        if training.process_index == 0:
            chosen = {name: method.settings() for name, method in methods.items()}
            print(describe_methods(chosen, found, run.trainable, model, data, training))
        sys.exit(0)
    return arguments


def _presets(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read presets, those of data sets before recipes, which win.

    Raises:
        ValueError: an unknown one; several data sets.
    """
    found = {name: presets.load(PRESETS, name) for name in names}
    data = [name for name, preset in found.items() if "data" in preset]
    if len(data) > 1:
        recipes = [name for name in presets.names(PRESETS) if "data" not in presets.load(PRESETS, name)]
        raise ValueError(
            f"--preset {' '.join(data)} names {len(data)} data sets: give one of them, alone or with {', '.join(recipes)}."
        )
    return dict(sorted(found.items(), key=lambda item: "data" not in item[1]))


def _settings_of(name: str) -> type:
    """Make a dataclass of a method's settings; an empty one for "all", whose methods have their defaults."""
    config = None if name == ALL else METHODS[name].config_class
    own = [] if config is None else copied_fields(config, [one.name for one in fields(config) if one.init])
    return make_dataclass("MethodArguments", own, namespace={"_argument_group_name": f"settings of {name}"})


def _listed() -> str:
    """Return a line for each method that can be chosen."""
    titles = {name: create(name).describe().title for name in names()}
    titles[ALL] = "each of these that works on the model, with its default settings"
    width = max(map(len, titles)) + 2
    return "\n".join(f"  {name:<{width}}{title}" for name, title in titles.items())


def _check_options(name: str, given: set[str]) -> None:
    """Raise ValueError for an unknown method, one with settings of ambiguous names, and settings of other methods."""
    known = names()
    if name not in (*known, ALL):
        prompts = f" ({name} is run_l2p_pgp.py, run_dualprompt_pgp.py and run_clip_pgp.py)" * (name in METHODS)
        raise ValueError(
            f"method {name!r} is unknown here: choose one of {', '.join(sorted(known))} and all{prompts}."
        )
    taken = {one.name for kind in COMMON for one in fields(kind)}
    own = {one.name for one in fields(_settings_of(name))}
    if own & taken:
        raise ValueError(
            f"method {name!r} has a setting {min(own & taken)!r}, and so have all runs: rename the field of its "
            f"{METHODS[name].config_class.__name__}."
        )
    for each in known:
        foreign = {one.name for one in fields(METHODS[each].config_class)} - taken - own
        for setting in sorted(foreign & {one.removeprefix("--") for one in given}):
            raise ValueError(
                f"--{setting} is a setting of --method {each}, and this is --method {name}: leave it out."
            )


def _check_values(arguments: BaselineArguments) -> None:
    """Raise ValueError for values that do not go together."""
    model, _, run, training, _ = arguments
    check_trainable(run.trainable)
    if model.image_size is not None and run.trainable.startswith("lora:"):
        raise ValueError(
            f"--image_size {model.image_size} and --trainable {run.trainable} are mutually exclusive: the adapter's folder "
            "names the backbone, which has its own size. Leave --image_size out, or train all, last:N or head."
        )
    if run.method != ALL:
        return
    if training.push_to_hub:
        raise ValueError(
            "--push_to_hub and --method all are mutually exclusive, since a repository holds one run: upload the runs "
            "afterwards, by python -m pgp_hf.hub push OUTPUT_DIR/METHOD --repo_id OWNER/NAME."
        )
    if str(training.resume_from_checkpoint).lower() not in ("none", "true", "false"):
        raise ValueError(
            f"--resume_from_checkpoint {training.resume_from_checkpoint} is for a single method: --method all goes on by "
            "itself with what is in --output_dir."
        )
