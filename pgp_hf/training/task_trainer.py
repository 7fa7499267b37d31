"""Train on the task in hand: the steps, losses and predictions of a stream's trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import EvalLoopOutput

from ..data.images import AugmentedImages, CachedQueries, ImageCollator
from ..data.stream import TaskStream
from ..methods import Batch, TaskContext
from ..models import KeepsClassStatistics, SelectsPrompts
from ..tuners.base.compiled import Trunk
from .accelerating import in_own_state
from .choosing import check_choice, summarize
from .compiling import compiling
from .evaluation import Recorded, Scorer, accuracy, measure, summary_logs
from .finite import LossWatch, check_outputs, check_weights
from .fitting import BatchSizes, Beginning, remember
from .loss import image_losses, mean_over_step
from .optimizers import check_given, of_one_task
from .recording import Batches, CollateBatch, Found, Images, Recorder
from .reporting import ReportingTrainer
from .setup import set_learning_rates
from .sharing import HeadInputs
from .signals import StopOnSignal
from .tracking import StreamHandler
from .views import Passes, head_inputs


class TaskTrainer(ReportingTrainer):
    """A `Trainer` that learns the task in hand by a method, on a model that learns streams.

    `StreamTrainer`, the only class made of it, chooses the tasks and sets what is annotated here.
    """

    hub_model_id: str | None  # type: ignore[assignment]  # transformers annotates it as None
    callback_handler: StreamHandler
    training_stream: TaskStream
    _scorer: Scorer
    _context: TaskContext | None  # of the task in training
    _images: AugmentedImages | None  # and its images
    _handles: list[RemovableHandle]  # of hooks on the optimizer
    _test_queries: dict[int, Tensor | None]
    _operations: dict[Any, int]  # of a step, by task and number of images
    _sizes: BatchSizes
    _beginning: Beginning | None  # of the task in training, for `auto_find_batch_size`
    stops: StopOnSignal
    _losses: LossWatch  # of the task in training
    _trunk: Trunk | None  # the frozen blocks, where they are compiled

    def _fire(self, event: str, **kwargs: Any) -> None:
        given = {"model": self.model, "stream": self.stream, "training_stream": self.training_stream, **kwargs}
        self.callback_handler.fire(event, self.args, self.state, self.control, **given)

    # ---- training ------------------------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train as a `Trainer` does, which calls this again with smaller batches where they do not fit into memory."""
        if self._beginning is not None:
            self.optimizer = self._beginning.restore()
        elif self.args.auto_find_batch_size and self.args.world_size == 1:
            self._beginning = Beginning(self.model, self.method, self.optimizer, self.accelerator)
        self._losses = LossWatch(self.args.device)
        output = super()._inner_training_loop(*args, **kwargs)
        task, _, kept = self._where()
        self._losses.settle(*self._where())
        check_weights(self.stream_model.trainable(), task, kept)
        return output

    def _where(self) -> tuple[int, int, str]:
        """Return the task in training, its steps, and what remains of the run if it ends here."""
        return self.task or 0, self.state.max_steps, self.progress.kept(self.folder)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with the rules of the model and of the method attached to it."""
        new, given = self.optimizer is None, of_one_task(self.optimizer_cls_and_kwargs)  # which may be used up
        self.optimizer_cls_and_kwargs = of_one_task(given)
        optimizer = super().create_optimizer(model)
        self.optimizer_cls_and_kwargs = given
        plain, context, learner = getattr(optimizer, "optimizer", optimizer), self._context, self.stream_model
        if new and given is not None and "params" in given[1]:
            check_given(plain, self.model)
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

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device, and process its images there if that was left to be done."""
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        collate = self.data_collator
        collate = collate.collate if isinstance(collate, CollateBatch) else collate
        if isinstance(collate, ImageCollator):
            collate.finish(prepared)
        return prepared

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on one batch as a `Trainer` does, and stop at a loss that is not finite, as soon as the host knows of it.

        Raises:
            FloatingPointError: such a loss.
        """
        prepared = self._prepare_inputs(inputs)
        inputs.clear()  # what counts a step's operations looks into it later
        inputs.update(prepared)
        self.results.images_trained += len(inputs["pixel_values"]) * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.note(loss, self.state.global_step + 1, self._get_learning_rate())
        self._losses.check(*self._where())
        return loss

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log, save and evaluate as a `Trainer` does; after a signal, save in any case, and leave."""
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or self.stops.is_due():
            self._losses.settle(*self._where())
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if self.stops.is_due():
            if self.args.save_only_model or self.stops.saved != self.state.global_step:
                self._save_checkpoint(model, trial, with_states=True)
            self.accelerator.wait_for_everyone()  # a process that leaves may take others with it
            self.stops.leave(
                self.state, self.folder.checkpoints(self.task or 0) / f"checkpoint-{self.state.global_step}"
            )

    def _learn_from_trained(self, context: TaskContext, before: Tensor | None) -> None:
        """Let the statistics head and the method learn from the task that has been trained.

        Both see its images as evaluation does: where all of them pass in the same batches and precision, once does for both.
        """
        most, sizes = getattr(self.method.config, "max_images", None), self._sizes
        alike = sizes.training == sizes.evaluation and self.accelerator.mixed_precision == "no"
        if alike and most is None and self.method.passes_as_evaluation and not self.args.compile_trunk:
            seen = HeadInputs()
            self._end_method(seen.noting(context))
            self._passes().learn_class_statistics(context.task, before, seen.batches)
        else:
            self._passes().learn_class_statistics(context.task, before)
            self._end_method(context)

    def _end_method(self, context: TaskContext) -> None:
        """Let the method keep what it needs from the task that has been trained."""
        undo = remember(self.method) if self.args.auto_find_batch_size else None
        self._sizes.fit(lambda: self.method.end_task(context), lambda: self._sizes.training, undo)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a step as a `Trainer` counts them, which counts the parameters once for each task."""
        key = self.task, len(inputs["pixel_values"])
        if key not in self._operations:
            self._operations = {**self._operations, key: super().floating_point_ops(inputs)}
        return self._operations[key]

    # ---- evaluation ----------------------------------------------------------------------------------------------

    @in_own_state
    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Return a loader of these images, as a `Trainer` does."""
        with self._for_one_pass():
            return super().get_eval_dataloader(eval_dataset)

    @in_own_state
    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Return a loader of these images, as a `Trainer` does."""
        with self._for_one_pass(1 if isinstance(test_dataset, Batches) else None):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _for_one_pass(self, size: int | None = None) -> Iterator[None]:
        """Make loaders whose workers end with a pass, and whose batches fit, or are of this size.

        Workers that persist would stay with each task's test images, and a `Trainer` would take its first loader for all.
        """
        args = self.args
        before = args.dataloader_persistent_workers, args.per_device_eval_batch_size
        args.dataloader_persistent_workers, args.per_device_eval_batch_size = False, size or self._sizes.evaluation
        try:
            yield
        finally:
            args.dataloader_persistent_workers, args.per_device_eval_batch_size = before

    @in_own_state
    @compiling
    def evaluate_stream(self) -> dict[str, Any]:
        """Evaluate every task trained so far, take the figures into `results`, and return the results file's content.

        A prediction may be any class seen so far; in the task-incremental scenario, any class of its own task.
        """
        if self.task is None:
            raise ValueError("no task has been trained yet: call train() or train_task(0) first.")
        learner = self.stream_model
        pool_size = learner.pool_size if isinstance(learner, SelectsPrompts) else 0
        statistics = learner.statistics if isinstance(learner, KeepsClassStatistics) else None
        temperature = None if statistics is None or self.method.adjusts_logits else statistics.temperature
        with self.progress.timed("evaluation"):
            measure(
                self.results, self.progress.references, self.task, self._records, pool_size, self.stream, temperature
            )
        # metrics of the user's own may have the same names, and another unit
        self.log(summary_logs(self.results, "eval" if self.compute_metrics in (accuracy, None) else "eval_stream"))
        return self.results.to_dict()

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
            sizes=self._sizes,
            digest=lambda: self._digest,
        )

    @in_own_state
    @compiling
    def _record(self, j: int) -> Recorded:
        """Predict the test images of the 0-based task j."""
        return next(self._records([j]))

    def _records(self, tasks: Sequence[int]) -> Iterator[Recorded]:
        """Predict the test images of 0-based tasks."""
        self.model.eval()
        for j, recorded in zip(tasks, self._recorder.record(tasks, self.task), strict=True):
            check_outputs(recorded, self.stream.test(j), self.progress.kept(self.folder))
            yield recorded

    @cached_property
    def _recorder(self) -> Recorder:
        return Recorder(
            learner=lambda: self.stream_model,
            method=self.method,
            scorer=self._scorer,
            images=self._test_images,
            predict=self._predict,
            autocast=self.accelerator.autocast,
            sizes=self._sizes,
            alone=self.args.world_size == 1 and self.args.dataloader_in_order,
        )

    @cached_property
    def _digest(self) -> dict[str, str]:
        """Digest of the frozen backbone."""
        return self.stream_model.digest()

    def _test_images(self, j: int) -> Images:
        """Return the test images of the 0-based task j, with their queries where they are known."""
        images = self.stream.test(j)
        if j not in self._test_queries:
            self._test_queries[j] = self._passes().queries(images)
        return images if (queries := self._test_queries[j]) is None else CachedQueries(images, queries)

    def _predict(self, images: Dataset[Any]) -> Found:
        """Return the model's view of test images."""
        before = self.compute_metrics, self.data_collator, self.args.eval_do_concat_batches
        # the user's own see evaluations by `evaluate`, of logits alone
        prepare, self.preprocess_logits_for_metrics = self.preprocess_logits_for_metrics, None
        self.compute_metrics, self._scorer.recording = None, True
        # a `Trainer` would copy all that it has found so far with each batch, which grows by the square of their number
        self.args.eval_do_concat_batches = False
        self.callback_handler.measuring = True
        if isinstance(images, Batches):
            self.data_collator = CollateBatch(self.data_collator)
        try:
            output: Any = self.predict(images, metric_key_prefix="eval_stream")
        finally:
            self.compute_metrics, self.data_collator, self.args.eval_do_concat_batches = before
            self.preprocess_logits_for_metrics = prepare
            self._scorer.recording = self.callback_handler.measuring = False
        parts = output.predictions  # the dicts that prediction_step has returned
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {"labels": np.concatenate(output.label_ids), **found}

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as a `Trainer` does; of the stream's tasks, also under the names that a checkpoint is chosen by."""
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        handler = self.callback_handler
        callbacks = handler.callbacks
        # it looks for its metric in each task's evaluation, and says that it is disabled where that is another task's
        handler.callbacks = [one for one in callbacks if not isinstance(one, EarlyStoppingCallback)]
        try:
            metrics = super().evaluate(None, ignore_keys, metric_key_prefix)
        finally:
            handler.callbacks = callbacks
        summary = summarize(metrics, self._current_sets(), list(self.eval_dataset), metric_key_prefix)
        self.log(dict(summary))
        metrics.update(summary)
        self.control = handler.on_evaluate(self.args, self.state, self.control, dict(metrics))
        return metrics

    def _current_sets(self) -> list[str]:
        """Return the names in `eval_dataset` of the test images of the task in training; of all, if learned as one."""
        sets = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        return [name for name in sets if self.results.first or name == f"task_{(self.task or 0) + 1}"]

    def _check_choice(self) -> None:
        check_choice(self.args, self.stream, self.callback_handler.callbacks, self.compute_metrics is not accuracy)

    @in_own_state
    @compiling
    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as a `Trainer` does, after noting the task of the test images by their dataset."""
        if not self.stream_model.class_names:
            raise ValueError("the model knows no class yet: learn(dataset) or train() comes before predictions.")
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

    # ---- the Hub -------------------------------------------------------------------------------------------------

    # a `Trainer` would upload everything in `output_dir`: this prevents it, and that `_save_checkpoint` uploads nothing

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Set the repository's id; the first upload creates it, since a Hub out of reach must not stop the training."""
        self.hub_model_id = self.args.hub_repo().repo_id
