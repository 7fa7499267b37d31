"""Runs that the tests kill: each begins anew, or goes on with what its folder holds, by the same call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

from pgp_hf import PGPTrainer, ProjectionConfig, StreamTrainer, TaskStream, methods
from pgp_hf.runs.folder import RunFolder

Story = Callable[[Path], object]  # trains in the folder that it is given
FEW = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 3}  # of four steps


def begun(folder: Path) -> bool:
    """Return whether a run has left anything in a folder."""
    return folder.exists() and any(folder.iterdir())


def known(
    folder: Path,
    adapter: str = "l2p",
    model: dict[str, Any] | None = None,
    resume: bool | None = None,
    **settings: Any,
) -> StreamTrainer:
    """Learn a stream that is known in advance; by default, go on with what the folder holds."""
    settings = {**FEW, **settings}
    resume = begun(folder) if resume is None else resume
    if (made := settings.pop("make", None)) is None:
        settings["model"] = tiny.model(adapter, **(model or {}))
    else:
        settings["model"] = made()
    if "method" in settings:
        settings["method"] = methods.create(settings["method"], **settings.pop("options", {}))
    trainer = tiny.trainer(folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def surprises(folder: Path) -> StreamTrainer:
    """Learn a stream that nobody knew, class by class; a later start goes on with the newest task."""
    data, classes = tiny.data(), [(0, 1), (2, 3), (4, 5)]
    parts = [data.filter(lambda label, own=own: label in own, input_columns="label") for own in classes]
    args = tiny.arguments(folder, compensate_drift=True, **FEW)
    done = RunFolder(folder).finished_tasks()
    if done:
        trainer = PGPTrainer.from_pretrained(folder, args=args, test_dataset=data["test"])
    else:
        tiny.backbone("backbone").save_pretrained(folder.parent / "backbone")
        model = tiny.model(head="statistics", kind="backbone")
        model.base_model.adapter_config.base_model_name_or_path = str(folder.parent / "backbone")
        trainer = PGPTrainer(model, args, TaskStream.empty(seed=0), processing_class=tiny.processor())
    for part in parts[done:]:
        trainer.learn(part, resume_from_checkpoint=True)
    return trainer


STORIES: dict[str, Story] = {
    "l2p": known,
    "dualprompt": lambda folder: known(
        folder,
        "dualprompt",
        {"head": "statistics"},
        compensate_drift=True,
        projection=ProjectionConfig(method="functional", energy=0.9, max_images=8, probes=2),
    ),
    "clip": lambda folder: known(folder, "clip"),
    "ewc": lambda folder: known(folder, make=tiny.plain, method="ewc", options={"strength": 300.0}),
    "derpp": lambda folder: known(
        folder, make=tiny.plain, method="derpp", options={"memory_size": 9, "memory_stores": "images"}
    ),
    "surprises": surprises,
}
