"""Settings of the L2P adapter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from peft import PeftConfig

from .._shared.registration import extend_peft_type

HEAD_TYPES = ("prompt", "token")


@dataclass
class L2PConfig(PeftConfig):
    """A prompt pool on a frozen ViT; the defaults are those that PGP used (pgp_hf's presets name the rest).

    Raises:
        ValueError: sizes that are negative, `top_k` above `pool_size`, an unknown `head_type`.
    """

    pool_size: int = field(default=10, metadata={"help": "number M of prompts in the pool, each with a key"})
    prompt_length: int = field(default=5, metadata={"help": "tokens per prompt; 0 leaves the model as it is"})
    top_k: int = field(default=5, metadata={"help": "prompts selected for each image"})
    pull_constraint_coeff: float = field(
        default=0.1, metadata={"help": "weight of the pull term, which draws selected keys to the query"}
    )
    head_type: str = field(
        default="prompt",
        metadata={"help": "what the head reads: 'prompt', the mean of the prompt tokens; 'token', the CLS token"},
    )
    batchwise_prompt: bool = field(
        default=False,
        metadata={
            "help": "select by a vote of the batch, as released code does; for comparison only, since predictions "
            "then depend on the neighbours in the batch"
        },
    )
    interpolate_pos_encoding: bool = field(
        default=False,
        metadata={
            "help": "interpolate the position embeddings to the input's size, for a backbone trained at another"
        },
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "width of the backbone; filled in when the adapter is added"}
    )
    id2label: dict[int, str] | None = field(
        default=None,
        metadata={"help": "class names; filled in from the model, so that every loader can rebuild the head"},
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "name of the embeddings module; found when the adapter is added"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "unused; PEFT reads it"})
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "modules trained and saved whole; the classifier by default, [] for none"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("L2P")
        for name, least in (("pool_size", 1), ("prompt_length", 0), ("top_k", 0), ("pull_constraint_coeff", 0)):
            if not getattr(self, name) >= least:  # also NaN
                raise ValueError(f"{name}={getattr(self, name)} is too small: it must be at least {least}.")
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
        if self.id2label is not None:
            self.id2label = {int(index): name for index, name in self.id2label.items()}  # JSON has string keys
