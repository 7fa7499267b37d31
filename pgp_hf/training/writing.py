"""Writing the files of a task that has ended."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..methods import ContinualMethod
from ..projection import Projection, ProjectionConfig
from ..report import card, figures
from ..runs.atomic import write_json, write_tensors
from ..runs.folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    BASES,
    DESCRIPTION,
    MANIFEST,
    METHOD,
    METHOD_STATE,
    RESULTS,
)
from ..runs.reading import read_json, sha256


def write_task(
    folder: Path,
    *,
    model: PeftModel,
    method: ContinualMethod,
    processor: Any,
    results: dict[str, Any],
    manifest: dict[str, Any],
    digest: dict[str, str],
) -> None:
    """Write the files of a task that has just ended into `folder`.

    Args:
        processor: the image processor; one that cannot be saved is left out.
        results: content of `results.json`, to which the files' digests are added.
        manifest: content of `stream.json`.
        digest: of the frozen weights, by the names that `results.json` has.
    """
    model.save_pretrained(
        str(folder), save_embedding_layers=False
    )  # otherwise PEFT asks the Hub for the base model's configuration
    if hasattr(processor, "save_pretrained"):
        processor.save_pretrained(folder)
    projection = method.projection or Projection(ProjectionConfig(method="none"))
    bases, description = projection.state()
    write_tensors(folder / BASES, bases)
    write_json(folder / DESCRIPTION, description)
    write_json(folder / MANIFEST, manifest)
    write_method(folder, method)
    digests = {name: sha256(folder / name) for name in (ADAPTER, BASES, METHOD_STATE)}
    results = {**results, "sha256": {**digests, **digest}}
    write_json(folder / RESULTS, results)
    figures.save_figures(results, folder / "figures")
    adapter = read_json(folder / ADAPTER_CONFIG)
    base = adapter.get("base_model_name_or_path")
    if base and os.path.isdir(base):  # absolute, since a relative path read elsewhere may look like a Hub id
        adapter["base_model_name_or_path"] = os.path.abspath(base)
        write_json(folder / ADAPTER_CONFIG, adapter)
    card.save_card(folder / "README.md", results, manifest, adapter, description)


def write_method(folder: Path, method: ContinualMethod) -> None:
    """Write a method's name, settings, card and current state."""
    state = method.state()
    write_tensors(folder / METHOD_STATE, state.tensors)
    content = {
        "name": method.name,
        "settings": method.settings(),
        "state": state.values,
        "card": asdict(method.describe()),
        # prediction needs such a method, any other does without
        "adjusts_logits": type(method).adjust_logits is not ContinualMethod.adjust_logits,
    }
    write_json(folder / METHOD, content)
