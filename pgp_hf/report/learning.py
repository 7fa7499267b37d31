"""Describe for a model card how a run learned its tasks, by the bases of its projection or by its method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .formatting import as_number, as_sentence, as_settings, as_text, one_line
from .table import markdown

if TYPE_CHECKING:
    from ..tuners.base.card import AdapterCard

PROJECTED_PROMPTS = "projected_prompts"  # the method whose cards are written from `projection.json`
_KEPT = {  # by projection: what the update rule keeps, and what it does not
    "pgp": (
        "prompts moved orthogonally to the tokens, queries and prompts that earlier tasks had shown them (prompt "
        "gradient projection, ICLR 2024)",
        "The projection covers the products of prompts with old tokens or queries at the point where the prompts enter "
        "the network. It does not cover the value path of inserted tokens, the residual stream, LayerNorm or deeper "
        "layers; the drift above is what remains.",
    ),
    "attention": (
        "prompts moved so that the attention which they enter first stayed as it was for old images (visual prompt "
        "tuning in null space, NeurIPS 2024)",
        "The projection covers the attention that the prompts enter first, provided that the LayerNorm statistics of "
        "prompt tokens stay the same, which it cannot enforce. It does not cover the residual stream or deeper layers; "
        "the drift above is what remains.",
    ),
    "functional": (
        "prompts moved orthogonally to the directions that would change what the head reads of old images, through the "
        "whole network and to first order",
        "The projection holds to first order, along sampled directions, and only while an image selects the same "
        "prompts: long steps and changed selections still move old features.",
    ),
    "frozen": (
        "the prompts and keys that all tasks share learned from the first task only",
        "Whatever later tasks needed of the shared prompts was never learned.",
    ),
}
_PROJECTED = {"gradient": "gradients", "both": "gradients and updates"}  # by `apply_to`


class Learning(NamedTuple):
    """The statements of a model card on how the tasks were learned.

    Attributes:
        name: part of the model's name; None where nothing was done for older tasks.
        title: of the method; None for projected prompts.
        text: a paragraph on what was done.
        method: its registered name and settings, as code; None for projected prompts.
        citation: of the method's paper; None for none.
        projection: the projection's settings, as code; None for a method that has none.
        bases: the table of protected parameters; None where nothing was protected.
        limits: what the method does not guarantee, a sentence each.
        keeps_no_images: whether no image of an older task was kept.
        adjusts: whether the method corrects the model's scores.
        shared: whether all tasks share what learned.
    """

    name: str | None
    title: str | None
    text: str
    method: str | None
    citation: str | None
    projection: str | None
    bases: str | None
    limits: Sequence[str]
    keeps_no_images: bool
    adjusts: bool = False
    shared: bool = True


def describe_learning(
    config: Mapping[str, Any],
    adapter: AdapterCard,
    projection: Mapping[str, Any] | None,
    method: Mapping[str, Any] | None,
) -> Learning:
    """Describe how the tasks were learned.

    Args:
        config: content of `adapter_config.json`, or of a whole model's `config.json`.
        adapter: description of the adapter, or of what learned of a whole model.
        projection: content of `projection.json`, None for a run without projection.
        method: content of `method.json`, None for projected prompts.
    """
    content = projection or {}
    entries = {name: entry for name, entry in content.items() if isinstance(entry, Mapping)}
    settings = {name: value for name, value in content.items() if name not in entries}
    if method is None or method.get("name") == PROJECTED_PROMPTS:
        return _projected(config, adapter, settings, entries)
    card, name, own = method.get("card") or {}, str(method.get("name")), method.get("settings")
    title = one_line(card.get("title") or name)
    sentences = [as_sentence(card.get("sentence") or ""), adapter.finished]
    return Learning(
        name=name,
        title=title,
        text=" ".join(filter(None, sentences)),
        method=f"`{name}` ({as_settings(own)})" if own else f"`{name}`",
        citation=one_line(card["citation"]) if card.get("citation") else None,
        projection=as_settings(settings) if entries else None,
        bases=_bases(entries),
        limits=[as_sentence(limit) for limit in card.get("limits") or []],
        keeps_no_images=False,
        adjusts=bool(method.get("adjusts_logits")),
        shared=bool(card.get("shared", True)),  # which earlier versions did not note
    )


def _projected(
    config: Mapping[str, Any],
    adapter: AdapterCard,
    settings: Mapping[str, Any],
    entries: Mapping[str, Mapping[str, Any]],
) -> Learning:
    """Describe projected prompts by the bases that were written."""
    rule = str(settings.get("method") or "none")
    projection = as_settings(settings)
    if entries:
        text, limits = _update_rule(rule, settings, entries), _limits(rule, settings, config, adapter)
    elif rule != "none":
        text = f"No update was projected: the adapter has nothing that the projection (`{rule}`) protects."
        limits, projection = [], f"{projection}; without effect"
    else:
        apart = ": only the selection of prompts by their keys keeps tasks apart" if adapter.selects else ""
        text, limits, projection = f"Updates were not projected{apart}.", [], "none"
    return Learning(
        name=rule if entries else None,
        title=None,
        text=f"{text} {adapter.finished}".rstrip(),
        method=None,
        citation=None,
        projection=projection,
        bases=_bases(entries),
        limits=limits,
        keeps_no_images=True,
    )


def _update_rule(rule: str, settings: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe the updates that were projected, and what that kept."""
    projected = _PROJECTED.get(str(settings.get("apply_to")), "updates")
    kept = [_KEPT[rule][0]] if rule in _KEPT else []
    if any(entry.get("role") == "key" for entry in entries.values()):
        kept.append("keys moved orthogonally to old queries")
    told = f": {'; '.join(kept)}" if kept else ""
    return f"From the second task on, the {projected} of the prompts that all tasks share were projected (`{rule}`){told}."


def _limits(rule: str, settings: Mapping[str, Any], config: Mapping[str, Any], adapter: AdapterCard) -> list[str]:
    """Return sentences on what the projection does not guarantee."""
    limits = [_KEPT[rule][1]] if rule in _KEPT else []
    if rule == "frozen":
        return limits
    limits.append(
        "The projection protects what earlier training images showed, up to the energies above, and not every image of "
        "their classes."
    )
    if adapter.linear_head and config.get("head") != "statistics":
        limits.append(
            "The linear head is not projected: it kept learning, so that its scores for old classes change even where the "
            "features do not."
        )
    if settings.get("apply_to") == "gradient":
        limits.append("Only gradients were projected: Adam and weight decay lead out of the null space.")
    return limits


def _bases(entries: Mapping[str, Mapping[str, Any]]) -> str | None:
    rows = []
    for name, entry in entries.items():
        shape = entry.get("shape") or []
        rank = as_number(entry.get("rank"), 0) + (f" of {shape[-1]}" if shape else "")
        rows.append([f"`{name}`", rank, as_text(entry.get("energy")), as_text(entry.get("samples"))])
    header = ["Parameter", "Protected rank", "Energy", "Samples"]
    return markdown([header, *rows], left=("Parameter",)) if rows else None
