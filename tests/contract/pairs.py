"""The models and methods of the contract, with the settings that make a method do something in a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from foreign import SharedTokenConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from pgp_hf.methods import METHODS, ContinualMethod, create
from pgp_hf.models import stream_model
from pgp_hf.tuners.base import PromptConfig

TUNERS = [
    kind.value.lower() for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(config, PromptConfig)
]
PLAIN = ["full", "last:1", "head", "lora:2"]
SETTINGS: dict[str, dict[str, Any]] = {
    "projected_prompts": {"energy": 0.9, "key_energy": 0.9},
    "ewc": {"strength": 10.0},
    "derpp": {"memory_size": 6},
    "icarl": {"memory_size": 12},
    "bic": {"memory_size": 12, "validation_share": 0.25},
    "der_mcg": {"memory_size": 12, "tuning_epochs": 4, "gate_epochs": 2, "gate_batch_size": 6},
    "gpm": {"energy": 0.8},
    "null_space_adam": {"energy": 0.8},
}
NEUTRAL: dict[str, dict[str, Any]] = {  # with which a method is fine-tuning
    "projected_prompts": {"method": "none"},
    "ewc": {"strength": 0.0},
    "derpp": {"memory_size": 0},
    "lwf": {"strength": 0.0},
    "gpm": {"energy": 0.0},
    "null_space_adam": {"energy": 0.0},
    "fine_tuning": {},
}
NEVER_NEUTRAL = {"bic", "der_mcg", "icarl", "joint"}


def kind_of(model: str) -> str:
    """Return the kind of backbone that a model is put on."""
    return tiny.ADAPTERS.get(model.removesuffix("_prompt"), "classification")


def make_model(name: str, folder: Path, head: str = "linear") -> Any:
    """Return a model; its adapter, if it is one, names the backbone in `folder`."""
    kind = kind_of(name)
    if not (folder / kind).exists():
        tiny.backbone(kind).save_pretrained(folder / kind)
    base = tiny.backbone(kind)
    base.name_or_path = str(folder / kind)
    if name in PLAIN:
        return tiny.plain(name, base)
    if name == "shared_token":
        return tiny.model(SharedTokenConfig(head=head), base)
    return tiny.model(name.removesuffix("_prompt"), base, head=head)


def make_method(name: str) -> ContinualMethod:
    """Return a method with settings that matter."""
    return create(name, **SETTINGS.get(name, {}))


def refusal(model: str, method: str, folder: Path, head: str = "linear") -> str | None:
    """Return what a method says to a model that it does not go with; None for one that it does."""
    try:
        make_method(method).check(stream_model(make_model(model, folder, head)))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def model_for(method: str, folder: Path) -> str:
    """Return the first model that a method goes with."""
    return next(model for model in ("full", *TUNERS) if refusal(model, method, folder) is None)


__all__ = [
    "METHODS",
    "NEUTRAL",
    "NEVER_NEUTRAL",
    "PLAIN",
    "TUNERS",
    "kind_of",
    "make_method",
    "make_model",
    "model_for",
    "refusal",
]
