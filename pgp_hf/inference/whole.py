"""Load a whole model that has learned a stream: its folder holds all of its weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForImageClassification, PreTrainedModel

from ..backbones import registry as registry  # DINOv3's head, which transformers lacks
from ..backbones.loading import errors_only
from ..runs.folder import MODEL, MODEL_CONFIG
from ..runs.revision import Revision
from .adapters import UNFIT


def load_whole(revision: Revision, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load the model of a revision.

    Args:
        revision: see `Revision.whole`.
        attn_implementation: "eager", "sdpa", ...; transformers' choice by default.

    Raises:
        ValueError: weights that are missing, damaged or altered, or do not fit `config.json`.
    """
    revision.check_whole()
    model = open_whole(revision.folder, attn_implementation)
    names = model.config.id2label or {}
    if revision.manifest and names == {label: f"LABEL_{label}" for label in names}:  # placeholders of transformers
        model.config.id2label = dict(enumerate(revision.manifest["label_names"]))
    return model


def open_whole(folder: Path, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load a model of this package's own making from a folder; raise ValueError if its files do not fit together.

    It goes through transformers, whose files have other names for some tensors than its models.
    """
    try:
        with errors_only(bars=False):
            model, told = AutoModelForImageClassification.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation=attn_implementation,
                output_loading_info=True,
            )
    except (OSError, *UNFIT) as error:
        raise ValueError(
            f"the model in {folder} cannot be loaded, {MODEL} or {MODEL_CONFIG} is damaged: {error}"
        ) from error
    for what, names in told.items():
        if names:
            raise ValueError(
                f"{folder / MODEL} does not fit {MODEL_CONFIG}: {what.replace('_', ' ')} {sorted(map(str, names))[0]} "
                f"({len(names)} in all)."
            )
    return model
