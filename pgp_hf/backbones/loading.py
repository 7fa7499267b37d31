"""Load a backbone with a head for the classes of a stream, whatever head its checkpoint has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from .. import embedded
from .registry import FAMILIES

if TYPE_CHECKING:
    from ..data.stream import TaskStream


def load_backbone(
    name: str | os.PathLike[str] | None = None,
    stream: TaskStream | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a backbone of transformers with a new head for the classes of a stream.

    The checkpoint may be bare or have a head for other classes, which is left out without a warning. Any model for
    image classification can be loaded, to be trained itself; the prompt adapters take those of
    `pgp_hf.backbones.FAMILIES`.

    Args:
        name: Hub id or local folder; by default the small ViT inside this package.
        stream: whose classes the head gets, with their names; None for a head as the checkpoint's configuration has it.
        revision: branch, tag or commit on the Hub.
        dtype: precision of the weights, whatever that of the checkpoint; an adapter learns in float32 on top of any.
        attn_implementation: "eager", "sdpa", ...; transformers' choice by default.
        options: for `from_pretrained`, such as `token`.

    Raises:
        OSError: no such checkpoint.
        ValueError: a model that transformers has no head for.
    """
    source = embedded.resolve(str(name)) if name is not None else embedded.vit_path()
    classes: dict[str, Any] = {}
    if stream is not None:
        names = stream.id2label
        classes = {
            "num_labels": stream.num_classes,
            "id2label": names,
            "label2id": {label: index for index, label in names.items()},
        }
    hub = {"revision": revision or "main", **options}
    with errors_only():  # transformers would warn about the new head, which is intended
        model: PreTrainedModel = classification_class(source or name, **hub).from_pretrained(
            source or name,
            ignore_mismatched_sizes=True,
            attn_implementation=attn_implementation,
            dtype=dtype,
            **classes,
            **hub,
        )
    # a checkpoint's head with the same number of classes has been loaded: start from a new one in any case
    for layer in model.classifier.modules() if stream is not None else ():
        if isinstance(layer, nn.Linear):
            layer.weight.data.normal_(std=getattr(model.config, "initializer_range", 0.02))
            if layer.bias is not None:
                layer.bias.data.zero_()
    return model


def classification_class(source: Any, **options: Any) -> Any:
    """Return the class that loads a checkpoint with one head: transformers' own choice, but for a DeiT with two.

    Args:
        source: Hub id or folder.
        options: for `AutoConfig.from_pretrained`.
    """
    config = AutoConfig.from_pretrained(source, **options)
    made = getattr(config, "architectures", None) or []
    own = {f"{family.classifier}WithTeacher": family.classifier for family in FAMILIES}
    for architecture in made:
        if architecture in own:
            return getattr(transformers, own[architecture])
    return AutoModelForImageClassification


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence all but errors of transformers."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
