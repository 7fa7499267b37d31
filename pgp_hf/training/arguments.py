"""Training arguments of a stream: `transformers.TrainingArguments` with the published defaults of L2P and PGP."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy

from ..hub import TaskRepo, check_license, choose_repo
from .checks import (
    check_output_dir,
    check_reporting,
    check_together,
    check_values,
    refuse_what_breaks_streams,
    refuse_whole_compilation,
)
from .choosing import CURRENT_ACCURACY, chooses


@dataclass
class PGPTrainingArguments(TrainingArguments):
    """Extend `TrainingArguments` to a stream of tasks; every task is trained with the same arguments.

    The defaults are PGP's released settings for L2P: Adam (AdamW without weight decay) at a constant learning rate of
    0.03 * 16 / 256, batch 16, five epochs per task, gradients clipped at norm 1, and a fresh optimizer for each task.

    Args:
        head_learning_rate: learning rate of the head of a model that is trained without prompts; `learning_rate` by
            default.
        later_prompt_learning_rate: learning rate, from the second task on, of the prompts and keys that tasks share;
            `learning_rate` by default.
        compensate_drift: with a statistics head, move the means of older classes as the features of a task's own images
            have moved while it was trained.
        reinit_optimizer: start each task with a fresh optimizer.
        train_mask: classes in the training loss: the current task's ("task"), or all seen so far ("seen").
        eval_mask: classes that a prediction may take: those seen so far ("seen"), or all ("none").
        augmentation: of training images: "crop_flip", "flip" or "none".
        crop_min_scale: smallest share of the image that a crop keeps, in (0, 1].
        last_block: tokens that the last block of a backbone computes: all of them ("full"), or only those that the head or
            a query reads ("read"), which is a few percent faster and the same up to rounding.
        skip_fixed: compute no gradient of prompts that a projection keeps from moving at all, as "frozen" does after the first
            task, also where `max_grad_norm` clips gradients, whose norm then lacks theirs. Without clipping, it is always done.
        compile_trunk: compile the frozen blocks of a backbone with prompts by `torch.compile`, for the batch sizes of training
            and evaluation; the same up to rounding. It takes a C++ compiler on a CPU, and Triton on a GPU.
        crop_views: number of different random crops of each training image, whose queries are then kept; None for new
            crops in each epoch.
        cache_queries: keep the queries of images, which never change, instead of computing them again.
        exact_images: let the image processor process each image; otherwise, batches are processed at once, which is faster
            and differs by at most one grey level.
        process_on_device: with `exact_images=False`, process them on the device that trains.
        query_cache: folder that queries are kept in, which runs may share; `queries` in `output_dir` by default.
        query_cache_gb: largest size of that folder in GB; 0 keeps queries in memory alone.
        verify_images: decode every image once before training starts.
        figures: draw figures when each task ends ("each"), when the last one does ("last"), or not at all ("none");
            `pgp_hf.report.on_demand.draw_run` draws those of a finished run on demand.
        keep_samples: test images of each class to keep in `output_dir/samples`, for `pgp-hf demo`; they are not uploaded.
        overwrite_output_dir: delete an earlier run in `output_dir`.
        save_full_weights: for a model that is not an adapter, whose folders hold all of its weights: keep those of the
            last finished task ("last") or of every task ("all"); likewise images that a method stores.
        push_to_hub: upload each finished task to the Hub in the background.
        hub_strategy: "every_save" uploads a task as soon as it is finished, "end" all tasks after the last.
        hub_base_model: Hub id of the backbone, named in uploads of a run on a local folder.
        hub_exemplars: upload the images that a method stores (`memory_stores="images"`) as well.
        hub_license: id of the license that uploaded cards name, such as "apache-2.0"; by default they name none.
        hub_wait: longest wait, in seconds, for uploads that are under way when the last task ends.

    All other arguments are those of `TrainingArguments`. Trackers, named by `report_to`, see the stream as one run, whose
    steps are counted over all tasks, with the `task`, its evaluation and its figures; it goes on where the run is resumed.
    TensorBoard finds it in `output_dir`/runs. Whatever is chosen by an evaluation, a checkpoint
    (`load_best_model_at_end`), an early stop or a learning rate, needs a stream with `train_val_split`, and a
    `metric_for_best_model` that every task has: `eval_current_accuracy` of the task in training, the default,
    `eval_mean_accuracy` over all tasks so far, or their losses, `eval_current_loss` and `eval_mean_loss`.

    Raises:
        TypeError: a value of another type, such as None or text where a number belongs.
        ValueError: a value out of range, or a combination that cannot work, each with the fix.
    """

    learning_rate: float = field(
        default=0.001875,
        metadata={
            "help": "learning rate, constant by default; L2P has 0.03 for 256 images a step, which is 0.001875 for 16"
        },
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "training images per step and process"})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "test images per step and process"})
    num_train_epochs: float = field(default=5.0, metadata={"help": "epochs per task; 1 when scenario is online"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "schedule within each task"})
    optim: str = field(default="adamw_torch", metadata={"help": "optimizer; AdamW without weight decay is Adam"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False: images are read lazily"})
    logging_steps: float = field(
        default=10,
        metadata={"help": "steps from one logged training loss to the next; below 1, a share of a task's steps"},
    )
    save_strategy: str = field(
        default="epoch",
        metadata={"help": "when to write a checkpoint to resume from; they are removed when their task ends"},
    )

    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": argparse.SUPPRESS},  # shown by the command lines that train a model without prompts
    )
    later_prompt_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "learning rate, from the second task on, of the prompts and keys that tasks share, which a projection "
            "protects; learning_rate when not given. A first-order projection holds best for small steps"
        },
    )
    compensate_drift: bool = field(
        default=False,
        metadata={
            "help": "with a statistics head: when a task ends, move the means of older classes as the features of the "
            "task's own images have moved, which pass through the model before and after; costs one or two such passes"
        },
    )
    reinit_optimizer: bool = field(default=True, metadata={"help": "start each task with a fresh optimizer"})
    train_mask: Literal["task", "seen"] = field(
        default="task",
        metadata={"help": "classes in the training loss: the current task's ('task') or all seen so far ('seen')"},
    )
    eval_mask: Literal["seen", "none"] = field(
        default="seen",
        metadata={"help": "classes a prediction may take: those seen so far, or all ('none', as in released code)"},
    )
    augmentation: Literal["none", "flip", "crop_flip"] = field(
        default="crop_flip",
        metadata={"help": "of training images: random resized crop and horizontal flip, flip alone, or none"},
    )
    crop_min_scale: float = field(default=0.05, metadata={"help": "smallest share of the image that a crop keeps"})
    last_block: Literal["full", "read"] = field(
        default="full",
        metadata={
            "help": "tokens that the last block of a ViT with prompts computes: all, or only those that are read, which is "
            "faster and the same up to rounding"
        },
    )
    skip_fixed: bool = field(
        default=False,
        metadata={
            "help": "compute no gradient of prompts that a projection keeps from moving at all (frozen, after the first task), "
            "which then do not count in the norm that max_grad_norm clips; without clipping, it is always done"
        },
    )
    compile_trunk: bool = field(
        default=False,
        metadata={
            "help": "compile the frozen blocks of a backbone with prompts (torch.compile), for the batch sizes of training and "
            "evaluation, which takes up to a minute once and is the same up to rounding"
        },
    )
    crop_views: int | None = field(
        default=None,
        metadata={
            "help": "random crops of each training image that its epochs take turns with, so that their queries can be kept; "
            "by default each epoch has new crops"
        },
    )
    cache_queries: bool = field(
        default=True,
        metadata={
            "help": "keep the images' queries, which never change, instead of computing them again: of test images, and "
            "of training images where they have fewer views (one unaugmented, two flipped, crop_views) than passes over "
            "them, unless max_steps is set, or several statistics need them"
        },
    )
    exact_images: bool = field(
        default=True,
        metadata={
            "help": "let the image processor process each image; otherwise, batches are cropped, flipped, resized and "
            "normalised at once, in a third of the time, which differs by at most one grey level, and a task's decoded images "
            "are kept from epoch to epoch"
        },
    )
    process_on_device: bool = field(
        default=False, metadata={"help": "with exact_images off, do that on the device that trains"}
    )
    query_cache: str | None = field(
        default=None,
        metadata={
            "help": "folder that queries are kept in, which runs on the same images and backbone may share, also at the same "
            "time; queries in output_dir when not given, never uploaded"
        },
    )
    query_cache_gb: float = field(
        default=2.0, metadata={"help": "largest size of that folder in GB; 0 keeps queries in memory alone"}
    )
    verify_images: bool = field(default=True, metadata={"help": "decode every image once before training starts"})
    figures: Literal["each", "last", "none"] = field(
        default="last",
        metadata={
            "help": "draw figures when each task ends, which takes a second or two, when the last one does, or not at all; "
            "`python -m pgp_hf.report RUN` draws them on demand"
        },
    )
    keep_samples: int = field(
        default=0,
        metadata={
            "help": "test images of each class to keep in output_dir/samples, for `pgp-hf demo` to offer; never uploaded"
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "delete the files that an earlier run wrote to output_dir, instead of refusing to touch it; all others stay"
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "leave losses that are not finite out of the logged one; such a loss stops the training anyway, and to "
            "look at each step's makes the host wait for a GPU"
        },
    )
    save_full_weights: Literal["last", "all"] = field(
        default="last",
        metadata={
            "help": "of a model that is not an adapter, keep all weights of the last finished task alone ('last') or of "
            "every task ('all'), and so of the images that a method stores; with push_to_hub, they stay until the Hub has "
            "the task"
        },
    )

    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "upload each finished task to the Hub in the background, as one commit on main and a tag task-1, "
            "task-2, ...; checkpoints are never uploaded, and a failed upload never stops the training"
        },
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={
            "help": "repository to upload to: owner/name, or name for your own; by default output_dir's name or, where the "
            "run goes on from the newest revision of a repository on the Hub that the token may write to, that repository"
        },
    )
    hub_private_repo: bool | None = field(
        default=None,
        metadata={
            "help": "make a new repository private; by default, as its owner's settings say. Nothing is uploaded to an "
            "existing public one"
        },
    )
    hub_strategy: HubStrategy | str = field(
        default="every_save",
        metadata={"help": "'every_save': upload a task as soon as it is finished; 'end': all tasks after the last"},
    )
    hub_base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the backbone, to be named in uploads of a run on a local folder"}
    )
    hub_exemplars: bool = field(
        default=False,
        metadata={"help": "also upload training images that the run stores (memory_stores 'images')"},
    )
    hub_license: str | None = field(
        default=None,
        metadata={"help": "license that uploaded cards name, such as apache-2.0; by default they name none"},
    )
    hub_wait: float = field(
        default=300.0,
        metadata={"help": "longest wait, in seconds, for uploads that are under way when the last task ends"},
    )

    def __post_init__(self) -> None:
        check_values(self)  # before transformers compares and converts them
        refuse_whole_compilation(self)  # before it tells all trainers of the process
        if self.metric_for_best_model is None and chooses(self):
            self.metric_for_best_model = CURRENT_ACCURACY  # transformers would take a "loss" that no evaluation has
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns at every loader otherwise
        elif self.dataloader_pin_memory and isinstance(self.accelerator_config, AcceleratorConfig):
            self.accelerator_config.non_blocking = True  # batches travel while the step before is computed
        self.check()

    def check(self) -> None:
        """Raise TypeError or ValueError for a value that cannot work, with the fix; some may have been set since."""
        if self.push_to_hub:
            self.check_hub()
        check_license(self.hub_license, "hub_license")  # cards that are not uploaded name it as well
        check_values(self)
        refuse_whole_compilation(self)
        refuse_what_breaks_streams(self)
        if self.later_prompt_learning_rate is not None and not self.reinit_optimizer:
            raise ValueError(
                "later_prompt_learning_rate and reinit_optimizer=False are mutually exclusive: one optimizer for all tasks "
                "keeps its learning rates."
            )
        if self.crop_views is not None and self.augmentation != "crop_flip":
            raise ValueError(
                f"crop_views={self.crop_views} with augmentation={self.augmentation!r}: there are crops with 'crop_flip' "
                "alone; leave crop_views out."
            )
        check_output_dir(str(self.output_dir))
        check_reporting(self)
        check_together(self)

    def hub_repo(self, origin: dict[str, Any] | None = None, new_run: bool = False) -> TaskRepo:
        """Return the repository to upload to: `hub_model_id`, or the token's user and the name of `output_dir`.

        Args:
            origin: the revision on the Hub that the run goes on from, whose repository is then the default.
            new_run: as `TaskRepo` has it.
        """
        return TaskRepo(
            choose_repo(self.hub_model_id, str(self.output_dir), origin),
            token=self.hub_token,
            private=self.hub_private_repo,
            base_model=self.hub_base_model,
            new_run=new_run,
            exemplars=self.hub_exemplars,
            license=self.hub_license,
            origin=origin,
        )

    def check_hub(self) -> None:
        """Raise ValueError for settings of the Hub that have no meaning for a stream of tasks."""
        if self.hub_strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
            raise ValueError(
                f"hub_strategy={HubStrategy(self.hub_strategy).value!r} would upload checkpoints with their optimizer "
                "state: choose 'every_save' (each task when it is finished) or 'end' (all tasks after the last)."
            )
        if self.hub_revision not in (None, "main"):
            raise ValueError(
                f"hub_revision={self.hub_revision!r}: tasks are commits on main, tagged task-1, task-2, ...; leave it out."
            )
        self.hub_repo()  # checks the ids
