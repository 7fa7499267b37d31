"""DINOv3: rotary positions for patches alone, and the head and the PIL image processor that transformers lacks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTModel,
    DINOv3ViTPreTrainedModel,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import can_return_tuple

from .dinov2 import DINOFamily
from .family import CLS, Rotate


class DINOv3ViTForImageClassification(DINOv3ViTPreTrainedModel):
    """A DINOv3 with a linear head on CLS and the mean of the patches, registers left out, as DINOv2's has it."""

    base_model_prefix = "dinov3"

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinov3 = DINOv3ViTModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Return scores `(B, C)`, and with labels `(B,)` the loss."""
        outputs = self.dinov3(pixel_values, **kwargs)
        tokens = outputs.last_hidden_state
        patches = tokens[:, 1 + self.config.num_register_tokens :]
        logits = self.classifier(torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DINOv3ViTImageProcessorPil(PilBackend):
    """Prepare images as `DINOv3ViTImageProcessor` does, up to rounding, without torchvision."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True


class DINOv3Family(DINOFamily):
    """A DINOv3, whose prompts stand before the registers: the tokens in front of the patches are not turned."""

    def offset(self, embeddings: Any) -> Tensor:
        return embeddings.cls_token.new_zeros(())

    def place(self, embeddings: Any, prompts: Tensor) -> Tensor:
        return prompts

    def rotation(self, backbone: Any, pixel_values: Tensor) -> Rotate:
        cos, sin = backbone.rope_embeddings(pixel_values)
        return partial(apply_rotary_pos_emb, cos=cos, sin=sin)


DINOV3 = DINOv3Family(
    "DINOv3",
    ("DINOv3ViTModel",),
    "DINOv3ViTForImageClassification",
    "facebook/dinov3-vitb16-pretrain-lvd1689m",
    head_input=f"{CLS} and the mean of the patches",
    layers="model.layer",
    norm="norm1",
    parts=2,
)


def _register() -> None:
    """Make transformers find the head and the processor, unless it has come to have its own."""
    if DINOv3ViTConfig not in AutoModelForImageClassification._model_mapping:
        # exist_ok, without which transformers keeps a configuration of its own from a model of others
        AutoModelForImageClassification.register(DINOv3ViTConfig, DINOv3ViTForImageClassification, exist_ok=True)
    known = IMAGE_PROCESSOR_MAPPING_NAMES.get("dinov3_vit", {})
    if "pil" not in known:
        # not by `AutoImageProcessor.register`, which loads the class of the other backend: it takes torchvision
        backends: Any = {**known, "pil": DINOv3ViTImageProcessorPil}
        IMAGE_PROCESSOR_MAPPING.register(DINOv3ViTConfig, backends, exist_ok=True)


_register()
