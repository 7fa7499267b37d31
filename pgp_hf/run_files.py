"""What a trainer writes when a task ends, and how a run goes on from it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import load_peft_weights, set_peft_model_state_dict

from . import artifacts, model_card, plots
from .artifacts import RunFolder
from .evaluation import StreamResults
from .projection import Projection
from .stream import TaskStream


class RunFiles:
    """The part of `PGPTrainer` that reads and writes its output folder."""

    folder: RunFolder
    results: StreamResults
    projection: Projection
    stream: TaskStream
    task: int | None
    _features: dict[int, np.ndarray]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder.checkpoints(self.task)) if self.task is not None else super()._get_output_dir(trial)

    def _write_task(self, t: int) -> None:
        if self.is_world_process_zero():
            features = torch.from_numpy(np.ascontiguousarray(self._features[t]))
            artifacts.write_tensors(self.folder.features(t), {"features": features})
            self.folder.publish(t, self._write_files)
            shutil.rmtree(self.folder.checkpoints(t).parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _write_files(self, folder: Path) -> None:
        """The files of the contract, as they stand now."""
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, save_embedding_layers=False)  # else it asks the Hub for the base's config
        if hasattr(self.processing_class, "save_pretrained"):
            self.processing_class.save_pretrained(folder)
        bases, description = self.projection.state()
        results, manifest = self.results.to_dict(), self.stream.manifest()
        artifacts.write_tensors(folder / artifacts.BASES, bases)
        artifacts.write_json(folder / artifacts.DESCRIPTION, description)
        artifacts.write_json(folder / artifacts.MANIFEST, manifest)
        artifacts.write_json(folder / artifacts.RESULTS, results)
        plots.save_figures(results, folder / "figures")
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        model_card.save_card(folder / "README.md", results, manifest, adapter, description)

    def _start(self, resume: str | bool | None) -> tuple[int, str | None]:
        """Index of the first task to train, and the checkpoint to enter it by."""
        if self.results.matrix and not resume:
            raise ValueError(
                f"this trainer has trained {len(self.results.matrix)} tasks already: go on with "
                "train(resume_from_checkpoint=True) or train_task, or make a new trainer."
            )
        if not resume:
            if self.is_world_process_zero():
                if self.args.overwrite_output_dir:
                    self.folder.clear()
                else:
                    self.folder.check_unused()
            self.accelerator.wait_for_everyone()
            return 0, None
        source = self.folder if resume is True else RunFolder(resume)
        elsewhere = source.root.resolve() != self.folder.root.resolve()
        if elsewhere and self.is_world_process_zero():
            self.folder.clear() if self.args.overwrite_output_dir else self.folder.check_unused()
        finished = source.finished_tasks()
        if finished:
            if not self.args.reinit_optimizer and finished < self.stream.num_tasks:
                raise ValueError(
                    "reinit_optimizer=False carries the optimizer's state from task to task, which finished tasks do "
                    "not keep: such a run cannot be resumed exactly. Start anew, or use reinit_optimizer=True."
                )
            self._load_task(source, finished - 1)
            if self.is_world_process_zero():
                if elsewhere:
                    self.folder.adopt(source, finished)
                self.folder.promote(finished - 1)  # a run may have died before it came to that
            self.accelerator.wait_for_everyone()
        checkpoint = source.last_checkpoint(finished) if finished < self.stream.num_tasks else None
        if not finished and checkpoint is None:
            warnings.warn(f"{source.root} holds no run to resume: starting with the first task.", stacklevel=3)
        return finished, None if checkpoint is None else str(checkpoint)

    def _load_task(self, source: RunFolder, t: int) -> None:
        """Take over the state that the run in `source` had when task t ended."""
        folder = source.task(t)
        self.stream.check_manifest(artifacts.read_json(folder / artifacts.MANIFEST))
        self.results.load(artifacts.read_json(folder / artifacts.RESULTS))
        description = artifacts.read_json(folder / artifacts.DESCRIPTION)
        for name, value in self.projection.config.to_dict().items():
            if description.get(name) != value:
                raise ValueError(
                    f"the run in {source.root} has projection {name}={description.get(name)!r}, this one {value!r}: "
                    "continue with the same projection."
                )
        self.projection.load_state(artifacts.read_tensors(folder / artifacts.BASES), description)
        model = self.accelerator.unwrap_model(self.model)
        adapter = model.active_adapter
        saved = artifacts.read_json(folder / "adapter_config.json")
        for name, value in self.tuner.adapter_config.settings().items():
            if saved.get(name) != value:
                raise ValueError(
                    f"the adapter in {folder} has {name}={saved.get(name)!r}, this one {value!r}: continue with the same."
                )
        weights = load_peft_weights(str(folder), device=str(self.args.device))
        problems = set_peft_model_state_dict(model, weights, adapter_name=adapter)
        if problems.unexpected_keys:
            raise ValueError(
                f"{folder} holds parameters that this model lacks: {problems.unexpected_keys[0]} and others."
            )
        self._features = {j: artifacts.read_tensors(source.features(j))["features"].numpy() for j in range(t + 1)}
        self.task = t
        self.tuner.resume_after(t)
        self.eval_dataset = self._test_sets(t)
