"""Open a head of zero classes on any model, for new classes to grow."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import set_additional_trainable_modules
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..backbones import head_width
from .growing import checked_linear, ends, name_classes


def empty_classifier(model: nn.Module) -> None:
    """Replace a model's `classifier` by one of zero classes; one that is an `nn.Identity` becomes linear.

    Raises:
        TypeError: a classifier that does not end in a linear layer.
        ValueError: one that is sharded, or an identity of unknown width.
    """
    reference = next(parameter for parameter in model.parameters() if not parameter.is_meta)
    places = [(parent, name, parent.get_submodule(name)) for parent, name in ends(model, "classifier")]
    fresh = []
    for _, _, layer in places:
        if isinstance(layer, nn.Identity):
            fresh.append(_no_rows(_width(model), True, reference))
        else:
            like = checked_linear(layer).weight
            fresh.append(_no_rows(like.shape[1], layer.bias is not None, reference if like.is_meta else like))
    for (parent, name, layer), new in zip(places, fresh, strict=True):
        if isinstance(layer, nn.Linear):
            new.requires_grad_(layer.weight.requires_grad)
        new.training = layer.training
        parent.register_module(name, new)


def _no_rows(width: int, bias: bool, like: Tensor) -> nn.Linear:
    # made on the meta device, where initialising a layer draws nothing and does not warn that it has no elements
    made = nn.Linear(width, 1, bias=bias, device="meta", dtype=like.dtype)
    made.out_features, made.weight = 0, nn.Parameter(like.new_empty(0, width))
    if bias:
        made.bias = nn.Parameter(like.new_empty(0))
    return made


def _width(model: nn.Module) -> int:
    config: Any = model.config
    width = (
        head_width(model)
        or getattr(config, "hidden_size", None)
        or next(reversed(getattr(config, "hidden_sizes", None) or ()), None)
    )
    if not width:
        raise ValueError(
            f"the configuration of {type(model).__name__} does not say how wide its features are (hidden_size), so it "
            "cannot be given a head: load the model with num_labels=1."
        )
    return int(width)


def under_head(backbone: nn.Module) -> tuple[PreTrainedModel, str]:
    """Put a bare backbone into the model for image classification that transformers has for it, with zero classes.

    Nothing is copied, and no random number is drawn. A pooler that this model does not use is dropped.

    Returns:
        The model, and the backbone's name in it.

    Raises:
        TypeError: there is no such model.
    """
    if not isinstance(backbone, PreTrainedModel):
        raise TypeError(f"a {type(backbone).__name__} cannot be given a head: use a model of transformers.")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            # the copy is for a call that changes it; below, the backbone's own takes its place
            made = AutoModelForImageClassification.from_config(copy.deepcopy(backbone.config))
        inner = getattr(made, made.base_model_prefix, None)
    except ValueError:
        inner = None
    if type(inner) is not type(backbone) or not hasattr(made, "classifier"):
        raise TypeError(
            f"{type(backbone).__name__} has no classifier, and transformers has no model that puts one on it: use a model "
            "with a head, for example one from AutoModelForImageClassification."
        )
    setattr(made, made.base_model_prefix, backbone)
    made.config, made.training = backbone.config, backbone.training
    if getattr(inner, "pooler", None) is None and hasattr(backbone, "pooler"):
        backbone.pooler = None
    empty_classifier(made)
    return cast(PreTrainedModel, made), str(made.base_model_prefix)


def open_classifier(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with a head of zero classes: the same, or the one into which a bare backbone was put.

    Raises:
        TypeError: a head that is not linear, or a backbone that cannot be given one.
    """
    if isinstance(getattr(model, "classifier", None), nn.Module):
        empty_classifier(model)
    else:
        model, _ = under_head(model)
    name_classes(model, {})
    return model


# ---- beneath an adapter of PEFT --------------------------------------------------------------------------------------


def check_alone(adapters: Iterable[str]) -> None:
    """Raise ValueError for several adapters, whose heads would be lost."""
    names = list(adapters)
    if len(names) > 1:
        raise ValueError(
            f"the adapters {', '.join(names)} share the head that is to be replaced: keep the one that learns the stream, "
            "and delete the others first (model.delete_adapter(name))."
        )


def check_saved(config: PeftConfig) -> None:
    """Raise ValueError where the adapter's settings leave the head frozen."""
    saved: list[str] | None = getattr(config, "modules_to_save", None)
    if saved is not None and "classifier" not in saved:
        raise ValueError(
            f"modules_to_save={saved} leaves the head frozen and out of the adapter's file, so that it cannot grow: leave "
            'modules_to_save out, or add "classifier" to it.'
        )


def open_adapter_head(tuner: Any, adapter: str) -> str | None:
    """Give a model beneath an adapter a head of zero classes, which the adapter trains and saves.

    A bare backbone is put into a model with a head, which the tuner has from then on.

    Args:
        tuner: of PEFT; a `BaseTuner`.
        adapter: its name.

    Returns:
        The backbone's name in that model; None if the model had a head.

    Raises:
        TypeError: a head that is not linear, or a backbone that cannot be given one.
        ValueError: several adapters, or a head that the adapter does not save.
    """
    config: Any = tuner.peft_config[adapter]
    check_alone(tuner.peft_config)
    check_saved(config)
    bare, name = tuner.model, None
    if isinstance(getattr(bare, "classifier", None), nn.Module):
        empty_classifier(bare)
    else:
        tuner.model, name = under_head(bare)
        tuner.model.peft_config = bare.__dict__.pop("peft_config", tuner.peft_config)
        tuner.targeted_module_names = [f"{name}.{target}" for target in tuner.targeted_module_names]
    config.modules_to_save = config.modules_to_save or ["classifier"]
    # wraps the head unless it is wrapped already, as PEFT does when an adapter is added
    set_additional_trainable_modules(tuner.model, config, BaseTuner.get_model_config(tuner), adapter)
    name_classes(tuner.model, {})
    return name
