"""Load a backbone with a head for the classes of a stream, whatever head its checkpoint has."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
)
from transformers.utils import logging

from .. import embedded
from . import registry as registry  # DINOv3's head, which transformers lacks

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
    model = with_head_of(stream, name, revision, dtype=dtype, attn_implementation=attn_implementation, **options)
    if stream is not None:
        renew_head(model)
    return model


def with_head_of(
    stream: TaskStream | None, name: str | os.PathLike[str] | None = None, revision: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load a backbone as `load_backbone` does, but with the checkpoint's own head where it has as many classes."""
    source = embedded.vit_path() if name is None else embedded.resolve(str(name)) or name
    if stream is not None:
        names = stream.id2label
        labels = {label: index for index, label in names.items()}
        options = {**options, "num_labels": stream.num_classes, "id2label": names, "label2id": labels}

    def load(kind: Any) -> PreTrainedModel:
        return kind.from_pretrained(source, revision=revision or "main", ignore_mismatched_sizes=True, **options)

    with errors_only():  # transformers would warn about the new head, which is intended
        try:
            return with_one_head(load)
        except AttributeError:
            if options.get("num_labels") != 0:
                raise
            # transformers' SigLIP fails without a class; whoever learns an empty stream opens the head anew
            options = {key: value for key, value in options.items() if key not in ("id2label", "label2id")}
            options["num_labels"] = 1
            return with_one_head(load)


def renew_head(model: Any) -> None:
    """Draw a model's head anew, as one of the same number of classes has come with the checkpoint."""
    for layer in model.classifier.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.normal_(std=getattr(model.config, "initializer_range", 0.02))
            layer.bias.data.zero_()


def with_one_head(load: Callable[[Any], PreTrainedModel]) -> PreTrainedModel:
    """Load a model by transformers' own choice of its class, but for a DeiT with a second head for distillation.

    Args:
        load: loads it by a class.
    """
    model = load(AutoModelForImageClassification)
    if isinstance(model, DeiTForImageClassificationWithTeacher):
        return load(DeiTForImageClassification)  # with the same weights, but a head on CLS alone
    return model


@contextmanager
def errors_only(bars: bool = True) -> Iterator[None]:
    """Silence all but errors of transformers, and its bars without a terminal.

    Args:
        bars: False for no bar on a terminal either.
    """
    shown = bars and sys.stderr.isatty()
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled() and not shown
    logging.set_verbosity_error()
    if bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def wrapping() -> Iterator[None]:
    """Silence a warning while PEFT wraps a model: it reads a name that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
