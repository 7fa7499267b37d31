"""What a trainer writes when a task ends, and what goes to the Hub of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import hub
from ..report import card as model_card
from ..report import figures as plots
from ..runs import reading
from ..runs.atomic import write_json, write_tensors
from ..runs.digest import backbone_key, backbone_sha256
from ..runs.folder import ADAPTER, BASES, DESCRIPTION, MANIFEST, RESULTS
from .resume import ContinuedRuns


class RunFiles(ContinuedRuns):
    """The part of `PGPTrainer` that writes its output folder and uploads it; reading is that of its base."""

    _digest: dict[str, str] | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder.checkpoints(self.task)) if self.task is not None else super()._get_output_dir(trial)

    def _write_task(self, t: int) -> None:
        if self.is_world_process_zero():
            self._write_reference(t)
            self.folder.publish(t, self._write_files)
            shutil.rmtree(self.folder.checkpoints(t).parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _write_reference(self, t: int) -> None:
        """What drift is measured against later: how the test images of task t were seen when it ended."""
        kept = {"features": self._features, "selected": self._selected}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(of[t])) for name, of in kept.items() if t in of}
        write_tensors(self.folder.features(t), tensors)

    def _write_files(self, folder: Path) -> None:
        """The files of the contract, as they stand now."""
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, save_embedding_layers=False)  # else it asks the Hub for the base's config
        if hasattr(self.processing_class, "save_pretrained"):
            self.processing_class.save_pretrained(folder)
        bases, description = self.projection.state()
        results, manifest = self.results.to_dict(), self.stream.manifest()
        write_tensors(folder / BASES, bases)
        write_json(folder / DESCRIPTION, description)
        write_json(folder / MANIFEST, manifest)
        digests = {name: reading.sha256(folder / name) for name in (ADAPTER, BASES)}
        digests |= self._backbone_digest()
        write_json(folder / RESULTS, {**results, "sha256": digests})
        plots.save_figures(results, folder / "figures")
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = adapter.get("base_model_name_or_path")
        if base and os.path.isdir(base):  # from here on it is read elsewhere: a relative path may look like a Hub id
            adapter["base_model_name_or_path"] = os.path.abspath(base)
            write_json(folder / "adapter_config.json", adapter)
        model_card.save_card(folder / "README.md", results, manifest, adapter, description)

    def _backbone_digest(self) -> dict[str, str]:
        """The frozen backbone's digest by the name it is kept under, computed once; nothing for sharded weights."""
        if self._digest is None:
            base = self.tuner.model
            digest = backbone_sha256(base, self.tuner.adapter_config.modules_to_save)
            self._digest = {} if digest is None else {backbone_key(base): digest}
        return self._digest

    # A `Trainer` would upload checkpoints, optimizer state and whatever else lies in `output_dir`; these replace it.

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Take the repository's id. It is made by the first upload: a Hub out of reach must not stop a training."""
        self.hub_model_id = self.args.hub_repo().repo_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints stay here; `callbacks.PushTasks` uploads finished tasks."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As a `Trainer`'s, but nothing is uploaded by it."""
        super().save_model(output_dir, _internal_call=True)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> hub.Pushed | None:
        """Upload the finished tasks that are not on the Hub yet, each as a commit on `main` and a tag; see `hub.push`.

        Args:
            token, private: instead of those in `args`.
            commit_message, kwargs: not used: each task has its own message and card.

        Returns:
            What was uploaded; None on other processes than the main one.

        Raises:
            ValueError: no task is finished, `blocking=False`, another revision than main.
            hub.PushError: tasks that could not be uploaded, with the command that finishes it.
        """
        if not blocking or revision not in (None, "main"):
            raise ValueError(
                f"blocking={blocking}, revision={revision!r}: tasks go to main and to tags, and in the background by "
                "push_to_hub=True in the training arguments; leave both out."
            )
        if not self.is_world_process_zero():
            return None
        repo = self.args.hub_repo()
        token, private = token or repo.token, repo.private if private is None else private
        return hub.push(self.folder.root, repo.repo_id, token=token, private=private, base_model=repo.base_model)
