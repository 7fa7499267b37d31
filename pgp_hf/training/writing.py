"""Write the files of a task that has ended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from .. import embedded
from ..backbones.loading import errors_only
from ..data.stored import to_tensors
from ..methods import ContinualMethod
from ..models import stream_model
from ..projection import Projection, ProjectionConfig
from ..report import card, figures
from ..runs.atomic import write_json, write_tensors
from ..runs.digests import Digests
from ..runs.folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    BASES,
    DESCRIPTION,
    EXEMPLARS,
    MANIFEST,
    METHOD,
    METHOD_STATE,
    MODEL,
    MODEL_CONFIG,
    RESULTS,
    RunFolder,
)
from ..runs.reading import read_json, sha256, tensor_shapes
from ..tuners.base import PromptTuner
from .arguments import PGPTrainingArguments
from .progress import Progress


def write_task(
    folder: Path,
    *,
    model: PeftModel | PreTrainedModel,
    method: ContinualMethod,
    processor: Any,
    progress: Progress,
    manifest: dict[str, Any],
    digest: dict[str, str],
    features: Path | None = None,
    earlier: Sequence[Path] | None = None,
) -> None:
    """Write the files of a task that has just ended into `folder`, their digests last.

    Args:
        processor: the image processor; one that cannot be saved is left out.
        progress: with the content of `results.json`, to which the files' digests are added, and stored images.
        manifest: content of `stream.json`.
        digest: of the frozen weights, by the names that `results.json` has.
        features: the file with those of the task's test images, as far as there are any.
        earlier: folders of the tasks before, where figures are drawn; None for no figures.
    """
    file, config = write_model(folder, model)
    if hasattr(processor, "save_pretrained"):
        processor.save_pretrained(folder)
    projection = method.projection or Projection(ProjectionConfig(method="none"))
    bases, description = projection.state()
    write_tensors(folder / BASES, bases)
    write_json(folder / DESCRIPTION, description)
    write_json(folder / MANIFEST, manifest)
    write_method(folder, method)
    written = [file, BASES, METHOD_STATE]
    if method.stores_images:
        write_exemplars(folder / EXEMPLARS, to_tensors(progress.stored))
        written.append(EXEMPLARS)
    digests = {name: sha256(folder / name) for name in written}
    results = {**progress.results.to_dict(), "sha256": {**digests, **digest}}
    write_json(folder / RESULTS, results, rows=True)
    if earlier is not None:
        figures.save_figures(results, folder / "figures", manifest, [*earlier, folder])
    card.save_card(folder / "README.md", results, manifest, config, description)
    Digests.of(folder, features, known=digests).write()


def folders_to_draw(args: PGPTrainingArguments, run: RunFolder, t: int, num_tasks: int) -> list[Path] | None:
    """Return the folders of the tasks before the 0-based task t if figures are drawn when it ends; else None."""
    drawn = {"each": True, "last": t == num_tasks - 1, "none": False}[args.figures]
    return [run.task(k) for k in range(t)] if drawn else None


def write_model(folder: Path, model: PeftModel | PreTrainedModel) -> tuple[str, dict[str, Any]]:
    """Write a model's weights and description; return the name of the file with the weights, and the description."""
    if isinstance(model, PeftModel):
        # otherwise PEFT asks the Hub for the base model's configuration
        model.save_pretrained(str(folder), save_embedding_layers=False)
        file, path = ADAPTER, folder / ADAPTER_CONFIG
        config = read_json(path)
        base = config.get("base_model_name_or_path")
    else:
        with errors_only(bars=False):
            model.save_pretrained(str(folder), max_shard_size="1000GB")  # a single file
        file, path = MODEL, folder / MODEL_CONFIG
        config = read_json(path)
        base = model.name_or_path
    if base:
        # absolute, since a relative path read elsewhere may look like a Hub id
        named = embedded.name_of(base) or (os.path.abspath(base) if os.path.isdir(base) else base)
        if config.get("base_model_name_or_path") != named:
            config["base_model_name_or_path"] = named
            write_json(path, config)
    return file, config


def load_image_size(model: PeftModel | PreTrainedModel, folder: Path) -> None:
    """Give prompts the size of the images that they were trained on, as the adapter in a folder has noted it."""
    learner = stream_model(model)
    if isinstance(learner, PromptTuner):
        learner.adapter_config.image_size = read_json(folder / ADAPTER_CONFIG).get("image_size")


def write_exemplars(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write stored images.

    Raises:
        ValueError: more of them than can be read again.
    """
    write_tensors(path, tensors)
    try:
        tensor_shapes(path)
    except ValueError as error:
        raise ValueError(
            f"memory_stores='images' does not work for these {len(tensors)} images, which could not be read again: "
            f"{error} Keep fewer or smaller ones, or memory_stores='places'."
        ) from error


def write_method(folder: Path, method: ContinualMethod) -> None:
    """Write a method's name, settings, card and current state."""
    state = method.state()
    write_tensors(folder / METHOD_STATE, state.tensors)
    content = {
        "name": method.name,
        "settings": method.settings(),
        "state": state.values,
        "card": asdict(method.describe()),
        "adjusts_logits": method.adjusts_logits,  # prediction needs such a method, any other does without
    }
    write_json(folder / METHOD, content)
