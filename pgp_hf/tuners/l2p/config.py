"""Configure the L2P adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...backbones.family import CLS
from ..base.card import AdapterCard, entries, setting
from ..base.config import PoolConfig

HEAD_TYPES = ("prompt", "token")


@dataclass
class L2PConfig(PoolConfig):
    """Configure a prompt pool on a frozen ViT; the defaults are those that PGP used.

    Args:
        pool_size: number of prompts in the pool, each with a key.
        prompt_length: tokens per prompt; 0 leaves the model as it is.
        top_k: number of prompts selected for each image.
        grow_pool: number of prompts that each task from the second on adds to the pool, where images can select them
            from then on; None for a pool of fixed size.
        head_type: what the head reads: "prompt", the mean of the prompt tokens; "token", the CLS token. Where the
            backbone's head reads the mean of the patches as well, it still does.
        batchwise_prompt: let each batch vote on its prompts, as the released code does. It is for comparison only,
            since a prediction then depends on the other images in its batch.
        pull_constraint_coeff: weight of the pull term, which draws the selected keys towards the query.
        interpolate_pos_encoding: interpolate the position embeddings to the input's size, for a backbone trained at
            another.
        head: what classifies: "linear", the trained linear head; "statistics", the class means and the covariance of
            finished tasks.
        shrinkage: how far the statistics head's covariance is drawn towards an isotropic one, in (0, 1].
        modules_to_save: names of modules that are trained and saved whole; the classifier by default, [] for none.
        learned_entries: number of prompts that images can select so far, None for all; filled in with `grow_pool`.
        added_entries: number of prompts that tasks have added; filled in with `grow_pool`.
        hidden_size, id2label, image_size, head_input, target_modules, exclude_modules: filled in; leave them out.

    Raises:
        ValueError: sizes that are negative, `top_k` above `pool_size`, an unknown `head_type`.
    """

    method_name = "L2P"
    command_line = (
        "pool_size",
        "prompt_length",
        "top_k",
        "grow_pool",
        "pull_constraint_coeff",
        "head_type",
        "batchwise_prompt",
    )

    pool_size: int = field(default=10, metadata={"help": "number of prompts in the pool, each with a key"})
    prompt_length: int = field(default=5, metadata={"help": "tokens per prompt; 0 leaves the model as it is"})
    top_k: int = field(default=5, metadata={"help": "prompts selected for each image"})
    grow_pool: int | None = field(
        default=None,
        metadata={"help": "prompts that each task from the second on adds to the pool; none by default"},
    )
    head_type: str = field(
        default="prompt",
        metadata={"help": "what the head reads: 'prompt', the mean of the prompt tokens; 'token', the CLS token"},
    )
    batchwise_prompt: bool = field(
        default=False,
        metadata={
            "help": "let each batch vote on its prompts, as the released code does; for comparison only, since a "
            "prediction then depends on the other images in its batch"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(prompt_length=0, top_k=0)
        if self.grow_pool is not None:
            self._at_least(grow_pool=1)
        if self.learned_entries is not None and not self.pool_size <= self.learned_entries <= self.entries:
            raise ValueError(
                f"learned_entries={self.learned_entries} is out of range: expected {self.pool_size} to {self.entries}, the "
                "pool as it began and as it is. Leave it out."
            )
        if self.top_k > self.pool_size:
            raise ValueError(
                f"top_k={self.top_k} is above pool_size={self.pool_size}: an image cannot select more prompts than "
                "there are. Lower top_k or enlarge the pool."
            )
        if self.head_type not in HEAD_TYPES:
            raise ValueError(f"head_type={self.head_type!r} is unknown: choose one of {', '.join(HEAD_TYPES)}.")
        if self.batchwise_prompt:
            warnings.warn(
                "batchwise_prompt=True lets the other images of a batch decide which prompts an image gets: "
                "predictions depend on batch size and order, and leak the task when a batch holds one task. "
                "Use it only to compare with released code.",
                stacklevel=3,
            )

    @classmethod
    def card(cls, settings: Mapping[str, Any]) -> AdapterCard:
        pool, length, top_k = entries(settings), setting(settings, "prompt_length"), setting(settings, "top_k")
        each = "batch" if settings.get("batchwise_prompt") else "image"
        features = settings.get("head_input") or CLS
        if settings.get("head_type") == "prompt":  # in the place of CLS, or of all if there is none
            prompts = "the mean of the prompt tokens"
            features = features.replace(CLS, prompts) if CLS in features else prompts
        return AdapterCard(
            parts=f"{pool} prompts of {length} tokens, {top_k} of them selected for each {each}",
            selects=True,
            features=features,
            head=f"linear, on {features}",
            trained_head="the linear head",
            linear_head=True,
        )
