"""Write checkpoints within a task, of safetensors and JSON alone, and go on from one exactly as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..backbones.loading import errors_only
from ..data.stream import TaskStream
from ..inference.whole import open_whole
from ..methods import ContinualMethod, MethodState
from ..models import StreamModel, load_weights, stream_model
from ..runs import checkpoint as files
from ..runs.atomic import write_json, write_tensors
from ..runs.folder import ADAPTER, MANIFEST, RunFolder
from ..runs.reading import read_json, read_tensors
from ..runs.revision import read_method
from ..runs.states import encode, read_state, write_state
from .accelerating import OwnState
from .arguments import PGPTrainingArguments
from .callbacks import ends_epoch
from .optimizer_state import check_optimizer_state, load_optimizer, note_learning_rates, optimizer_state, plain
from .progress import Progress
from .random_states import gather_random_states, scatter_random_states
from .results import StreamResults
from .settings import run_settings
from .writing import load_image_size, write_method, write_model


@dataclass
class Place:
    """The place of training within its epochs.

    Attributes:
        epoch: 0-based.
        start: number of steps before it.
        over: True at its end.
    """

    epoch: int
    start: int
    over: bool = False


class SaveAtTheEnd(TrainerCallback):
    """Follow the place of training, and save at the end of an epoch what its last step would have saved.

    What comes after that step, such as an evaluation, then lies before the checkpoint, and is not lost when training goes
    on from it.

    Args:
        check: called when the optimizer has made what it keeps.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.check, self.place, self.waits = check, Place(0, 0), False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.waits = False

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.place.over:
            self.place = Place(self.place.epoch + 1, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 1:
            self.check()
        if control.should_save and ends_epoch(state, control):
            control.should_save, self.waits = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.place.over = True
        control.should_save, self.waits = control.should_save or self.waits, False


class CheckpointTrainer(Trainer):
    """A `Trainer` of a stream whose checkpoints are read and written without pickle, each checked by its digests."""

    args: PGPTrainingArguments
    model: nn.Module
    optimizer: Any  # accelerate's around torch's, while a task trains
    lr_scheduler: Any
    state: Any  # transformers annotates the states of callbacks as a list, which are a dictionary
    stream: TaskStream
    method: ContinualMethod
    folder: RunFolder
    progress: Progress
    _whole: tuple[nn.Module, PeftModel | PreTrainedModel] | None = None  # the model, and what is inside its wrappers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._own_state = OwnState()
        super().__init__(*args, **kwargs)
        self._saves = SaveAtTheEnd(self._check_states)
        self.add_callback(self._saves)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as a `Trainer` does, and keep its state."""
        with self._own_state.making(self.args.mixed_precision):
            super().create_accelerator_and_postprocess()

    @property
    def stream_model(self) -> StreamModel:
        """Return what learns: the prompt tuner inside the `PeftModel`, or the adapter around a plain model."""
        return stream_model(self._whole_model())

    @property
    def results(self) -> StreamResults:
        """Return the `StreamResults` so far."""
        return self.progress.results

    @property
    def task(self) -> int | None:
        """Return the 0-based index of the task in training or trained last; None before the first."""
        return self.progress.task

    @task.setter
    def task(self, task: int | None) -> None:
        self.progress.task = task

    def _whole_model(self) -> PeftModel | PreTrainedModel:
        if self._whole is None or self._whole[0] is not self.model:  # unwrapping looks for packages on the disk
            self._whole = self.model, self.accelerator.unwrap_model(self.model)
        return self._whole[1]

    # ---- writing -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as a `Trainer` does, together with the method's state; nothing is uploaded."""
        with errors_only(bars=False):
            super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the model; a `Trainer` would also pickle its arguments, with the Hub's token among them."""
        if self.args.should_save:
            folder = Path(output_dir or self.folder.root)
            folder.mkdir(parents=True, exist_ok=True)
            self._write_model(folder)

    def _write_model(self, folder: Path) -> None:
        with errors_only(bars=False):
            write_model(folder, self._whole_model())
        processor: Any = self.processing_class
        if hasattr(processor, "save_pretrained"):
            processor.save_pretrained(folder)
        write_method(folder, self.method)

    def _check_states(self) -> None:
        """Raise ValueError if something has state that a checkpoint cannot hold, or an optimizer is about to."""
        try:
            check_optimizer_state(plain(self.optimizer))
            encode(self.lr_scheduler.state_dict(), "scheduler")
        except ValueError as error:
            raise ValueError(
                f"a checkpoint cannot keep the state of {type(plain(self.optimizer)).__name__} with "
                f"{type(self.lr_scheduler).__name__}: {error}. Choose another optimizer or scheduler."
            ) from error
        for name, state in self._callback_states().items():
            try:
                json.dumps(state)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"a checkpoint cannot keep the state of the callback {name}: {error}. Return from its state() what "
                    "JSON can hold."
                ) from error

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create the schedule as a `Trainer` does, and note the learning rates that it begins with."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        # a schedule that follows a metric does not, and a checkpoint has the rates that it has lowered
        note_learning_rates(plain(optimizer or self.optimizer))
        return schedule

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._check_states()
        return prepared

    def _save_checkpoint(self, model: nn.Module, trial: Any, with_states: bool = False) -> None:
        """Write a checkpoint, whole or not at all, and delete those that are not needed any more.

        Args:
            with_states: also write what training goes on with where `save_only_model` leaves it out.
        """
        self.store_flos()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        states = gather_random_states(self.accelerator)
        best = self._best(folder)
        if self.is_world_process_zero():
            self._publish(folder, states if with_states or not self.args.save_only_model else None, best)
            self._rotate(folder, best)
        self.accelerator.wait_for_everyone()

    def _best(self, folder: Path) -> Path | None:
        """Return the best checkpoint, which may be the one to be written, and note it as a `Trainer` does."""
        step = self.state.best_global_step
        if step and (step == self.state.global_step or folder.with_name(f"checkpoint-{step}").is_dir()):
            self.state.best_model_checkpoint = str(folder.with_name(f"checkpoint-{step}"))
        return None if self.state.best_model_checkpoint is None else Path(self.state.best_model_checkpoint)

    def _publish(self, folder: Path, states: Mapping[str, Tensor] | None, best: Path | None) -> None:
        """Write the files into a folder that takes its name when it is complete."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        best = best if self.args.load_best_model_at_end else None
        if best is not None and best.parent != folder.parent:  # of the run that this one goes on from
            shutil.copytree(best, folder.with_name(best.name), dirs_exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self._write_checkpoint(temporary, states)
            files.seal(temporary, None if best is None else best.name)
            temporary.chmod(0o755)  # mkdtemp makes it private
            if folder.exists():  # from another time that this step was reached
                files.delete_checkpoint(folder)
            if not folder.exists():
                os.replace(temporary, folder)
            for file in sorted(temporary.glob("*"), key=lambda file: file.name == files.SEAL):  # it holds other files
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_checkpoint(self, folder: Path, states: Mapping[str, Tensor] | None) -> None:
        """Write the files of a checkpoint.

        Args:
            states: of the random number generators; None to leave out these and the states of optimizer and schedule.
        """
        self._write_model(folder)
        if self.task is not None:  # a checkpoint belongs to these tasks alone
            write_json(folder / MANIFEST, self.stream.manifest(self.results.num_tasks))
        if states is not None:
            write_state(folder, files.OPTIMIZER, optimizer_state(plain(self.optimizer)))
            write_state(folder, files.SCHEDULER, self.lr_scheduler.state_dict())
            if (scaler := getattr(self.accelerator, "scaler", None)) is not None:
                write_state(folder, files.SCALER, scaler.state_dict())
            write_tensors(folder / files.RANDOM, dict(states))
        self.state.stateful_callbacks = self._callback_states()
        try:
            self.state.save_to_json(str(folder / files.TRAINER_STATE))
        except TypeError as error:
            raise ValueError(f"a checkpoint cannot keep what was logged, which JSON cannot hold: {error}.") from error
        write_json(folder / files.SETTINGS, run_settings(self.args, self.method, self.stream_model))
        place = self._saves.place
        place = Place(place.epoch + 1, self.state.global_step) if place.over else place
        progress = {
            **self.progress.counted(),
            "ended": self.control.should_training_stop,
            "best": None if self.state.best_model_checkpoint is None else Path(self.state.best_model_checkpoint).name,
            "epoch": place.epoch,
            "step": self.state.global_step - place.start,
            # which `auto_find_batch_size` may have lowered
            "batch_size": self._train_batch_size,
            "images_per_step": self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
        }
        write_json(folder / files.PROGRESS, progress)

    def _rotate(self, newest: Path, best: Path | None) -> None:
        """Delete checkpoints that belong to steps still to come, and the oldest ones beyond `save_total_limit`."""
        found = [folder for folder in files.checkpoints(newest.parent) if folder != best]
        later = [folder for folder in found if (files.step_of(folder) or 0) > self.state.global_step]
        earlier = found[len(later) :]
        limit = self.args.save_total_limit or 0
        beside = limit if best in (None, newest) else limit - 1
        for folder in [*later, *(earlier[max(beside, 1) :] if limit > 0 else ())]:
            files.delete_checkpoint(folder)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder.checkpoints(self.task)) if self.task is not None else super()._get_output_dir(trial)

    # ---- reading -------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        files.check_checkpoint(Path(resume_from_checkpoint))
        self._load_model(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            folder = Path(self.state.best_model_checkpoint)
            try:
                files.check_files(folder)
            except ValueError as error:
                raise ValueError(
                    f"the best checkpoint cannot be loaded: {error}. Go on by train(resume_from_checkpoint=True), which "
                    "trains again from before it."
                ) from error
            self._load_model(folder)

    def _load_model(self, folder: Path) -> None:
        """Give the model and the method what they were at a checkpoint."""
        whole = self._whole_model()
        if isinstance(whole, PreTrainedModel):  # its file has the names of older versions of transformers
            load_weights(whole, open_whole(folder).state_dict())
        else:
            load_weights(whole, read_tensors(folder / ADAPTER))
            load_image_size(whole, folder)
        if (found := read_method(folder)) is not None:
            self.method.load_state(MethodState(found[0], found[1].get("state", {})))

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Return the epoch to begin with and the batches to skip in it: no epoch at all where training has ended."""
        epoch, skipped = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            self.progress.recount()
            self._saves.place = Place(0, 0)
            return epoch, skipped
        noted = read_json(Path(resume_from_checkpoint) / files.PROGRESS)
        self.progress.recount(noted)
        best = Path(resume_from_checkpoint).with_name(noted["best"] or "none")  # the run may have moved
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        if noted["ended"] or self.state.global_step >= max_steps:
            self._saves.place = Place(num_train_epochs, self.state.global_step)
            return num_train_epochs, 0
        epoch, step = noted["epoch"], noted["step"]
        if step >= num_update_steps_per_epoch:
            epoch, step = epoch + 1, 0
        self._saves.place = Place(epoch, self.state.global_step - step)
        return epoch, step * self.args.gradient_accumulation_steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            load_optimizer(plain(self.optimizer), read_state(folder, files.OPTIMIZER), folder)
            self.lr_scheduler.load_state_dict(read_state(folder, files.SCHEDULER))
            self._load_rng_state(checkpoint)  # a `Trainer` does so where it takes a step

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None and (Path(checkpoint) / f"{files.SCALER}.json").is_file():
            scaler.load_state_dict(read_state(Path(checkpoint), files.SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            scatter_random_states(read_tensors(Path(checkpoint) / files.RANDOM), self.accelerator)

    # ---- callbacks with a state ----------------------------------------------------------------------------------

    def _stateful(self) -> dict[str, list[ExportableState]]:
        """Return the callbacks that have a state, by the name of their class."""
        found: dict[str, list[ExportableState]] = {}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback)
        return found

    def _callback_states(self) -> dict[str, Any]:
        """Return their states as a `Trainer` keeps them: a list where there are several of a class."""
        states = {name: [one.state() for one in callbacks] for name, callbacks in self._stateful().items()}
        return {name: own[0] if len(own) == 1 else own for name, own in states.items()}

    def _load_callback_state(self) -> None:
        """Give callbacks what they knew at the checkpoint, such as how long an early stop has waited; not their settings."""
        for name, callbacks in self._stateful().items():
            states = self.state.stateful_callbacks.get(name, [])
            for callback, state in zip(callbacks, states if isinstance(states, list) else [states], strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)
