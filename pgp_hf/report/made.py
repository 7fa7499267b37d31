"""Describe for a model card what a run has made: prompts, another adapter, or a whole model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .names import name_base

if TYPE_CHECKING:
    from ..tuners.base.card import AdapterCard

WHOLE = re.compile(r"full|head|last:[1-9]\d*")
"""What of a whole model may learn, by its name in `results.json`."""

_PEFT = "stored as a [PEFT](https://huggingface.co/docs/peft) adapter made with `pgp_hf`."
_TRANSFORMERS = "stored as a model of [transformers](https://huggingface.co/docs/transformers) made with `pgp_hf`."
_AGAINST_FROZEN = "can only be judged against a classifier on the frozen features, which this card does not include."
_UNHELD = "features of old images stay as they were only as far as the method holds them."


class Made(NamedTuple):
    """The phrases of a model card that differ between prompts, other adapters and whole models.

    Attributes:
        library: that loads it, as the Hub lists it.
        opening: what it is, up to the word "trained" and the part that was.
        closing: the end of the same paragraph: in which form it is stored.
        alone: how it is used without this package.
        shared: what the tasks share, where they are learned one after the other, a sentence each.
        limits: what it cannot do, whatever the method, a sentence each.
    """

    library: str
    opening: str
    closing: str
    alone: str
    shared: Sequence[str]
    limits: Sequence[str]

    @classmethod
    def of_adapter(cls, adapter: AdapterCard, base: str) -> Made:
        """Return the phrases about an adapter.

        Args:
            adapter: its description.
            base: name or path of its backbone, empty for one without.
        """
        name = name_base(base)
        backbone = f"the frozen {name}" if name else "a frozen backbone without a name"
        alone = "As a PEFT adapter on a model that you load yourself"
        if adapter.prompts:
            limit = (
                "The backbone is frozen: prompts can do little about what its features do not separate, and its biases "
                f"remain. Whether the prompts help at all {_AGAINST_FROZEN}"
            )
            opening = f"Prompts for {backbone}: {adapter.parts}. They were trained"
            return cls("peft", opening, f"are {_PEFT}", alone, [], [limit])
        shared = [f"All tasks share the adapter: {_UNHELD}"] if adapter.from_peft else []
        limits = [f"Whether the adapter helps at all {_AGAINST_FROZEN}"]
        opening = f"An adapter for {backbone}: {adapter.parts}. It was trained"
        return cls("peft", opening, f"is {_PEFT}", alone, shared, limits)

    @classmethod
    def of_whole(cls, what: str, base: str, config: Mapping[str, Any]) -> Made:
        """Return the phrases about a whole model.

        Args:
            what: what learned, see `WHOLE`.
            base: name or path of the model that training started from, empty for one without.
            config: content of `config.json`.
        """
        name = name_base(base)
        part, others, shared, limit = _learned(what)
        limits = [limit]
        if name:
            limits.append(f"Its weights derive from those of {name}, whose license applies to them as well.")
        opening = f"{name or _built(config)}, trained {part}"
        return cls("transformers", opening, f"{_TRANSFORMERS}{others}", "With transformers alone", shared, limits)


def describe_adapter(config: Mapping[str, Any], batchwise: bool) -> AdapterCard:
    """Describe an adapter in the words of its configuration class, or in general ones if the class has none.

    Args:
        config: content of `adapter_config.json`.
        batchwise: whether prompts were chosen for whole batches, according to the results.
    """
    # only here: `python -m pgp_hf.hub --help` does without PEFT, which takes seconds to import
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from ..tuners.base import AdapterCard, PromptConfig

    kind = str(config.get("peft_type"))
    found = next((config_class for name, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items() if name == kind), None)
    if found is not None and issubclass(found, PromptConfig):
        return found.card({**config, "batchwise_prompt": batchwise})
    general = AdapterCard(f"PEFT's `{kind}`, with the settings in `adapter_config.json`", prompts=False)
    if kind != "LORA":
        return general
    parts = _lora_parts(config) or general.parts
    return general._replace(parts=parts, head="the model's `classifier`, trained with the adapter", from_peft=True)


def describe_whole() -> AdapterCard:
    """Describe a whole model in the words that cards have for adapters."""
    from ..tuners.base import AdapterCard  # only here, as in `describe_adapter`

    return AdapterCard("all weights", prompts=False, head="the model's own `classifier`, which all tasks share")


def _lora_parts(config: Mapping[str, Any]) -> str | None:
    """Describe LoRA; return None for one with settings that a sentence cannot tell."""
    from ..models import LORA_TARGETS  # only here, as in `describe_adapter`

    rank, layers = config.get("r"), config.get("target_modules")
    special = ("rank_pattern", "layers_to_transform", "exclude_modules", "use_dora")
    if any(config.get(name) for name in special) or config.get("bias", "none") != "none":
        return None
    if type(rank) is not int or not isinstance(layers, list) or not layers:
        return None
    if not all(isinstance(name, str) and re.fullmatch(r"\w[\w.]*", name) for name in layers):
        return None
    names = ", ".join(f"`{name}`" for name in sorted(layers))
    usual = any(set(layers) == set(targets) for targets in LORA_TARGETS)
    where = f"queries and values ({names})" if usual else f"the layers {names}"
    return f"PEFT's LoRA of rank {rank} on {where}, and a head"


def _learned(what: str) -> tuple[str, str, list[str], str]:
    """Return the part of a whole model that learned, a sentence about the others, what tasks share, and a limit."""
    if what == "head":
        limit = (
            "Only the head learns: it can do little about what the features do not separate, and their biases remain. "
            "Whether it learned well can only be judged against a classifier computed in closed form from the same "
            "features, which this card does not include."
        )
        return "in its head alone", " All its other parameters are frozen.", [], limit
    limit = (
        "Whether training it helps at all can only be judged against a classifier on the features that it started with, "
        "which this card does not include."
    )
    if what == "full":
        return "whole", "", [f"All tasks share all parameters: {_UNHELD}"], limit
    count = int(what.removeprefix("last:"))
    several = count > 1
    return (
        f"in its last {f'{count} blocks' if several else 'block'} and its head",
        f" Whatever lies between {'these blocks' if several else 'this block'} and the head learned as well; all "
        f"parameters before {'them' if several else 'it'} are frozen.",
        [f"All tasks share the {'blocks that learn' if several else 'block that learns'}: {_UNHELD}"],
        limit,
    )


def _built(config: Mapping[str, Any]) -> str:
    """Name a model that was not loaded from anywhere by its class."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    known = isinstance(name, str) and name.isidentifier()
    return f"A `{name}` built in memory" if known else "A model built in memory"
