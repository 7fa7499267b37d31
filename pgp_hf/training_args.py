"""Training arguments of a stream: `transformers.TrainingArguments` with the published defaults of L2P and PGP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


@dataclass
class PGPTrainingArguments(TrainingArguments):
    """`TrainingArguments` for one stream of tasks; every task is trained with these.

    Defaults: Adam at a constant learning rate of 0.03 * 16 / 256, batch 16, five epochs per task, gradients clipped at
    norm 1, a fresh optimizer per task (PGP's released settings for L2P; AdamW without weight decay is Adam).

    Raises:
        ValueError: a combination that cannot work, each with the fix.
    """

    learning_rate: float = field(default=0.001875, metadata={"help": "constant learning rate: 0.03 * 16 / 256"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "training images per step and process"})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "test images per step and process"})
    num_train_epochs: float = field(default=5.0, metadata={"help": "epochs per task; 1 when scenario is online"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "schedule within each task"})
    optim: str = field(default="adamw_torch", metadata={"help": "optimizer; AdamW without weight decay is Adam"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False: images are read lazily"})
    save_strategy: str = field(
        default="epoch",
        metadata={"help": "when to write a checkpoint to resume from; they are removed when their task ends"},
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
    cache_queries: bool = field(
        default=True,
        metadata={"help": "keep the test images' queries, which never change, instead of computing them again"},
    )
    verify_images: bool = field(default=True, metadata={"help": "decode every image once before training starts"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "delete an earlier run in output_dir instead of refusing to touch it"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns at every loader otherwise
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub=True would upload checkpoints and optimizer state, not finished tasks: train without it, "
                "then upload a finished task, for example `hf upload USER/NAME OUTPUT_DIR/task-3`."
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True would cast the prompts for good, and rounding undoes the projection: use bf16=True, "
                    "which keeps them in float32."
                )
        if not self.eval_do_concat_batches:
            raise ValueError("eval_do_concat_batches=False leaves test images in pieces: leave it True.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the images before they are read: leave it False.")
        if self.deepspeed:
            raise ValueError(
                "deepspeed steps flattened shards, which cannot be projected, and prompts are far too small to gain "
                "from it: launch with plain data parallelism (accelerate launch --multi_gpu) or FSDP2."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process mean nn.DataParallel, whose replicas share the prompt selection: "
                "start with `accelerate launch`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
            )
        if not 0 < self.crop_min_scale <= 1:
            raise ValueError(f"crop_min_scale={self.crop_min_scale} is outside (0, 1]: it is a share of the image.")
        for name, allowed in (
            ("train_mask", ("task", "seen")),
            ("eval_mask", ("seen", "none")),
            ("augmentation", ("none", "flip", "crop_flip")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
