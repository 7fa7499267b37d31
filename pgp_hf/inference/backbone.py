"""Find and load the frozen backbone that an adapter names, and its image processor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from .. import embedded
from ..backbones.loading import errors_only, with_one_head
from ..runs.folder import ADAPTER_CONFIG, PROCESSOR
from ..runs.revision import Revision
from .adapters import UNFIT, Adapter

MAX_SIDE = 4096
"""Pixels, the most that images are resized, cropped or padded to; more in a file from elsewhere would only fill the memory."""


def find_backbone(
    given: str | os.PathLike[str] | None, revision: Revision, local: bool
) -> tuple[str | Path, str | None]:
    """Return the Hub id or folder of the backbone, and its revision there.

    Args:
        given: the caller's choice; None for the backbone that `adapter_config.json` names.
        revision: the adapter's files.
        local: whether these were made on this machine, so that paths in them are valid.

    Raises:
        ValueError: no backbone is named, or one that is neither here nor an id on the Hub.
    """
    if given is not None:
        return (given if isinstance(given, Path) else str(given)), None
    name, path = revision.config.get("base_model_name_or_path"), revision.folder / ADAPTER_CONFIG
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
    pinned = revision.config.get("revision")
    if pinned is not None and not isinstance(pinned, str):
        raise ValueError(f"{path} has revision={pinned!r}: expected a branch, tag or commit of the backbone.")
    return name, pinned


def load_backbone(source: str | Path, adapter: Adapter, options: dict[str, Any]) -> PreTrainedModel:
    """Load the backbone of an adapter.

    Args:
        source: its Hub id or folder.
        adapter: its settings; a backbone with a classifier gets a new one for its classes, to be filled by the adapter.
        options: for `from_pretrained`.

    Raises:
        ValueError: it cannot be loaded, or only from a format that can run code.
    """
    kind: Any = getattr(transformers, adapter.base_class)
    if kind is AutoModelForImageClassification:
        names = dict(adapter.class_names)
        head = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        options = {**options, **head, "ignore_mismatched_sizes": True}

    def load(kind: Any) -> PreTrainedModel:
        return kind.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **options)

    try:
        with (
            errors_only(bars=False),
            torch.random.fork_rng(devices=[]),
        ):  # a new head, soon replaced, draws random numbers
            return with_one_head(load) if kind is AutoModelForImageClassification else load(kind)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the backbone {str(source)!r} cannot be loaded ({error}). Pass the backbone the adapter was trained on as "
            "backbone=<model, folder or Hub id>; it must be in safetensors format."
        ) from error


def load_processor(revision: Revision, source: str | Path | None, hub: dict[str, Any]) -> BaseImageProcessor:
    """Load the saved image processor, or else the backbone's.

    Args:
        revision: the adapter's files.
        source: Hub id or folder of the backbone, if known.
        hub: `token` and other options, for `from_pretrained`.

    Raises:
        ValueError: no image processor, or one that cannot be loaded.
    """
    saved = (revision.folder / PROCESSOR).is_file()
    if not saved and source is None:
        raise ValueError(f"{revision.folder} has no {PROCESSOR}: pass the backbone's image processor as processor=...")
    try:
        processor = AutoImageProcessor.from_pretrained(
            revision.folder if saved else source, backend="pil", trust_remote_code=False, **({} if saved else hub)
        )
        _check_processor(processor)
        return processor
    except (OSError, *UNFIT) as error:
        where = revision.folder / PROCESSOR if saved else source
        raise ValueError(
            f"no image processor can be loaded from {where} ({error}): pass one as processor=..."
        ) from error


def check_sizes(processor: Any) -> None:
    """Raise ValueError for an image processor that resizes, crops or pads to a size above `MAX_SIDE`, or to none at all."""
    for name, step in (("size", "do_resize"), ("crop_size", "do_center_crop"), ("pad_size", "do_pad")):
        if not getattr(processor, step, True):  # the size is not used
            continue
        for key, length in dict(getattr(processor, name, None) or {}).items():
            most = MAX_SIDE**2 if key.endswith("_pixels") else MAX_SIDE
            if length is not None and not (type(length) is int and 0 < length <= most):
                raise ValueError(f"{name} has {key}={length!r}: expected a whole number of pixels from 1 to {most}")


def _check_processor(processor: BaseImageProcessor) -> None:
    """Raise ValueError, or what the processor raises, unless it makes finite pixels of moderate size from an image."""
    check_sizes(processor)
    with np.errstate(all="ignore"):
        pixels = processor([Image.new("RGB", (32, 32), (200, 100, 50))], return_tensors="pt")["pixel_values"]
    if not torch.isfinite(pixels).all():
        settings = ", ".join(
            f"{name}={getattr(processor, name, None)}" for name in ("image_mean", "image_std", "rescale_factor")
        )
        raise ValueError(f"it makes pixels that are not finite of an image: {settings}")
