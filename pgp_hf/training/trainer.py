"""Train on a stream: a `transformers.Trainer` that learns one task after another, by any method on any model."""

from __future__ import annotations

import copy
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, ProgressCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .. import hub
from ..data.images import AugmentedImages, CachedQueries, ImageCollator
from ..data.scenarios import SCENARIOS
from ..data.stream import TaskStream
from ..inference.backbone import quiet
from ..inference.whole import open_whole
from ..methods import Batch, ContinualMethod, FineTuning, MethodState, TaskContext
from ..models import SelectsPrompts, StreamModel, load_weights, stream_model
from ..runs.atomic import write_tensors
from ..runs.folder import RunFolder
from ..runs.revision import read_method
from .arguments import PGPTrainingArguments
from .callbacks import FollowTraining, StreamProgress, fire
from .evaluation import Recorded, Scorer, accuracy, measure, summary_logs
from .loss import check_finite, image_losses, mean_over_step
from .progress import Progress, task_seed
from .pushing import PushTasks, check_push, push_now
from .results import StreamResults
from .resume import Resumer, start_new
from .setup import check_arguments, check_model, check_settings, new_results, refuse_sharding, set_learning_rates
from .views import Passes, head_inputs
from .writing import write_method, write_task


class StreamTrainer(Trainer):
    """Learn a `TaskStream` task by task.

    After each task the method keeps what it needs from it (from deterministic views of the training images, without
    consuming random numbers), the test images of all tasks so far are evaluated, and the task's folder is written.

    Args:
        model: a `PeftModel` with a prompt adapter of this package or LoRA, or a model of transformers that is trained
            whole or in part (see `pgp_hf.set_trainable`); it has a classification head.
        args: training arguments; each task is trained with them.
        stream: the tasks.
        method: how the stream is learned; fine-tuning by default.
        processing_class: the backbone's image processor, for training, evaluation and the saved folder.
        kwargs: any other argument of `Trainer`. A `compute_loss_func` replaces the method's own loss.

    Attributes:
        method: how the stream is learned.
        training_stream: what is trained on: the stream, or all of its tasks as one; tasks count from `results.first`.
        folder: the `RunFolder` that is written to.
        progress: how far the run has come: `results`, the `task`, and what drift is measured against.

    Raises:
        TypeError: a model of another kind, or one without a head.
        ValueError: a head that does not fit the stream, a missing image processor, DeepSpeed or FSDP, a method that
            the model cannot have.
    """

    args: PGPTrainingArguments
    model: nn.Module
    hub_model_id: str | None  # type: ignore[assignment]  # transformers annotates it as None

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        args: PGPTrainingArguments,
        stream: TaskStream,
        method: ContinualMethod | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        check_model(model, stream)
        check_arguments({**kwargs, "processing_class": processing_class})
        self.stream = stream
        self.method = FineTuning() if method is None else method
        # a `Trainer` counts the images of a step only for such a function; `compute_loss` calls it with more than that
        kwargs.setdefault("compute_loss_func", mean_over_step)
        kwargs.setdefault("compute_metrics", accuracy)
        kwargs.setdefault("eval_dataset", {"task_1": stream.test(0)})  # grows with the tasks
        kwargs.setdefault("data_collator", ImageCollator(processing_class))
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        refuse_sharding(self.is_deepspeed_enabled or self.is_fsdp_enabled)
        learner = self.stream_model
        check_settings(self.args, stream, self.method, learner)
        self.training_stream = trained = self.method.training_stream(stream)
        learner.prepare_stream([list(task.classes) for task in trained.tasks], trained.id2label)
        if SCENARIOS[stream.scenario].one_epoch:
            self.args.num_train_epochs = 1
        self.folder = RunFolder(str(self.args.output_dir))
        first = stream.num_tasks - trained.num_tasks
        self.progress = Progress(new_results(self.args, stream, self.method, learner, first))
        self._context: TaskContext | None = None  # of the task in training
        self._images: AugmentedImages | None = None  # and its images
        self._handles: list[RemovableHandle] = []  # of hooks on the optimizer
        self._test_queries: dict[int, Tensor | None] = {}
        self._scorer = Scorer(stream, self.method, self.args.eval_mask)
        self._blank = copy.deepcopy(self.method.state())
        self.add_callback(FollowTraining(learner, lambda: (self._images, self.train_dataset)))
        if self.args.push_to_hub:
            self.args.check_hub()  # set_push_to_hub() comes after the arguments' own checks
            self.add_callback(PushTasks())
        if not self.args.disable_tqdm:
            self.pop_callback(ProgressCallback)
            self.add_callback(StreamProgress())

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
        return self.accelerator.unwrap_model(self.model)

    # ---- the stream ----------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]  # trial and the rest are passed on by keyword
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Learn every task of the stream.

        Args:
            resume_from_checkpoint: True continues the run in `output_dir` exactly where it stopped, within a task too;
                a path continues the run in that folder, writing to `output_dir`. An empty folder starts a new run.
                The path may be a run's folder, one of its task folders or a copy of one (learned as far as that task),
                or "owner/name@task-3" on the Hub.

        Returns:
            Steps and mean training loss over the tasks trained by this call; `metrics` is the results file's content.

        Raises:
            ValueError: images that do not decode, an `output_dir` that holds another run, a run that does not fit.
            FloatingPointError: a loss that is not finite; the tasks finished before stay as they are.
        """
        first, checkpoint = self._start(resume_from_checkpoint)
        self._note_first(first)  # uploads, which begin with the stream, need it
        if self.args.verify_images:
            if self.is_world_process_zero():
                self.stream.verify(not self.args.disable_tqdm, gone=first if self.method.stores_images else 0)
            self.accelerator.wait_for_everyone()
        self._fire("on_stream_begin", first_task=first)
        steps, loss = 0, 0.0
        for t in range(first, self.stream.num_tasks):
            output = self.train_task(t, resume_from_checkpoint=checkpoint, **kwargs)
            steps, loss, checkpoint = steps + output.global_step, loss + output.training_loss, None
        results = self.results.to_dict()
        self._fire("on_stream_end", results=results)
        return TrainOutput(steps, loss / max(self.stream.num_tasks - first, 1), results)

    def train_task(self, t: int, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Learn the task with 0-based index t, then gather statistics, evaluate, and write its folder.

        For a method that learns all tasks as one, t is the last.

        Raises:
            ValueError: a task out of turn, or an earlier one that has failed.
        """
        self.progress.begin(t)
        self._note_first(t)
        self.method.begun = True
        learner, own = self.stream_model, t - self.results.first  # the task's index in the training stream
        with self.progress.timed("train"):
            self._images = images = self._passes().augmented(own)
            self._context = context = self._passes().context(own)
            self._passes().keep_training_queries(images, self.method.projection)
            self.train_dataset = self.method.train_images(context, images)
        with self.progress.timed("statistics"):
            before = self._passes().head_features(own) if self.args.compensate_drift and own > 0 else None
        # a function of (seed, task) alone: paired runs and resumed runs see the same random numbers
        set_seed(task_seed(self.args.seed, own))
        self.eval_dataset = self._test_sets(t)
        if self.args.reinit_optimizer:
            self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        learner.begin_task(own)
        self.method.begin_task(context)
        self._fire("on_task_begin", task=t)
        with self.progress.timed("train"):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        learner.end_task(own)
        with self.progress.timed("statistics"):
            self._passes().learn_class_statistics(own, before)
            self.method.end_task(context)
        self.progress.measure_method(self.method, own, self._passes().images_of)
        self.evaluate_stream()
        self._write_task(t)
        self.progress.interrupted = False
        self._fire("on_task_end", task=t, results=self.results.to_dict(), folder=self.folder.task(t))
        return output

    def evaluate_stream(self) -> dict[str, Any]:
        """Evaluate every task trained so far, take the figures into `results`, and return the results file's content.

        A prediction may be any class seen so far; in the task-incremental scenario, any class of its own task.
        """
        if self.task is None:
            raise ValueError("no task has been trained yet: call train() or train_task(0) first.")
        learner = self.stream_model
        pool_size = learner.pool_size if isinstance(learner, SelectsPrompts) else 0
        with self.progress.timed("evaluation"):
            measure(self.results, self.progress.references, self.task, self._record, pool_size, self.stream)
        self.log(summary_logs(self.results))
        return self.results.to_dict()

    def _fire(self, event: str, **kwargs: Any) -> None:
        given = {"model": self.model, "stream": self.stream, "training_stream": self.training_stream, **kwargs}
        fire(self.callback_handler.callbacks, event, self.args, self.state, self.control, **given)

    # ---- training ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with the rules of the model and of the method attached to it."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        plain, context, learner = getattr(optimizer, "optimizer", optimizer), self._context, self.stream_model
        if new:
            set_learning_rates(plain, self.args, learner, 0 if context is None else context.task)
        for handle in self._handles:  # an optimizer that is kept still has those of the task before
            handle.remove()
        self._handles = [plain.register_step_post_hook(lambda *_: learner.after_step())]
        if context is not None:
            self._handles += self.method.attach(context, plain)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the method's losses, one for each image, averaged over the whole step's images."""
        if self.compute_loss_func is not mean_over_step:  # the user's own
            inputs = {name: value for name, value in inputs.items() if name not in ("task", "index")}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = Batch.split(inputs)
        if self._context is None:
            raise ValueError("no task has begun: train by train() or train_task(t).")
        output = model(**batch.inputs)
        losses = image_losses(self.method, self._context, batch, output, self.args.label_smoothing_factor)
        loss = mean_over_step(losses, batch.labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, losses summed
        return (loss, output) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on one batch as a `Trainer` does, and stop at a loss that is not finite.

        Raises:
            FloatingPointError: such a loss.
        """
        self.results.images_trained += len(inputs["pixel_values"]) * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        step = f"step {self.state.global_step + 1} of {self.state.max_steps}"
        at = f"task {(self.task or 0) + 1} at {step} (learning rate {self._get_learning_rate():g})"
        check_finite(loss, at, self.progress.kept(self.folder))
        return loss

    def _passes(self) -> Passes:
        return Passes(
            args=self.args,
            accelerator=self.accelerator,
            stream=self.training_stream,
            stored=self.progress.stored,
            model=self.model,
            learner=self.stream_model,
            images=self._images,
            collate=self.data_collator,
            prepare=self._prepare_inputs,
            test_loader=self.get_test_dataloader,
        )

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as a `Trainer` does, after noting the task of the test images by their dataset."""
        self._scorer.expect(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Return loss, logits and labels of one evaluation batch; classes that may not win are masked."""
        inputs, learner, autocast = self._prepare_inputs(inputs), self.stream_model, self.accelerator.autocast
        labels, tasks, _ = (inputs.pop(name, None) for name in ("labels", "task", "index"))
        with torch.no_grad(), head_inputs(learner) as features:
            output = model(**inputs)
        found = self._scorer.score(learner, inputs, output, features[0], tasks, self.task, autocast)
        loss = None if labels is None else F.cross_entropy(found["logits"], labels)
        if prediction_loss_only:
            return loss, None, None
        return loss, found if self._scorer.recording else found["logits"], labels

    def _record(self, j: int) -> Recorded:
        """Predict the test images of the 0-based task j."""
        images = self.stream.test(j)
        if j not in self._test_queries:
            self._test_queries[j] = self._passes().queries(images)
        seen: Dataset[Any] = images if (queries := self._test_queries[j]) is None else CachedQueries(images, queries)
        compute_metrics, self.compute_metrics, self._scorer.recording = self.compute_metrics, None, True
        try:
            output = self.predict(seen, metric_key_prefix=f"eval_task_{j + 1}")
        finally:
            self.compute_metrics, self._scorer.recording = compute_metrics, False
        found: Any = output.predictions  # the dict that prediction_step has returned
        return Recorded(labels=np.asarray(output.label_ids), **found)

    def _test_sets(self, t: int) -> dict[str, Dataset]:
        return {f"task_{j + 1}": self.stream.test(j) for j in range(t + 1)}

    # ---- starting and resuming -----------------------------------------------------------------------------------

    def _start(self, resume: str | bool | None) -> tuple[int, str | None]:
        """Begin a new run, or take over an earlier one; return the first task, and the checkpoint to enter it by."""
        if not resume:
            start_new(self.args, self.progress, self.folder)
            self.accelerator.wait_for_everyone()
            return self.results.first, None
        resumer = Resumer(
            args=self.args,
            stream=self.stream,
            model=self._whole_model(),
            learner=self.stream_model,
            method=self.method,
            progress=self.progress,
            folder=self.folder,
            predict=self._record,
            blank=self._blank,
        )
        first, checkpoint = resumer.resume(resume)
        self.accelerator.wait_for_everyone()
        if first > self.results.first:
            self.eval_dataset = self._test_sets(first - 1)
        else:
            self.optimizer = self.lr_scheduler = None
        return first, None if checkpoint is None else str(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is None and isinstance(whole := self._whole_model(), PreTrainedModel):
            # a `Trainer` looks for the names in the model, and the file has those of older versions of transformers
            load_weights(whole, open_whole(Path(resume_from_checkpoint)).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_method(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_method(self, checkpoint: str) -> None:
        """Give the method what it remembered at a checkpoint; one from before methods had files holds nothing."""
        if (found := read_method(Path(checkpoint))) is not None:
            self.method.load_state(MethodState(found[0], found[1].get("state", {})))

    # ---- files ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder.checkpoints(self.task)) if self.task is not None else super()._get_output_dir(trial)

    @cached_property
    def _digest(self) -> dict[str, str]:
        return self.stream_model.digest()

    def _note_first(self, t: int) -> None:
        """Note in the folder of a new run which task is its first."""
        if t == self.results.first and self.is_world_process_zero():
            self.folder.start_at(t)

    def _write_task(self, t: int) -> None:
        if self.is_world_process_zero():
            write_tensors(self.folder.features(t), self.progress.references.tensors(t))
            self.folder.publish(t, self._write_files)
            if self.args.save_full_weights == "last" and not self.args.push_to_hub:  # `PushTasks` waits for the Hub
                self.folder.drop_large(before=t)
            shutil.rmtree(self.folder.checkpoints(t).parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _write_files(self, folder: Path) -> None:
        write_task(
            folder,
            model=self._whole_model(),
            method=self.method,
            processor=self.processing_class,
            progress=self.progress,
            manifest=self.stream.manifest(),
            digest=self._digest,
        )

    # A `Trainer` would upload checkpoints, optimizer state and everything else in `output_dir`; these methods prevent it.

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Set the repository's id; the first upload creates it, since a Hub out of reach must not stop the training."""
        self.hub_model_id = self.args.hub_repo().repo_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Leave checkpoints where they are: `PushTasks` uploads finished tasks."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as a `Trainer` does, together with the method's state; nothing is uploaded."""
        with quiet():
            super().save_model(output_dir, _internal_call=True)
        if output_dir is not None and self.args.should_save:
            write_method(Path(output_dir), self.method)

    def push_to_hub(  # type: ignore[override]  # it makes several commits
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> hub.Pushed | None:
        """Upload the finished tasks that are not on the Hub yet, as `hub.push` does; None on all but the main process.

        `token` and `private` replace those in `args`. Each task has its own message and card, so no others are used.
        """
        check_push(blocking, revision)
        return push_now(self.args, self.folder, token, private) if self.is_world_process_zero() else None
