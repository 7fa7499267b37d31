"""Load a whole model that has learned a stream: its folder holds all of its weights."""

from __future__ import annotations

from transformers import AutoModelForImageClassification, PreTrainedModel

from ..runs.folder import MODEL, MODEL_CONFIG
from ..runs.revision import Revision
from .adapters import UNFIT
from .backbone import quiet


def load_whole(revision: Revision, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load the model of a revision.

    Args:
        revision: see `Revision.whole`.
        attn_implementation: "eager", "sdpa", ...; transformers' choice by default.

    Raises:
        ValueError: weights that are missing, damaged or altered, or do not fit `config.json`.
    """
    revision.check_whole()
    try:
        with quiet():
            # through transformers, whose files have other names for some tensors than its models
            model, told = AutoModelForImageClassification.from_pretrained(
                revision.folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation=attn_implementation,  # also None: the file has no say in it
                output_loading_info=True,
            )
    except (OSError, *UNFIT) as error:
        raise ValueError(f"the model in {revision.folder} cannot be loaded: {error}") from error
    for what, names in told.items():
        if names:
            raise ValueError(
                f"{revision.folder / MODEL} does not fit {MODEL_CONFIG}: {what.replace('_', ' ')} {sorted(map(str, names))[0]} "
                f"({len(names)} in all)."
            )
    names = {label: f"LABEL_{label}" for label in model.config.id2label}
    if model.config.id2label == names and revision.manifest is not None:  # placeholders of transformers
        model.config.id2label = dict(enumerate(revision.manifest["label_names"]))
    return model
