"""Describe an adapter for the model card of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class AdapterCard(NamedTuple):
    """Phrases about an adapter for its model card; the defaults hold for any adapter.

    Attributes:
        parts: what was added to the backbone, such as "10 prompts of 5 tokens".
        prompts: True where these are prompts.
        selects: True where keys select prompts for each input, False where all inputs get the same, None if not known.
        features: what the head reads.
        head: what classifies when no statistics head does.
        trained_head: what was trained in order to classify.
        linear_head: True where that is a linear layer, which all tasks share and no projection protects.
        finished: a sentence about parts that never move once their task is over; empty if all parts keep learning.
        base_class: the class of transformers that loads the backbone.
        scores: the attribute of the model's output that holds a score for each class.
        from_peft: True for an adapter of PEFT itself, whose backbone is loaded with a head for the run's classes.
    """

    parts: str
    prompts: bool = True
    selects: bool | None = None
    features: str = "the features that the trained head reads"
    head: str = "trained with the adapter"
    trained_head: str = "the trained head"
    linear_head: bool = False
    finished: str = ""
    base_class: str = "AutoModelForImageClassification"
    scores: str = "logits"
    from_peft: bool = False


def entries(settings: Mapping[str, Any]) -> str:
    """Return the size of a pool as a card shows it, with the entries that came later."""
    added = settings.get("added_entries")
    return str(settings["pool_size"] + added) if added and "pool_size" in settings else setting(settings, "pool_size")


def setting(settings: Mapping[str, Any], name: str) -> str:
    """Return a setting as a card shows it, a dash if it is not recorded."""
    value = settings.get(name)
    return "–" if value is None else str(value)
