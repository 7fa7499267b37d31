"""`PGPTrainer`: a `transformers.Trainer` that learns a stream of tasks and projects every update of the prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast, set_seed
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import TrainOutput

from ..data.images import AugmentedImages, CachedQueries, ImageCollator
from ..data.stream import TaskStream
from ..projection import Projection, ProjectionConfig
from ..runs.folder import RunFolder
from .arguments import PGPTrainingArguments
from .callbacks import FollowTraining, StreamProgress
from .evaluation import StreamEvaluation, accuracy
from .pushing import PushTasks
from .results import StreamResults
from .writing import RunFiles


class PGPTrainer(StreamEvaluation, RunFiles, Trainer):
    """Learns a `TaskStream` task by task.

    After each task: statistics of its training images (deterministic views, no random number consumed) grow the
    projection's bases; the test images of all tasks so far are evaluated; the task's folder is written.

    Args:
        model: a `PeftModel` with a prompt adapter of this package and a classification head.
        args: training arguments; each task is trained with them.
        stream: the tasks.
        projection: what is protected; `ProjectionConfig()` by default, `method="none"` for none.
        processing_class: the backbone's image processor, for training, evaluation and the saved folder.
        kwargs: any other argument of `Trainer`.

    Attributes:
        results: `StreamResults` so far.
        projection: the `Projection` with its bases.

    Raises:
        TypeError: a model without a prompt adapter, or one without a head.
        ValueError: a head that does not fit the stream, a missing image processor, DeepSpeed or FSDP, a projection
            that the adapter cannot have.
    """

    def __init__(
        self,
        model: PeftModel,
        args: PGPTrainingArguments,
        stream: TaskStream,
        projection: ProjectionConfig | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        _check_model(model, stream)
        if processing_class is None and kwargs.get("data_collator") is None:
            raise ValueError(
                "processing_class is missing: pass the backbone's image processor, for example "
                "AutoImageProcessor.from_pretrained(name, backend='pil')."
            )
        if any(part is not None for part in kwargs.get("optimizers", ())):
            raise ValueError(
                "optimizers=(...) would be used for one task and without projection: name it by args.optim, or pass "
                "optimizer_cls_and_kwargs=(torch.optim.SGD, {...}), from which each task makes its own."
            )
        self.stream = stream
        self.projection = Projection(projection)
        kwargs.setdefault("compute_loss_func", self._task_loss)
        kwargs.setdefault("compute_metrics", accuracy)
        kwargs.setdefault("eval_dataset", {"task_1": stream.test(0)})  # grows with the tasks
        kwargs.setdefault("data_collator", ImageCollator(processing_class))
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "DeepSpeed and FSDP shard parameters, while queries and protected directions need them whole: use plain "
                "data parallelism (accelerate launch --multi_gpu); prompts are too small to gain from sharding."
            )
        if stream.scenario == "online":
            if self.args.max_steps > 0:
                raise ValueError(
                    f"max_steps={self.args.max_steps} and scenario='online', one epoch, exclude each other."
                )
            self.args.num_train_epochs = 1
        self.tuner.prepare_stream([list(task.classes) for task in stream.tasks])
        config = self.tuner.adapter_config
        if config.id2label == {label: f"LABEL_{label}" for label in config.id2label}:  # the model was given no names
            config.id2label = dict(stream.id2label)
        check_projection(self.projection.config, self.tuner)
        if self.args.compensate_drift and config.head != "statistics":
            raise ValueError(
                f"compensate_drift=True moves the class means of a statistics head, which head={config.head!r} lacks: set "
                f"head='statistics' in the {type(config).__name__}, or leave it out."
            )
        self.folder = RunFolder(self.args.output_dir)
        self.results = StreamResults(
            method=config.peft_type.lower(),
            projection=self.projection.config.method,
            head=config.head,
            scenario=stream.scenario,
            num_tasks=stream.num_tasks,
            seed=self.args.seed,
            eval_mask=self.args.eval_mask,
            batchwise_prompt=getattr(config, "batchwise_prompt", False),
            compensate_drift=self.args.compensate_drift,
        )
        self.task: int | None = None  # in training, or trained last
        self._interrupted = False  # whether that task was begun and is not finished
        self._features: dict[int, np.ndarray] = {}  # of each task's test images when it ended
        self._selected: dict[int, np.ndarray] = {}  # their pool entries; empty where nothing is selected
        self._queries: dict[int, Tensor] = {}
        self._scored: int | None = None  # task whose test images are being evaluated
        self._recording = False
        self.add_callback(FollowTraining(self))
        if self.args.push_to_hub:
            self.args.check_hub()  # set_push_to_hub() comes after the arguments' own checks
            self.add_callback(PushTasks())
        if not self.args.disable_tqdm:
            self.pop_callback(ProgressCallback)
            self.add_callback(StreamProgress)

    # ---- the stream ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
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
        if self.args.verify_images:
            if self.is_world_process_zero():
                self.stream.verify(progress=not self.args.disable_tqdm)
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

        Raises:
            ValueError: a task out of turn, or one that was begun and broke off.
        """
        if self._interrupted:
            raise ValueError(
                f"this trainer has begun task {self.task + 1} and not finished it: continue by "
                "train(resume_from_checkpoint=True), or make a new model and a new trainer."
            )
        if t != len(self.results.matrix):
            raise ValueError(
                f"t={t} is not the next task: {len(self.results.matrix)} of {self.stream.num_tasks} tasks are trained, "
                f"so t={len(self.results.matrix)} comes next (counted from 0)."
            )
        self.task, self._interrupted = t, True
        self.train_dataset = AugmentedImages(
            self.stream.train(t), self.args.augmentation, self.args.crop_min_scale, self.args.seed, t
        )
        started = time.perf_counter()
        self._cache_train_queries()
        self._count("train", started)
        started = time.perf_counter()
        before = self._all_head_features(t) if self.args.compensate_drift and t > 0 else None
        self._count("statistics", started)
        # a function of (seed, task) alone: paired runs and resumed runs see the same random numbers
        set_seed(_task_seed(self.args.seed, t))
        self.eval_dataset = self._test_sets(t)
        if self.args.reinit_optimizer:
            self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.tuner.begin_task(t)
        self.projection.projector.anchor(self._prompt_parameters())
        self._fire("on_task_begin", task=t)

        started = time.perf_counter()
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._count("train", started)
        self.tuner.end_task(t)

        started = time.perf_counter()
        if self.tuner.statistics is not None:
            self._gather_class_statistics(t, before)
        if self.projection.active:
            self._gather_statistics(t)
        self._count("statistics", started)
        self.results.rank[t:] = [self.projection.rank]
        self.evaluate_stream()
        self._write_task(t)
        self._interrupted = False
        self._fire("on_task_end", task=t, results=self.results.to_dict(), folder=self.folder.task(t))
        return output

    def _cache_train_queries(self) -> None:
        """Compute the queries of the task's training images once, where they would be computed more often."""
        views = self.train_dataset.views()
        passes = self.args.num_train_epochs + (self.projection.active or self.tuner.statistics is not None)
        worth = 0 < len(views) < passes and self.args.max_steps <= 0
        known = isinstance(self.data_collator, ImageCollator)  # another one might augment
        if worth and known and self.args.cache_queries and self.tuner.query is not None:
            self.train_dataset.queries = torch.stack([self._frozen_queries(view) for view in views])

    # ---- training ------------------------------------------------------------------------------------------------

    @property
    def tuner(self) -> Any:
        """The prompt tuner inside the `PeftModel`."""
        return self.accelerator.unwrap_model(self.model).base_model

    def _prompt_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.tuner.prompt_parameters().items())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new:
            plain = getattr(optimizer, "optimizer", optimizer)
            if self.task and self.args.later_prompt_learning_rate is not None:
                self._separate_prompts(plain, self.args.later_prompt_learning_rate)
            plain.register_step_post_hook(lambda *_: self.tuner.after_step())
            if self.projection.active:
                self.projection.projector.attach(plain, self._prompt_parameters)
        return optimizer

    def _separate_prompts(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """Give the prompts and keys that tasks share a learning rate of their own."""
        prompts = {id(parameter) for _, parameter in self._prompt_parameters()}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in prompts]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in prompts]
                optimizer.add_param_group({**group, "params": own, "lr": learning_rate})

    def _task_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy over the task's classes minus the pull term, averaged over the whole step's images."""
        classes = (
            self.stream.seen_classes(self.task)
            if self.args.train_mask == "seen"
            else self.stream.tasks[self.task].classes
        )
        index = torch.tensor(list(classes), device=labels.device)
        position = labels.new_full((self.stream.num_classes,), -100)
        position[index] = torch.arange(len(index), device=labels.device)
        losses = F.cross_entropy(
            self.tuner.class_logits(outputs).float()[:, index],
            position[labels],
            reduction="none",
            label_smoothing=self.args.label_smoothing_factor,
        )
        pull = getattr(outputs, "prompt_similarity", None)
        if pull is not None:
            losses = losses - self.tuner.adapter_config.pull_constraint_coeff * pull
        losses = losses + self.projection.penalty(self.tuner)
        return losses.sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(
            model, {k: v for k, v in inputs.items() if k not in ("task", "index")}, *args, **kwargs
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.results.images_trained += len(inputs["pixel_values"]) * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            kept = (
                f"task {self.task} is kept in {self.folder.task(self.task - 1)}"
                if self.task
                else "no task was finished"
            )
            raise FloatingPointError(
                f"the loss became {loss.item()} in task {self.task + 1} at step {self.state.global_step + 1} of "
                f"{self.state.max_steps} (learning rate {self._get_learning_rate():g}); {kept}. "
                "Lower learning_rate, set max_grad_norm, or use bf16 instead of fp16."
            )
        return loss

    # ---- statistics ----------------------------------------------------------------------------------------------

    def _training_views(
        self, t: int, batch_size: int, limit: int | None = None
    ) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Batches of the task's training images, unaugmented, and each image's position within the task.

        `limit` images at most; each process gets its share.
        """
        images, queries = self.stream.train(t), self.train_dataset.queries
        if queries is not None:
            images = CachedQueries(images, queries[0])
        indices = np.arange(len(images))
        if limit is not None and limit < len(images):
            indices = np.sort(np.random.default_rng([self.args.seed, t]).permutation(indices)[:limit])
        share = indices[self.args.process_index :: self.args.world_size]
        if len(indices) < self.args.world_size:
            raise ValueError(
                f"{len(indices)} images for the statistics of task {t + 1} are too few for {self.args.world_size} "
                "processes: use fewer processes, or raise max_images."
            )
        loader = DataLoader(
            Subset(images, share.tolist()),
            batch_size=batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # the loader draws a seed, which must not come from the training's numbers
        )
        self.model.eval()
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        for i, batch in enumerate(tqdm(loader, desc="statistics", leave=False, disable=hidden)):
            batch = {k: v for k, v in batch.items() if k not in ("task", "index")}
            yield self._prepare_inputs(batch), share[i * batch_size : (i + 1) * batch_size].tolist()

    @torch.no_grad()
    def _gather_statistics(self, t: int) -> None:
        """Show the task's training images to the projection."""
        several = self.args.world_size > 1
        self.projection.update_bases(
            self.tuner,
            self._projection_inputs(t),
            task=t,
            seed=self.args.seed,
            classes=self.stream.seen_classes(t),
            reduce=(lambda tensor: self.accelerator.reduce(tensor, "sum")) if several else None,
            gather=self.accelerator.gather if several else None,
            broadcast=broadcast if several else None,
        )

    def _projection_inputs(self, t: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
        # a batch that fits training also fits the backward passes that a projection may need
        for inputs, images in self._training_views(t, self.args.train_batch_size, self.projection.config.max_images):
            inputs.pop("labels")
            if "prompt_query" not in inputs and self.tuner.query is not None:
                with self.accelerator.autocast():  # as training and evaluation see it; the rest is in full precision
                    inputs["prompt_query"] = self.tuner.query(inputs["pixel_values"])
            yield inputs, images

    @torch.no_grad()
    def _head_features(self, t: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the head reads of this process's share of the task's training images, and their labels, by batches."""
        for inputs, _ in self._training_views(t, self.args.eval_batch_size):
            labels = inputs.pop("labels")
            with self._head_inputs() as features, self.accelerator.autocast():
                self.model(**inputs)
            yield features[0].float().cpu(), labels

    def _all_head_features(self, t: int) -> Tensor:
        return torch.cat([features for features, _ in self._head_features(t)])

    @torch.no_grad()
    def _gather_class_statistics(self, t: int, before: Tensor | None = None) -> None:
        """Show the task's training images to the statistics head, as the prompts now render them.

        `before`: how they were rendered when the task began, for drift compensation.
        """
        several = self.args.world_size > 1
        total = (lambda tensor: self.accelerator.reduce(tensor, "sum")) if several else None
        statistics, after = self.tuner.statistics.fresh(), []
        for features, labels in self._head_features(t):
            statistics.update(features, labels)
            if before is not None:
                after.append(features)
        if before is not None:
            restricted = self.tuner.as_before_task(t)
            with restricted or nullcontext():
                seen = torch.cat(after) if restricted is None else self._all_head_features(t)
            self.tuner.statistics.compensate_drift(before, seen, total)
        if several:
            statistics.reduce(total)
        self.tuner.learn_statistics(statistics)

    # ---- small ---------------------------------------------------------------------------------------------------

    def _count(self, activity: str, started: float) -> None:
        self.results.seconds[activity] += time.perf_counter() - started

    def _fire(self, event: str, **kwargs: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, event):
                getattr(callback, event)(
                    self.args, self.state, self.control, model=self.model, stream=self.stream, **kwargs
                )


def _task_seed(seed: int, t: int) -> int:
    return int(np.random.SeedSequence([seed, t]).generate_state(1)[0])


def check_projection(projection: ProjectionConfig, tuner: Any) -> None:
    """Raise ValueError when a projection asks for something that the adapter lacks."""
    config = tuner.adapter_config
    if projection.reads_statistics and config.head != "statistics":
        raise ValueError(
            f"probe_space='statistics' needs head='statistics' in the {type(config).__name__}, not {config.head!r}."
        )
    if projection.ln_penalty and not tuner.token_offsets():
        raise ValueError(
            f"ln_penalty={projection.ln_penalty} is for prompts that enter the network as tokens, and this "
            f"{type(config).__name__} has none: leave it at 0."
        )


def _check_model(model: Any, stream: TaskStream) -> None:
    if not isinstance(model, PeftModel) or not hasattr(model.base_model, "prompt_parameters"):
        raise TypeError(
            f"model is a {type(model).__name__} without a prompt adapter: wrap it by "
            "peft.get_peft_model(model, pgp_hf.L2PConfig(...))."
        )
    config = model.base_model.adapter_config
    if config.id2label is None:
        raise TypeError(
            f"{type(model.get_base_model()).__name__} has no classifier: use a model with a head, for example "
            "AutoModelForImageClassification (a CLIPModel takes its class names from ClipPromptConfig.for_classes)."
        )
    if not isinstance(stream, TaskStream):
        raise TypeError(f"stream is a {type(stream).__name__}: pass a pgp_hf.TaskStream.")
    classes = len(config.id2label)
    if classes != stream.num_classes:
        raise ValueError(
            f"the model's head has {classes} outputs, the stream {stream.num_classes} classes: load the backbone with "
            f"num_labels={stream.num_classes} (and ignore_mismatched_sizes=True if it had a head)."
        )
