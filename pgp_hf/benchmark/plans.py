"""Define rows of the benchmark, and plan runs: resolve a row's name to settings, and find out if it is finished."""

from __future__ import annotations

import contextlib
import copy
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..cli.arguments import DataArguments, ModelArguments
from ..cli.settings import PER_RUN, Settings, differences, record
from ..data.scenarios import SCENARIOS
from ..methods import METHODS
from ..models import check_trainable
from ..projection import ProjectionConfig
from ..runs.reading import read_json
from ..training.arguments import PGPTrainingArguments
from ..tuners import ClipPromptConfig
from ..tuners.base.config import PromptConfig

FIXED = {"method", "head", "push_to_hub"} | PER_RUN  # cannot be set in a row's name
FILLED_IN = {"hidden_size", "target_modules", "interpolate_pos_encoding"}  # when the adapter is added to its backbone


@dataclass(frozen=True)
class Row:
    """A row of the table: a classifier on frozen features, prompts with a projection, or a method on a plain model.

    Args:
        what: the row in a few words.
        classifier: class of the classifier.
        prompt: class of the prompts' configuration.
        method: registered name of the method.
        projection: fields of the `ProjectionConfig` of prompts.
        training: fields of the `PGPTrainingArguments` that differ from the other rows'.
        joint: learn all classes as one task.
        surprises: learn each task as it comes, by a model that begins without classes.
    """

    what: str
    classifier: type[Any] | None = None
    prompt: type[PromptConfig] | None = None
    method: str | None = None
    projection: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    joint: bool = False
    surprises: bool = False

    def refusal(self, scenario: str, shift: str | None) -> str | None:
        """Return why the row does not run on such a stream, with the fix; None if it does."""
        if shift is not None and (self.joint or self.surprises):
            return (
                f"learns other tasks than the stream's, and each task of shift={shift!r} has a rendering of its own: leave "
                "out the row or --shift"
            )
        if self.joint and SCENARIOS[scenario].task_known:
            return (
                f"learns all classes as one task, in which all of them compete, and in scenario={scenario!r} only those of "
                "an image's task do: leave it out. The method joint, which is tested task by task, is the bound there"
            )
        if self.method is not None and scenario not in (known := METHODS[self.method].scenarios):
            return f"is not defined for scenario={scenario!r}, only for {', '.join(sorted(known))}: leave it out"
        return None


@dataclass
class Learner:
    """Describe what of a plain model learns.

    Args:
        trainable: as `pgp_hf.set_trainable` has it.

    Raises:
        ValueError: something that it does not know.
    """

    trainable: str = "all"

    def __post_init__(self) -> None:
        check_trainable(self.trainable)


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
        training: of prompts or a plain model; for a classifier, of what reads the images.
        classifier: on frozen features; None for other rows.
        prompt: configuration of the prompts; None for other rows.
        projection: of the prompts; None for other rows.
        method: configuration of the method on a plain model; None for other rows.
        learner: what of the plain model learns; None for other rows.
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
    method: Any = None
    learner: Learner | None = None

    @property
    def label(self) -> str:
        """Name of the run, and of its files: without the colon of "lora:8", which not all systems allow there."""
        return f"{self.name}-seed{self.seed}".replace(":", "")

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

    def settings(self) -> Settings:
        """Return everything that the results depend on except the seed, ready for JSON and without local paths."""
        if self.classifier is not None:
            classifier = {"name": type(self.classifier).__name__, **asdict(self.classifier)}
            return {**record(self.model, self.data), "classifier": classifier}
        found = record(self.model, self.data, self.training)
        training = found.pop("training")
        own: Settings = {}
        if self.row.method is not None and self.learner is not None:
            settings = METHODS[self.row.method](self.method).settings()
            own = {"method": {"name": self.row.method, **settings}, "run": asdict(self.learner)}
        elif self.projection is not None:
            own = {"prompt": _prompt(self.prompt), "projection": self.projection.to_dict()}
            own |= {"run": {"surprises": True}} if self.row.surprises else {}
        return {**found, **own, "training": training}

    def _defaults(self) -> Settings:
        """Return the defaults of the settings that are this plan's own."""
        if self.classifier is not None:
            return {"classifier": asdict(type(self.classifier)())}
        if self.row.method is not None:
            return {"method": METHODS[self.row.method]().settings(), "run": asdict(Learner())}
        return {"prompt": _prompt(type(self.prompt)(head="statistics")), "projection": ProjectionConfig().to_dict()}

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
                differ = differences(self.settings(), found.get("settings", found), self._defaults())
                if differ:
                    raise ValueError(f"{file} has other settings ({'; '.join(differ[:4])}): {remedy}.")
        return self.file.exists()

    def check_seeds(self, runs: Iterable[Mapping[str, Any]]) -> None:
        """Raise ValueError if finished runs of the same row and other seeds have other settings: one mean is of them all."""
        for run in runs:
            if run["row"] != self.name:
                continue
            own, theirs = without_seed(self.settings()), without_seed(run["settings"])
            if own != theirs and (differ := differences(own, theirs, self._defaults())):
                raise ValueError(
                    f"row {self.name!r} has other settings with seed {run['seed']} in {self.output} ({'; '.join(differ[:4])}): "
                    "choose another --output_dir, or name the settings in the row: ROW@field=value."
                )


def without_seed(settings: Settings) -> Settings:
    """Return settings without that of a classifier which depends on the run's seed."""
    return {part: {key: value for key, value in own.items() if key != "seed"} for part, own in settings.items()}


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
        name: "ROW" or "ROW@field=value[,field=value]": fields of the row's projection, prompts or training; of its
            method, with "trainable"; or of its classifier. Their order does not matter: the plan's name has them
            sorted.
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
    if (reason := row.refusal(data.scenario, data.shift)) is not None:
        raise ValueError(f"row {base!r} {reason}.")
    if row.prompt is not None and row.prompt.base_class == "CLIPModel":
        model = copy.copy(model)
        model.kind = "clip"
    parts = _parts(row, seed, data, training)
    given: dict[str, dict[str, Any]] = {}
    try:
        for setting in suffix.split(",") if at else []:
            key, value, part = _setting(setting, parts)
            given.setdefault(part, {})[key] = value
        parts = {
            part: _changed(part, config, given[part]) if part in given else config for part, config in parts.items()
        }
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
        replace(data, num_tasks=1, init_classes=None, increment=None) if row.joint else data,
        **{"training": training, **parts},
    )


def _parts(row: Row, seed: int, data: DataArguments, training: PGPTrainingArguments) -> dict[str, Any]:
    """Return the parts of a plan that its name may change, each a dataclass, by the names that [`Plan`] has for them."""
    if row.classifier is not None:
        seeded = "seed" in row.classifier.__dataclass_fields__
        return {"classifier": row.classifier(**({"seed": seed} if seeded else {}))}
    training = replace(training, **row.training)
    if row.method is not None:
        return {"method": METHODS[row.method].config_class(), "learner": Learner(), "training": training}
    assert row.prompt is not None
    own: dict[str, Any] = {}
    if row.prompt is ClipPromptConfig and data.num_tasks is not None:
        own = {"pool_size": data.num_tasks}  # a context per task
    prompt = row.prompt(head="statistics", **own)
    return {"projection": ProjectionConfig(**row.projection), "prompt": prompt, "training": training}


def _changed(part: str, config: Any, given: dict[str, Any]) -> Any:
    """Return a part of a plan with other values."""
    # a method's configuration may have filled in what was not given
    return type(config)(**given) if part == "method" else replace(config, **given)


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
    if any(kind is str or isinstance(kind, str) for kind in kinds) and re.fullmatch(r"[\w.:+-]+", text):
        return text
    names = " or ".join(kind.__name__ if isinstance(kind, type) else repr(kind) for kind in kinds)
    raise ValueError(f"{key}={text!r} does not fit: expected {names.replace('NoneType', 'none')}.")


def _prompt(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.settings().items() if key not in FILLED_IN}
