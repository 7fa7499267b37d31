"""Define rows of the benchmark, and plan runs: resolve a row's name to settings, and find out if it is finished."""

from __future__ import annotations

import contextlib
import os
import re
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..cli.arguments import DataArguments, ModelArguments
from ..projection import ProjectionConfig
from ..runs.reading import read_json
from ..training.arguments import PGPTrainingArguments
from ..tuners.base.config import PromptConfig

PER_RUN = {  # of a single run: not compared, and not to be set in a row's name
    "output_dir",
    "overwrite_output_dir",
    "seed",
    "data_seed",
    "disable_tqdm",
    "resume_from_checkpoint",
}
QUIET = {  # may differ from a finished run's, since they change no number
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "report_to",
    "logging_steps",
    "logging_strategy",
    "run_name",
    "verify_images",
}
FIXED = {"method", "head", "push_to_hub"} | PER_RUN  # cannot be set in a row's name
FILLED_IN = {"hidden_size", "target_modules", "interpolate_pos_encoding"}  # when the adapter is added to its backbone


@dataclass(frozen=True)
class Row:
    """A row of the table: a classifier on frozen features, or prompts with a projection.

    Args:
        what: the row in a few words.
        classifier: class of the classifier; None for prompts.
        prompt: class of the prompts' configuration; None for a classifier.
        projection: fields of the `ProjectionConfig`.
        training: fields of the `PGPTrainingArguments` that differ from the other rows'.
        joint: learn all classes as one task.
    """

    what: str
    classifier: type[Any] | None = None
    prompt: type[PromptConfig] | None = None
    projection: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    joint: bool = False


@dataclass
class Plan:
    """One run with all its settings.

    Args:
        name: of the row, with the settings that it carries.
        row: its definition.
        seed: of the run.
        output: folder of finished runs.
        work: folder of unfinished runs.
        model: the backbone.
        data: the stream.
        training: of the prompts; for a classifier, of what reads the images.
        classifier: on frozen features; None for prompts.
        prompt: configuration of the prompts; None for a classifier.
        projection: of the prompts; None for a classifier.
    """

    name: str
    row: Row
    seed: int
    output: Path
    work: Path
    model: ModelArguments
    data: DataArguments
    training: PGPTrainingArguments
    classifier: Any = None
    prompt: Any = None
    projection: ProjectionConfig | None = None

    @property
    def label(self) -> str:
        """Name of the run."""
        return f"{self.name}-seed{self.seed}"

    @property
    def file(self) -> Path:
        """File of the finished run."""
        return self.output / f"{self.label}.json"

    @property
    def lock(self) -> Path:
        """Lock file, held while the run is in progress."""
        return self.output / f".{self.label}.lock"

    @property
    def folder(self) -> Path:
        """Folder of the unfinished run."""
        return self.work / self.label

    def settings(self) -> dict[str, Any]:
        """Return everything that the results depend on except the seed, ready for JSON and without local paths."""
        source = {"model": _public(vars(self.model)), "data": _public(vars(self.data))}
        if self.projection is None:
            return {**source, "classifier": {"name": type(self.classifier).__name__, **asdict(self.classifier)}}
        plain, own = _training(PGPTrainingArguments("plain")), PGPTrainingArguments.__annotations__
        training = {k: v for k, v in _training(self.training).items() if k in own or v != plain[k]}
        return {
            **source,
            "prompt": _prompt(self.prompt),
            "projection": self.projection.to_dict(),
            "training": training,
        }

    def _completed(self, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Add the defaults of missing settings, which were at their defaults or did not exist yet."""
        defaults = {"model": vars(ModelArguments()), "data": vars(DataArguments())}
        if self.classifier is None:
            defaults["training"] = _training(PGPTrainingArguments("plain"))
            defaults["prompt"] = _prompt(type(self.prompt)(head="statistics"))
            defaults["projection"] = ProjectionConfig().to_dict()
        else:
            defaults["classifier"] = asdict(type(self.classifier)())
        return {part: {**defaults.get(part, {}), **given} for part, given in settings.items()}

    def finished(self) -> bool:
        """Return True if the file of the finished run exists.

        Raises:
            ValueError: that file, or the folder of the unfinished run, with other settings.
        """
        for file, remedy in (
            (self.file, "choose another --output_dir, or name the settings in the row: ROW@field=value"),
            (self.folder / "settings.json", "delete its folder, or choose another --work_dir"),
        ):
            if file.exists():
                found = read_json(file)
                differ = _differences(*map(self._completed, (self.settings(), found.get("settings", found))))
                if differ:
                    raise ValueError(f"{file} has other settings ({'; '.join(differ[:4])}): {remedy}.")
        return self.file.exists()


def plan(
    name: str,
    seed: int,
    rows: dict[str, Row],
    model: ModelArguments,
    data: DataArguments,
    training: PGPTrainingArguments,
    work: Path,
) -> Plan:
    """Plan the run of a row with one seed.

    Args:
        name: "ROW" or "ROW@field=value[,field=value]": fields of the row's projection, prompts or training, or of its
            classifier. Their order does not matter: the plan's name has them sorted.
        seed: of the run.
        rows: all rows by name.
        model: the backbone.
        data: the stream.
        training: arguments of all rows; `output_dir` is the folder of finished runs.
        work: folder of unfinished runs.

    Raises:
        ValueError: an unknown row or field, a value that does not fit.
    """
    base, at, suffix = name.partition("@")
    if base not in rows:
        raise ValueError(f"row {base!r} is unknown: choose from {', '.join(rows)}.")
    row = rows[base]
    parts: dict[str, Any] = {
        "projection": ProjectionConfig(**row.projection),
        "prompt": None if row.prompt is None else row.prompt(head="statistics"),
        "training": replace(training, **row.training),
    }
    if row.classifier is not None:
        seeded = "seed" in row.classifier.__dataclass_fields__
        parts = {"classifier": row.classifier(**({"seed": seed} if seeded else {}))}
    given: dict[str, dict[str, Any]] = {}
    try:
        for setting in suffix.split(",") if at else []:
            key, value, part = _setting(setting, parts)
            given.setdefault(part, {})[key] = value
        parts = {part: replace(config, **given[part]) if part in given else config for part, config in parts.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {name!r}: {error}") from error
    texts = sorted(f"{key}={value}" for chosen in given.values() for key, value in chosen.items())
    return Plan(
        "@".join([base, *([",".join(texts)] if texts else [])]),
        row,
        seed,
        Path(str(training.output_dir)),
        work,
        model,
        replace(data, num_tasks=1) if row.joint else data,
        **{"training": training, **parts},
    )


def _setting(text: str, parts: dict[str, Any]) -> tuple[str, Any, str]:
    """Return key, value and part of "field=value"."""
    key, equals, value = text.partition("=")
    for part, config in parts.items():
        known = config.__dataclass_fields__.get(key)
        if equals and known is not None and known.init and key not in FIXED:
            return key, _convert(type(config), key, value), part
    names = [one.name for part, config in parts.items() if part != "training" for one in fields(config)]
    raise ValueError(
        f"{text!r} is not a setting of this row: write field=value with a field of its "
        f"{', '.join(type(config).__name__ for config in parts.values())}, such as "
        f"{', '.join(key for key in names if key not in FIXED | FILLED_IN) or 'none here'}."
    )


def _convert(owner: type, key: str, text: str) -> Any:
    """Return `text` as a value of the type of a dataclass's field; lists cannot be given in a name."""
    hint = typing.get_type_hints(owner)[key]
    kinds = (hint,) if typing.get_origin(hint) is list else typing.get_args(hint) or (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(text)
    if any(kind is str or isinstance(kind, str) for kind in kinds) and re.fullmatch(r"[\w.+-]+", text):
        return text
    names = " or ".join(kind.__name__ if isinstance(kind, type) else repr(kind) for kind in kinds)
    raise ValueError(f"{key}={text!r} does not fit: expected {names.replace('NoneType', 'none')}.")


def _public(values: dict[str, Any]) -> dict[str, Any]:
    return {key: os.path.basename(os.path.abspath(v)) if is_folder(v) else v for key, v in values.items()}


def is_folder(value: Any) -> bool:
    """Return True if an argument is a local folder, of whose path files show only the last part."""
    return isinstance(value, str) and os.path.isdir(value)


def _training(arguments: PGPTrainingArguments) -> dict[str, Any]:
    return {k: v for k, v in arguments.to_dict().items() if k not in PER_RUN and "hub" not in k}


def _prompt(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.settings().items() if key not in FILLED_IN}


def _differences(mine: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> list[str]:
    """Describe the differences between two complete settings."""
    found = []
    for part in sorted(mine.keys() | theirs.keys()):
        own, other = mine.get(part, {}), theirs.get(part, {})
        for key in sorted((own.keys() | other.keys()) - QUIET):
            here, there = own.get(key, "unknown"), other.get(key, "unknown")
            if here != there:
                found.append(f"{part}.{key} is {there!r} there, {here!r} here")
    return found
