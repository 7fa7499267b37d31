"""Record the settings that results depend on, and find where those of two runs differ."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ..data.stream import TaskStream
from ..runs.digest import backbone_sha256
from ..training.arguments import PGPTrainingArguments
from .arguments import DataArguments, ModelArguments

PER_RUN = {  # of a single run: not compared
    "output_dir",
    "overwrite_output_dir",
    "seed",
    "data_seed",
    "disable_tqdm",
    "resume_from_checkpoint",
    "query_cache",
}
QUIET = {  # may differ from a finished run's, since they change no number
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "report_to",
    "logging_steps",
    "logging_strategy",
    "run_name",
    "verify_images",
    "figures",
    "keep_samples",
    "hub_license",
    "query_cache_gb",
}

Settings = dict[str, dict[str, Any]]  # by part: "model", "data", "training", ...


def record(model: ModelArguments, data: DataArguments, training: PGPTrainingArguments | None = None) -> Settings:
    """Return the settings of a run except its seed, ready for JSON and without local paths.

    Args:
        model: the backbone.
        data: the stream.
        training: recorded where it is this package's own or differs from its default; None where nothing is trained.
    """
    source = {"model": _public(vars(model)), "data": _public(vars(data))}
    if training is None:
        return source
    plain, own = _plain_training(), PGPTrainingArguments.__annotations__
    return {**source, "training": {k: v for k, v in _values(training).items() if k in own or v != plain[k]}}


def differences(mine: Settings, theirs: Settings, defaults: Settings | None = None) -> list[str]:
    """Describe the differences between two records.

    A setting that is missing in one of them was at its default, or did not exist yet.

    Args:
        mine: the settings here.
        theirs: those of an earlier run.
        defaults: of parts that [`record`] does not know.
    """
    known = {"model": vars(ModelArguments()), "data": vars(DataArguments()), "training": _plain_training()}
    known = {**known, **(defaults or {})}
    here, there = (
        {part: {**known.get(part, {}), **given} for part, given in settings.items()} for settings in (mine, theirs)
    )
    found = []
    for part in sorted(here.keys() | there.keys()):
        own, other = here.get(part, {}), there.get(part, {})
        for key in sorted((own.keys() | other.keys()) - QUIET):
            values = own.get(key, "unknown"), other.get(key, "unknown")
            if values[0] != values[1]:
                found.append(f"{part}.{key} is {values[1]!r} there, {values[0]!r} here")
    return found


def digests(stream: TaskStream, backbone: PreTrainedModel) -> dict[str, str | None]:
    """Return the SHA-256 of the stream's class order and images, and of the backbone's weights without its head."""
    manifest = stream.manifest()
    shown = {key: manifest[key] for key in ("tasks", "renderings") if key in manifest}
    tasks = json.dumps(shown if len(shown) > 1 else manifest["tasks"], sort_keys=True)
    return {
        "stream": hashlib.sha256(tasks.encode()).hexdigest(),
        "backbone": backbone_sha256(backbone, ["classifier"]),
    }


def is_folder(value: Any) -> bool:
    """Return True if an argument is a local folder, of whose path files show only the last part."""
    return isinstance(value, str) and os.path.isdir(value)


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: os.path.basename(os.path.abspath(v)) if is_folder(v) else v for key, v in values.items()}


def _values(arguments: PGPTrainingArguments) -> dict[str, Any]:
    return {k: v for k, v in arguments.to_dict().items() if k not in PER_RUN and "hub" not in k}


def _plain_training() -> dict[str, Any]:
    return _values(PGPTrainingArguments("plain"))
