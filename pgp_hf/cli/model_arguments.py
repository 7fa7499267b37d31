"""Declare the arguments of the command lines that say which backbone there is, and load it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedModel,
)

from .. import embedded
from ..backbones.loading import errors_only, renew_head, with_head_of
from ..data.stream import TaskStream
from ..runs.folder import ADAPTER_CONFIG
from ..runs.sources import check_id
from .resize import resized


@dataclass
class ModelArguments:
    """Describe the frozen backbone.

    Args:
        model_name_or_path: Hub id or local folder; the small backbone of this package by default.
        model_revision: branch, tag or commit on the Hub.
        image_size: side of the input in pixels, a multiple of the patch size; the backbone's own by default.
        image_mean: mean subtracted from pixel values in [0, 1], one number or one per channel.
        image_std: standard deviation that pixel values are then divided by, one number or one per channel.
        attn_implementation: attention implementation of transformers.
        dtype: precision of the frozen weights.

    Attributes:
        kind: "vit" or "clip": the embedded backbone to use without `model_name_or_path`.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder of the backbone; without it, the small one inside this package is used"
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the backbone on the Hub"}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "side of the input in pixels, a multiple of the patch size; the backbone's own by default"},
    )
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "mean subtracted from pixel values in [0, 1], one number or one per channel; the backbone's own by "
            "default"
        },
    )
    image_std: list[float] | None = field(
        default=None,
        metadata={
            "help": "standard deviation that pixel values are then divided by, one number or one per channel; the "
            "backbone's own by default. Mean 0 and standard deviation 1 leave pixels in [0, 1]"
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention implementation: eager, sdpa, flash_attention_2, ..."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "precision of the frozen weights, whatever that of the checkpoint; float16 goes with --fp16. What learns "
            "is always in float32. To compute in half precision, choose --bf16, which leaves the weights as they are"
        },
    )
    kind: str = field(default="vit", init=False)

    def __post_init__(self) -> None:
        if self.model_revision is not None and self.model_name_or_path is None:
            raise ValueError("--model_revision goes with --model_name_or_path, which is not given.")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(
                f"image_size={self.image_size}: expected a multiple of the backbone's patch size, such as 224."
            )

    @property
    def source(self) -> str:
        """Hub id or folder of the backbone."""
        return self.model_name_or_path or str(embedded.clip_path() if self.kind == "clip" else embedded.vit_path())

    def processor(self) -> BaseImageProcessor:
        """Load the backbone's image processor, with `image_size`, `image_mean` and `image_std` set.

        Raises:
            ValueError: no such backbone, or one without an image processor; a mean or standard deviation with a wrong
                number of channels; a standard deviation that is not above 0.
        """
        source = self.source
        if not os.path.isdir(source):
            check_id(source, "the folder of a backbone")
        elif os.path.isfile(os.path.join(source, ADAPTER_CONFIG)):
            raise ValueError(
                f"{source} holds an adapter: expected the backbone alone. `pgp-hf learn` continues a run."
            )
        try:
            processor: Any = AutoImageProcessor.from_pretrained(
                source, revision=self.model_revision or "main", backend="pil"
            )
        except OSError as error:
            where = "" if os.path.isdir(source) else f"; there is no folder {source} here"
            raise ValueError(f"the image processor of {source} cannot be loaded{where}: {error}") from error
        if self.image_size is not None:
            square = {"height": self.image_size, "width": self.image_size}
            if getattr(processor, "do_center_crop", False):  # as CLIP's: resize the short side, then crop
                processor.size, processor.crop_size = {"shortest_edge": self.image_size}, square
            else:
                processor.size = square
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is None:
                continue
            channels = len(getattr(processor, name))
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{name}={values} has {len(values)} numbers: give one, or one for each of {channels} channels."
                )
            if name == "image_std" and not min(values) > 0:
                raise ValueError(f"image_std={values} must be above 0: pixel values are divided by it.")
            setattr(processor, name, [*values] * (channels // len(values)))
            processor.do_normalize = True
        return processor

    def backbone(self, stream: TaskStream, resize: bool = False) -> PreTrainedModel:
        """Load the backbone with a new head for the stream's classes.

        Args:
            stream: the tasks.
            resize: interpolate the position embeddings to `image_size` here, for a model that is trained itself; an
                adapter does so at each forward pass.

        Raises:
            ValueError: an image size that is not a multiple of the patch size.
        """
        model = with_head_of(
            stream,
            self.source,
            self.model_revision,
            attn_implementation=self.attn_implementation,
            dtype=self.dtype,
        )
        patch = getattr(getattr(model.config, "vision_config", model.config), "patch_size", 1)
        if self.image_size is not None and (self.image_size < patch or self.image_size % patch):
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of the backbone's patch size {patch}: "
                f"choose, for example, {max(1, round(self.image_size / patch)) * patch}."
            )
        if resize and self.image_size is not None:
            model = resized(model, self.image_size)
        renew_head(model)
        return model

    def clip(self) -> CLIPModel:
        """Load the backbone as a `CLIPModel`."""
        with errors_only():
            return CLIPModel.from_pretrained(
                self.source,
                revision=self.model_revision or "main",
                attn_implementation=self.attn_implementation,
                dtype=self.dtype,
            )

    def tokenizer(self) -> CLIPTokenizer:
        """Load the tokenizer that belongs to the `CLIPModel`."""
        return CLIPTokenizer.from_pretrained(self.source, revision=self.model_revision or "main")

    def interpolates(self, model: PreTrainedModel) -> bool:
        """Return True if `image_size` is not the size that the backbone was trained at."""
        config = getattr(model.config, "vision_config", model.config)
        return self.image_size is not None and self.image_size != config.image_size
