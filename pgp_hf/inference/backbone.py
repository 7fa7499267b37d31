"""Finding and loading the frozen backbone that an adapter names, and its image processor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPModel, PreTrainedModel
from transformers.utils import logging

from .. import embedded
from ..runs.folder import ADAPTER_CONFIG, PROCESSOR
from ..runs.revision import Revision


def find_backbone(given: str | os.PathLike | None, revision: Revision, local: bool) -> tuple[str | Path, str | None]:
    """Hub id or folder of the backbone, and its revision there."""
    if given is not None:
        return (given if isinstance(given, Path) else str(given)), None
    name, path = revision.adapter.get("base_model_name_or_path"), revision.folder / ADAPTER_CONFIG
    ask = "pass the backbone the adapter was trained on, as backbone=<model, folder or Hub id>"
    if not name:
        raise ValueError(f"{path} names no backbone: {ask}.")
    if not isinstance(name, str) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"{path} names the backbone {name!r}, which is neither a Hub id nor a plain folder: {ask}.")
    if folder := embedded.resolve(name):
        return folder, None
    if local and os.path.isabs(name) and os.path.isdir(name):
        return name, None
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{path} names the backbone {name!r}, which is not on this machine: {ask}.") from error
    pinned = revision.adapter.get("revision")
    if pinned is not None and not isinstance(pinned, str):
        raise ValueError(f"{path} has revision={pinned!r}: expected a branch, tag or commit of the backbone.")
    return name, pinned


def load_backbone(source: str | Path, config: Any, options: dict[str, Any]) -> PreTrainedModel:
    kind: Any = CLIPModel
    if config.peft_type != "CLIP_PROMPT":
        kind, names = AutoModelForImageClassification, dict(config.id2label)
        head = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        options = {**options, **head, "ignore_mismatched_sizes": True}
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):  # a new head draws numbers, and is replaced
            return kind.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the backbone {str(source)!r} cannot be loaded ({error}). Pass the backbone the adapter was trained on as "
            "backbone=<model, folder or Hub id>; it must be in safetensors format."
        ) from error


def load_processor(revision: Revision, source: str | Path | None, hub: dict[str, Any]) -> Any:
    """The saved image processor, or else the backbone's."""
    saved = (revision.folder / PROCESSOR).is_file()
    if not saved and source is None:
        raise ValueError(f"{revision.folder} has no {PROCESSOR}: pass the backbone's image processor as processor=...")
    try:
        return AutoImageProcessor.from_pretrained(
            revision.folder if saved else source, backend="pil", trust_remote_code=False, **({} if saved else hub)
        )
    except (OSError, TypeError, ValueError, AttributeError, KeyError) as error:
        where = revision.folder / PROCESSOR if saved else source
        raise ValueError(
            f"no image processor can be made from {where} ({error}): pass one as processor=..."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers at its errors alone: the report of a new head is no news here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
