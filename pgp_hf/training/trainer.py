"""Train on a stream: a `transformers.Trainer` that learns one task after another, by any method on any model."""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from .. import hub
from ..data.images import AugmentedImages, ImageCollator
from ..data.scenarios import SCENARIOS
from ..data.stream import Task, TaskStream
from ..methods import ContinualMethod, FineTuning, TaskContext
from ..runs.atomic import write_tensors
from ..runs.folder import RunFolder
from . import learning
from .agreement import check_agreement, check_same_images
from .arguments import PGPTrainingArguments
from .callbacks import FollowTraining
from .compiling import compiling, make_trunk
from .evaluation import Scorer, accuracy, test_sets
from .fitting import BatchSizes
from .loss import mean_over_step
from .optimizers import check_optimizer
from .progress import Progress, task_seed
from .pushing import PushTasks, check_origin, check_push, push_now
from .resume import Resumer, check_new, delete_earlier
from .samples import keep_samples
from .settings import print_differing, recorded_settings
from .setup import (
    check_arguments,
    check_model,
    check_precision,
    check_settings,
    keep_statistics_local,
    new_results,
    refuse_sharding,
    set_last_block,
    show_progress,
    trainable_parameters,
    without_fixed,
)
from .signals import StopOnSignal, holding
from .task_trainer import TaskTrainer
from .tracking import StreamHandler
from .writing import folders_to_draw, write_task

Kind = TypeVar("Kind", bound="StreamTrainer")


class StreamTrainer(TaskTrainer):
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
        kwargs: any other argument of `Trainer`. A `compute_loss_func` replaces the method's own loss. `compute_metrics` is
            what `evaluate()` measures; where it is your own, the stream's measures are logged as `eval_stream_...`.

    Attributes:
        method: how the stream is learned.
        training_stream: what is trained on: the stream, or all of its tasks as one; tasks count from `results.first`.
        folder: the `RunFolder` that is written to.
        progress: how far the run has come: `results`, the `task`, and what drift is measured against.
        stops: stops the run on a signal.

    Raises:
        TypeError: a model of another kind, or one without a head.
        ValueError: a head that does not fit the stream, a missing image processor, DeepSpeed or FSDP, a method that
            the model cannot have.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        args: PGPTrainingArguments,
        stream: TaskStream,
        method: ContinualMethod | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        model, self._room = learning.Room.of(model, stream)
        check_model(model, stream, self._room.classes)
        check_arguments(args, method, {**kwargs, "processing_class": processing_class})
        self.stream = stream
        self.method = FineTuning() if method is None else method
        # a `Trainer` counts the images of a step only for such a function; `compute_loss` calls it with more than that
        kwargs.setdefault("compute_loss_func", mean_over_step)
        kwargs.setdefault("compute_metrics", accuracy)
        kwargs["eval_dataset"] = test_sets(stream, min(1, stream.num_tasks))  # grows with the tasks
        kwargs.setdefault("data_collator", ImageCollator(processing_class, args.exact_images, args.process_on_device))
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        refuse_sharding(self.is_deepspeed_enabled or self.is_fsdp_enabled)
        check_precision(model, self.args.fp16)
        check_optimizer(self)
        keep_statistics_local(self.model)
        learner = self.stream_model
        check_settings(self.args, stream, self.method, learner)
        set_last_block(self.args, learner)
        self._check_choice()
        self.training_stream = trained = self.method.training_stream(stream)
        names = dict(enumerate(stream.label_names[: self._room.classes]))
        learner.prepare_stream([list(task.classes) for task in trained.tasks[: self._room.tasks]], names)
        if SCENARIOS[stream.scenario].one_epoch:
            self.args.num_train_epochs = 1
        self.folder = RunFolder(str(self.args.output_dir))
        first = stream.num_tasks - trained.num_tasks
        self.progress = Progress(new_results(self.args, stream, self.method, learner, first))
        self.callback_handler = StreamHandler(self.callback_handler, self.progress)
        self._source: RunFolder | None = None  # of the run that goes on, until its files are in `output_dir`
        self._context: TaskContext | None = None  # of the task in training
        self._images: AugmentedImages | None = None  # and its images
        self._handles: list[RemovableHandle] = []  # of hooks on the optimizer
        self._test_queries: dict[int, Tensor | None] = {}
        self._operations: dict[Any, int] = {}
        self._sizes, self._beginning = BatchSizes(self.args, lambda: self._train_batch_size), None
        self._trunk = make_trunk(self.args.compile_trunk, learner, self._sizes, self.args.device)
        self._scorer = Scorer(stream, self.method, self.args.eval_mask)
        self._blank = copy.deepcopy(self.method.state())
        self.stops = StopOnSignal(self.folder, self.is_world_process_zero())
        self.add_callback(self.stops)
        self.add_callback(FollowTraining(learner, lambda: (self._images, self.train_dataset)))
        if self.args.push_to_hub:
            self.add_callback(PushTasks(lambda: self.results.origin))
        show_progress(self)

    # ---- the stream ----------------------------------------------------------------------------------------------

    @holding
    def train(  # type: ignore[override]  # trial and the rest are passed on by keyword
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Learn every task of the stream.

        Args:
            resume_from_checkpoint: True continues the run in `output_dir` exactly where it stopped, within a task too;
                in an empty folder, it begins a new one. A path continues the run that it holds, writing to `output_dir`;
                it may be a run's folder, one of its task folders or a copy of one (learned as far as that task), or
                "owner/name@task-3" on the Hub.

        Returns:
            Steps and mean training loss over the tasks trained by this call; `metrics` is the results file's content.

        Raises:
            ValueError: images that do not decode, an `output_dir` that holds another run or that another process writes
                to, a run that does not fit.
            FloatingPointError: a loss that is not finite; the tasks finished before stay as they are.
            SystemExit: after SIGTERM, SIGHUP or Ctrl-C, for which it is a KeyboardInterrupt as well. Within a task, the
                step in hand is finished and saved before; the code is 128 + the signal's number.
        """
        first, checkpoint = self._start(resume_from_checkpoint)
        if self.args.verify_images:
            if self.is_world_process_zero():
                self.stream.verify(not self.args.disable_tqdm, gone=first if self.method.stores_images else 0)
            self.accelerator.wait_for_everyone()
        if not resume_from_checkpoint:
            delete_earlier(self.args, self.folder)
        self._note_first(first)  # uploads, which begin with the stream, need it
        self._fire("on_stream_begin", first_task=first)
        steps, loss = 0, 0.0
        for t in range(first, self.stream.num_tasks):
            output = self.train_task(t, resume_from_checkpoint=checkpoint, **kwargs)
            steps, loss, checkpoint = steps + output.global_step, loss + output.training_loss, None
        results = self.results.to_dict()
        self._fire("on_stream_end", results=results)
        return TrainOutput(steps, loss / max(self.stream.num_tasks - first, 1), results)

    @holding
    @compiling
    def train_task(self, t: int, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Learn the task with 0-based index t, then gather statistics, evaluate, and write its folder.

        For a method that learns all tasks as one, t is the last.

        Raises:
            ValueError: a task out of turn, or an earlier one that has failed; an `output_dir` that holds another run.
        """
        self._enter()
        if self.task is None and self.stops.depth == 1 and resume_from_checkpoint is None:  # not by `train` or `learn`
            check_new(self.args, self.progress, self.folder)
            delete_earlier(self.args, self.folder)
        self.progress.begin(t)
        if self.is_world_process_zero():
            self.folder.check_free(t)
        self._note_first(t)
        self.method.begun = True
        learner, own = self.stream_model, t - self.results.first  # the task's index in the training stream
        self._room.grow(learner, t, self.args.seed)
        self.results.note_task(self._room.counted(t), recorded_settings(self.args), trainable_parameters(learner))
        with self.progress.timed("train"):
            self._images = images = self._passes().augmented(own)
            images.keep_pixels()
            self._context = context = self._passes().context(own)
            self._passes().keep_training_queries(images, self.method.projection)
            self.train_dataset = self.method.train_images(context, images)
        with self.progress.timed("statistics"):
            before = self._passes().head_features(own) if self.args.compensate_drift and own > 0 else None
            self._passes().learn_queries(own)
        # a function of (seed, task) alone: paired runs and resumed runs see the same random numbers
        set_seed(task_seed(self.args.seed, own))
        self.eval_dataset = test_sets(self.stream, t + 1)
        if self.args.reinit_optimizer:
            self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        learner.begin_task(own)
        self.method.begin_task(context)
        self._fire("on_task_begin", task=t)
        self._beginning = None
        with self.progress.timed("train"), without_fixed(self.args, self.method, learner):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.results.steps[own:] = [output.global_step]
        self._beginning = None  # a copy of all that learns
        learner.end_task(own)
        with self.progress.timed("statistics"):
            self._learn_from_trained(context, before)
        self.progress.measure_method(self.method, own, self._passes().images_of)
        self.evaluate_stream()
        self._write_task(t)
        self.progress.interrupted = False
        self._fire("on_task_end", task=t, results=self.results.to_dict(), folder=self.folder.task(t))
        return output

    @classmethod
    def from_pretrained(
        cls: type[Kind],
        run_or_repo: str | os.PathLike[str],
        revision: str | None = None,
        args: PGPTrainingArguments | None = None,
        test_dataset: Any = None,
        *,
        backbone: str | os.PathLike[str] | PreTrainedModel | None = None,
        dtype: torch.dtype | str | None = None,
        processing_class: Any = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Kind:
        """Return the trainer of a finished run, which goes on by `learn`. No image of the run is needed.

        Model, processor, projection, method, head and results are those of the revision. Its tasks are copied to
        `args.output_dir` when the next one is learned.

        Args:
            run_or_repo: a run's output folder, one of its task folders or a copy of one, or a repository on the Hub.
            revision: "task-3" to go on from the state after the third task, by default from the last.
            args: settings of the tasks to come; those that differ from the recorded ones are printed.
            test_dataset: the run's own test images, as far as they are there, on which its tasks are evaluated again;
                without them, the accuracies of old tasks are not measured. See `TaskStream.from_manifest`.
            backbone: the frozen model, or its Hub id or folder, if the revision does not say where it is.
            dtype: precision of the frozen weights, or its name; by default that of a backbone that is passed, or else
                the one that the run was trained in. What learns is in float32. A backbone that is passed is cast itself.
            processing_class: an image processor to use instead of the saved one.
            token, cache_dir, local_files_only: as in every `from_pretrained`; `args.hub_token` by default.
            kwargs: any other argument of the trainer.

        Raises:
            TypeError: no arguments.
            ValueError: a revision that is damaged or altered, has another backbone, or was learned as one task.
        """
        if args is None:
            raise TypeError("args are missing: pass PGPTrainingArguments(output_dir, ...) for the tasks to come.")
        token = args.hub_token if token is None else token
        place = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        opened = learning.open_for_learning(
            run_or_repo, revision, test_dataset, backbone, processing_class, place, dtype
        )
        made = cls.with_method(
            opened.model, args, opened.stream, opened.method, processing_class=opened.processor, **kwargs
        )
        made._go_on(opened.source, learning.origin(opened.source, run_or_repo, revision))
        return made

    @classmethod
    def with_method(
        cls: type[Kind], model: Any, args: PGPTrainingArguments, stream: TaskStream, method: Any, **kwargs: Any
    ) -> Kind:
        """Return a trainer with the method of a finished run."""
        return cls(model, args, stream, method, **kwargs)

    def _go_on(self, source: RunFolder, origin: dict[str, Any]) -> None:
        """Take over the newest task of a run."""
        self._resumer().go_on(source)
        self._source = source
        if self.folder.root.resolve() not in (source.root.resolve(), source.root.resolve().parent):
            self.results.continues = learning.with_origin(origin, self.results.continues)
        self.hub_model_id = self.hub_model_id and self.args.hub_repo(self.results.origin).repo_id
        if self.is_world_process_zero():
            print_differing(self.results.training, recorded_settings(self.args))

    @holding
    def learn(
        self, dataset: Any, test_dataset: Any = None, *, resume_from_checkpoint: bool | None = None, **columns: Any
    ) -> Task:
        """Learn one more task: classes that nobody foresaw, or new images of known ones.

        What the model knows of other classes stays as it is. On an error before training, the run is as it was.

        Args:
            dataset, test_dataset, columns: as `TaskStream.append` takes them.
            resume_from_checkpoint: True continues the task where it stopped, if `output_dir` holds a checkpoint of it; if it
                is finished there, it is taken over.

        Returns:
            The new task.

        Raises:
            ValueError: a dataset, head or method with which this does not work, tasks of the stream that are not
                learned yet, an `output_dir` that holds another run.
        """
        learning.check_next(
            self.stream, self.training_stream, len(self.results.matrix), self.args, self.progress.interrupted
        )
        task = self.stream.append(dataset, test_dataset, **columns)
        try:
            finished, checkpoint = self._prepare(task, bool(resume_from_checkpoint))
        except BaseException:
            self.stream.withdraw()
            raise
        self._fire("on_stream_begin", first_task=task.index + finished)
        if not finished:
            self.train_task(task.index, None if checkpoint is None else str(checkpoint))
        self._fire("on_stream_end", results=self.results.to_dict())
        return task

    def _prepare(self, task: Task, resume: bool) -> tuple[bool, Path | None]:
        """Check an appended task and make room for it; return whether it is finished, else its last checkpoint."""
        learning.check_task(self.stream, task, self.method, self.progress.stored, self.stream_model)
        self._check_choice()
        check_same_images(self.args, self.stream)
        if self.args.verify_images and self.is_world_process_zero():
            self.stream.verify(not self.args.disable_tqdm, task.index if self.method.stores_images else 0)
        if task.index == 0 and not resume:
            check_new(self.args, self.progress, self.folder)
            delete_earlier(self.args, self.folder)
        self._enter(resume)
        found = self._resumer().find(task.index) if resume else (False, None)
        self._room.grow(self.stream_model, task.index, self.args.seed)
        return found

    # ---- starting and resuming -----------------------------------------------------------------------------------

    def _start(self, resume: str | bool | None) -> tuple[int, str | None]:
        """Begin a new run, or take over an earlier one; return the first task, and the checkpoint to enter it by."""
        if not self.stream.num_tasks:
            raise ValueError("the stream has no task yet: learn(dataset), or stream.append(dataset) before train().")
        check_same_images(self.args, self.stream)
        check_agreement(
            self.args, "how to begin", f"resume_from_checkpoint={resume!r}", "Start all processes by the same command."
        )
        if not resume:
            check_new(self.args, self.progress, self.folder)
            return self.results.first, None
        first, checkpoint = self._resumer().resume(resume)
        self.accelerator.wait_for_everyone()
        if first > self.results.first:
            self.eval_dataset = test_sets(self.stream, first)
        else:
            self.optimizer = self.lr_scheduler = None
        return first, None if checkpoint is None else str(checkpoint)

    def _resumer(self) -> Resumer:
        return Resumer(
            args=self.args,
            stream=self.stream,
            model=self._whole_model(),
            learner=self.stream_model,
            method=self.method,
            progress=self.progress,
            folder=self.folder,
            room=self._room,
            predict=self._record,
            blank=self._blank,
        )

    def _enter(self, resume: bool = False) -> None:
        """Bring the files of a run that goes on to `output_dir`, unless they are there."""
        if self._source is not None:
            check_origin(self.args, self.results.origin, self._source, *([self.folder] if resume else []))
            if self.is_world_process_zero():
                self._resumer().enter(self._source, resume)
        self._source = None
        self.accelerator.wait_for_everyone()

    # ---- files ---------------------------------------------------------------------------------------------------

    def _note_first(self, t: int) -> None:
        """Note in the folder of a new run which task is its first."""
        if t == self.results.first and self.is_world_process_zero():
            self.folder.start_at(t)

    def _write_task(self, t: int) -> None:
        if self.is_world_process_zero():
            if tensors := self.progress.references.tensors(t):  # there may be no test image
                write_tensors(self.folder.features(t), tensors)
            keep_samples(self.folder.root, self.stream.test(t), self.args.keep_samples)
            features = self.folder.features(t) if tensors else None
            earlier = folders_to_draw(self.args, self.folder, t, self.stream.num_tasks)
            self.folder.publish(t, partial(self._write_files, features=features, earlier=earlier))
            if self.args.save_full_weights == "last" and not self.args.push_to_hub:  # `PushTasks` waits for the Hub
                self.folder.drop_large(before=t)
            self.folder.drop_checkpoints()
        self.accelerator.wait_for_everyone()

    def _write_files(self, folder: Path, features: Path | None, earlier: list[Path] | None) -> None:
        write_task(
            folder,
            model=self._whole_model(),
            method=self.method,
            processor=self.processing_class,
            progress=self.progress,
            manifest=self.stream.manifest(self.results.num_tasks),
            digest=self._digest,
            features=features,
            earlier=earlier,
        )

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

        `token` and `private` replace those in `args`. Each task has its own message and card.
        """
        check_push(blocking, revision)
        return push_now(self.args, self.folder, token, private) if self.is_world_process_zero() else None
