"""List the families of backbones that prompts fit, and find the backbone in a model."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from .dinov2 import DINOV2, DINOV2_REGISTERS
from .dinov3 import DINOV3
from .family import Family
from .siglip import SIGLIP
from .vit import DEIT, VIT, VIT_MSN

FAMILIES: tuple[Family, ...] = (VIT, DEIT, VIT_MSN, DINOV2, DINOV2_REGISTERS, DINOV3, SIGLIP)
"""The one list from which the search, the refusal of other models, the guide and the tests are made."""


def supported() -> str:
    """Return the names of the families in a sentence, such as "ViT, DeiT or SigLIP"."""
    *names, last = (family.name for family in FAMILIES)
    return f"{', '.join(names)} or {last}"


def table() -> str:
    """Return what is supported as a table in Markdown."""
    lines = [
        "| backbone | such as | loaded as | prompts are selected by | the head reads |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        lines.append(
            f"| {family.name} | `{family.example}` | `{family.classifier}` | {family.query_from} | {family.head_input} |"
        )
    return "\n".join(lines)


@cache
def _by_class(kind: type) -> Family | None:
    names = {base.__name__ for base in kind.__mro__}
    return next((family for family in FAMILIES if names.intersection(family.models)), None)


def _backbone_in(model: nn.Module) -> tuple[str, Family] | None:
    for name, module in model.named_modules():
        kind: Any = type(module)
        family = _by_class(kind) or next((one for one in FAMILIES if one.fits(module)), None)
        if family is not None:
            return name, family
    return None


def find(model: nn.Module) -> tuple[str, Family]:
    """Return the name of the backbone inside `model`, empty when it is the model itself, and its family.

    Raises:
        ValueError: there is none.
    """
    if (found := _backbone_in(model)) is None:
        raise ValueError(refusal(model, "it has no patch embeddings with a CLS token"))
    return found


def family_of(model: nn.Module) -> Family:
    """Return the family of the backbone in a model; raise ValueError for others."""
    return find(model)[1]


def check(model: nn.Module) -> None:
    """Raise ValueError unless prompts can be put into the backbone of a model."""
    name, family = find(model)
    for reason in family.reasons(model, model.get_submodule(name)):
        raise ValueError(refusal(model, reason))


def head_width(model: nn.Module) -> int | None:
    """Return the length of what the head of a model reads; None for a model of no family."""
    if (found := _backbone_in(model)) is None:
        return None
    name, family = found
    return family.parts * family.width(model.get_submodule(name))


def refusal(model: nn.Module, reason: str) -> str:
    """Return the sentence that refuses a model."""
    return (
        f"{type(model).__name__} cannot take visual prompts: {reason}. Use a {supported()} model, such as "
        "ViTForImageClassification, or train this one without prompts (pgp_hf.set_trainable and StreamTrainer)."
    )
