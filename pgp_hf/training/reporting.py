"""Methods of a `Trainer` that report on a run, so that scripts made for one find them as they expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..report import card
from ..runs.atomic import replacing
from ..runs.digests import CARD
from ..runs.folder import DESCRIPTION, MANIFEST, RESULTS, config_name
from ..runs.reading import read_json
from .checkpoints import CheckpointTrainer


class ReportingTrainer(CheckpointTrainer):
    """A `Trainer` of a stream whose reports are those of the stream."""

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print metrics as a `Trainer` does: of `train().metrics`, the content of `results.json`, those that are one value."""
        lines = {name: value for name, value in metrics.items() if isinstance(value, str | int | float)}
        if lines:
            super().log_metrics(split, lines)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as a `Trainer` does, together with the method's state; nothing is uploaded.

        A run's folder keeps its card, of which PEFT would make another.

        Raises:
            ValueError: the run's own folder, while the model is not that of the last finished task, which lies there.
        """
        folder = Path(output_dir or self.folder.root)
        if self.args.should_save and folder.resolve() == self.folder.root.resolve():
            self._check_finished()
        path = folder / CARD
        before = path.read_bytes() if path.is_file() else None
        super().save_model(output_dir, _internal_call)
        if before is not None and self.args.should_save:
            with replacing(path) as part:
                part.write_bytes(before)

    def _check_finished(self) -> None:
        """Raise ValueError unless the model is that of the last finished task in the run's folder."""
        finished = self.folder.finished_tasks()
        if self.progress.interrupted or self.task is None or self.task + 1 != finished:
            newest = f"the state after task {finished}" if finished else "the state after each finished task"
            raise ValueError(
                f"output_dir={self.folder.root} is the run's own folder, for {newest}, and the model is in another one: "
                "pass another folder, as in save_model(folder). Finished tasks are in task-1, task-2, ... already."
            )

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of the last finished task again, with a language, a license or further tags in its metadata.

        Raises:
            ValueError: no task is finished; any other argument, since the card has it from the run.
        """
        known = {
            "model_name": model_name,
            "finetuned_from": finetuned_from,
            "tasks": tasks,
            "dataset_tags": dataset_tags,
            "dataset": dataset,
            "dataset_args": dataset_args,
        }
        if given := [name for name, value in known.items() if value is not None]:
            raise ValueError(f"the card has {' and '.join(given)} from the run itself: leave them out.")
        if not self.folder.finished_tasks():
            raise ValueError("there is no card before a task is finished, whose results it describes: train() first.")
        if not self.is_world_process_zero():
            return
        root = self.folder.root
        contents = [read_json(root / name) for name in (RESULTS, MANIFEST, config_name(root), DESCRIPTION)]
        path = card.save_card(root / CARD, *contents)
        made = ModelCard.load(path)
        made.data.language = language or made.data.language
        made.data.license = license or made.data.license
        made.data.tags = [*(made.data.tags or []), *([tags] if isinstance(tags, str) else tags or [])] or None
        with replacing(path) as part:
            part.write_text(str(made), encoding="utf-8", newline="\n")
