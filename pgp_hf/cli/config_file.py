"""Read the options of a command from a YAML or JSON file, its first argument."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ENDINGS = (".yaml", ".yml", ".json")
# What the command line says replaces what the file says in other words.
_REPLACED = {
    "num_tasks": {"init_classes", "increment"},
    "init_classes": {"num_tasks"},
    "increment": {"num_tasks"},
    "model_name_or_path": {"model_revision"},
    "dataset_name": {"train_dir", "validation_dir", "test_dir", "dataset_config_name", "dataset_revision", "dataset_split"},
    "train_dir": {
        *("dataset_name", "dataset_config_name", "dataset_revision", "dataset_split"),
        *("image_column_name", "label_column_name", "validation_dir", "test_dir"),
    },
}  # fmt: skip


class CommandLine(NamedTuple):
    """Options, those of a file first, so that the command line's win.

    Attributes:
        tokens: as if all were on the command line.
        nothing: options that the file sets to null.
        file: its path, None without one.
        keys: that the file has, as options are called.
    """

    tokens: list[str]
    nothing: frozenset[str] = frozenset()
    file: str | None = None
    keys: frozenset[str] = frozenset()

    def given(self) -> set[str]:
        """Return the options that are set, such as "--num_tasks"."""
        named = {option(token) for token in self.tokens if token.startswith("-")}  # the others are values
        return named | {f"--{name}" for name in self.nothing}


def option(token: str) -> str:
    """Return the option that a token names: "--learning_rate", also for "--learning-rate=0.1"."""
    return token.partition("=")[0].replace("-", "_").replace("__", "--", 1)


def expand(argv: Sequence[str]) -> CommandLine:
    """Return the options of a command line, and of the file that its first argument names, if it does.

    Raises:
        ValueError: no such file, or one that holds anything but options by name.
    """
    if not argv or argv[0].startswith("-") or not argv[0].lower().endswith(ENDINGS):
        return CommandLine(list(argv))
    file, rest = argv[0], list(argv[1:])
    replaced = {each for token in rest for each in _REPLACED.get(option(token).removeprefix("--"), ())}
    settings = {name: value for name, value in _read(file).items() if name not in replaced}
    tokens = [token for name, value in settings.items() if value is not None for token in _tokens(file, name, value)]
    on_line = {option(token).removeprefix("--") for token in rest}
    nothing = frozenset(name for name, value in settings.items() if value is None and name not in on_line)
    return CommandLine(tokens + rest, nothing, file, frozenset(settings))


def refuse_unknown(unknown: Sequence[str], known: Collection[str], line: CommandLine) -> None:
    """Raise ValueError for the first argument that no option takes, with the most similar option.

    Args:
        unknown: arguments that were not understood, maybe none.
        known: names of the options, without dashes.
        line: where they were given.
    """
    for name in [*sorted(line.nothing - set(known)), *unknown]:
        if not name.startswith("-") and name not in line.nothing:
            before = [token for token in line.tokens[: line.tokens.index(name)] if token.startswith("--")]
            first = f"a file of options comes first, and ends in {', '.join(ENDINGS)}"
            hint = f"{option(before[-1])} takes a single value" if before else first
            raise ValueError(f"{name!r} belongs to no option: {hint}.")
        key = option(name).lstrip("-")
        similar = difflib.get_close_matches(key, known, n=1)
        where = f"{line.file} has {key!r}, which" if key in line.keys else f"{name.partition('=')[0]}"
        proposal = f": did you mean {similar[0] if key in line.keys else f'--{similar[0]}'}?" if similar else "."
        raise ValueError(f"{where} is not an option of this command{proposal} --help_all lists all of them.")


def _read(file: str) -> dict[str, Any]:
    """Return the settings of a file by the names of options, with underscores."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file} does not exist: expected a YAML or JSON file of options by their names.")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file} holds no options: expected lines such as 'learning_rate: 0.01'.")
    return {name.removeprefix("--").replace("-", "_"): value for name, value in found.items()}


def _tokens(file: str, name: str, value: Any) -> list[str]:
    """Return an option as on the command line."""
    if isinstance(value, list):
        if not value or not all(isinstance(each, str | int | float) for each in value):
            raise ValueError(f"{file}: {name} is {value!r}: expected one or more numbers or texts, or null.")
        if any(isinstance(each, bool) for each in value):  # a class called "no" would be called "false"
            raise ValueError(
                f"{file}: {name} is {value!r}: expected numbers or texts; write yes, no, on and off in quotes, since YAML "
                "takes them for true and false."
            )
        return [f"--{name}", *map(_text, value)]
    return [f"--{name}={_text(value)}"]


def _text(value: Any) -> str:
    """Return a value as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)
