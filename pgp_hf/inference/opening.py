"""Open the model of a revision: a whole model, or an adapter on its backbone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..models import PlainModel, load_weights, set_trainable
from ..runs.revision import Revision
from .adapters import expected_weights, plain_backbone, read_adapter, read_weights, wrap
from .backbone import find_backbone, load_backbone, load_processor
from .whole import load_whole


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a precision that weights can have, which may be given by its name.

    Raises:
        ValueError: anything but a floating type of at least 16 bits, or None.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not (isinstance(found, torch.dtype) and found.is_floating_point and torch.finfo(found).bits >= 16):
        raise ValueError(
            f"dtype={dtype!r} is not a precision of weights: use torch.float32, torch.bfloat16, torch.float16, "
            "torch.float64 or one of their names, such as 'bfloat16'; or leave it out."
        )
    return found


def open_model(
    found: Revision,
    backbone: str | os.PathLike[str] | PreTrainedModel | None,
    processor: BaseImageProcessor | None,
    local: bool,
    hub: dict[str, Any],
    attn_implementation: str | None = None,
    trainable: bool = False,
    dtype: torch.dtype | str | None = None,
) -> tuple[PreTrainedModel | PeftModel, BaseImageProcessor]:
    """Open the model of a revision, and its image processor.

    Args:
        found: the revision's files.
        backbone: the frozen model, its Hub id or folder, if the revision does not say where it is.
        processor: an image processor to use instead of the saved one.
        local: whether the files were made on this machine, so that paths in them are valid.
        hub: `token` and other options of `from_pretrained`.
        attn_implementation: "eager", "sdpa", ...; transformers' choice by default.
        trainable: whether what has learned can learn on; it is in float32 then.
        dtype: precision of the weights, or its name, beneath an adapter of the frozen ones alone; by default that of a
            backbone that is passed, or else the one that the run was trained in. A backbone that is passed is cast itself.

    Raises:
        ValueError: files that are damaged or do not fit together, another backbone, or not a floating `dtype`.
    """
    precision = floating_dtype(dtype)  # before a backbone that was passed is touched
    if not found.whole:
        return _open_adapter(found, backbone, processor, local, hub, attn_implementation, trainable, precision)
    if backbone is not None:
        raise ValueError(
            f"{found.folder} holds a whole model, which needs no backbone: leave out backbone={backbone!r:.80}."
        )
    processor = processor or load_processor(found, None, hub)
    found.bases()  # read only to be checked, as those of an adapter: prediction does not need them
    model = load_whole(found, attn_implementation)
    if trainable:
        name = (found.results or {}).get("model", "full")
        set_trainable(model, "all" if name == "full" else name)
        PlainModel(model).check()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # products round by alignment in memory, and a file has one of its own
        if torch.finfo(model.dtype).bits < 32:
            model.float()  # of an earlier version, which trained in any precision
    if precision is not None:
        nn.Module.to(model, precision)
    return model, processor


def _open_adapter(
    found: Revision,
    backbone: str | os.PathLike[str] | PreTrainedModel | None,
    processor: BaseImageProcessor | None,
    local: bool,
    hub: dict[str, Any],
    attn_implementation: str | None,
    trainable: bool,
    dtype: torch.dtype | None,
) -> tuple[PeftModel, BaseImageProcessor]:
    adapter = read_adapter(found)
    source: str | Path | None = None
    if isinstance(backbone, nn.Module):
        base = plain_backbone(backbone)
    else:
        source, revision_of = find_backbone(backbone, found, local)
        options = {"attn_implementation": attn_implementation, "revision": revision_of or "main", **hub}
        # in the precision of its digest; transformers would take that of its file
        base = load_backbone(source, adapter, {**options, "dtype": found.precision})
    processor = processor or load_processor(found, source, hub)
    weights = read_weights(found, expected_weights(base, adapter.config))
    if found.results is not None:
        found.bases()
    found.check_backbone(base)
    if dtype is not None:  # the last check has passed
        nn.Module.to(base, dtype)

    adapter.config.inference_mode = not trainable
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial values, which are soon replaced
        model = wrap(base, adapter.config)
    load_weights(model, weights)
    base.config.id2label = dict(adapter.class_names)
    return model, processor
