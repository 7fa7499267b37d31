"""Tiny models of every family of backbones."""

from __future__ import annotations

import tiny
import torch
import transformers as hf
from transformers import PreTrainedModel

from pgp_hf.backbones import FAMILIES, Family
from pgp_hf.backbones.dinov3 import DINOv3ViTForImageClassification

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
LEADING = {
    "DeiT": 2,
    "DINOv2 with registers": 3,
    "DINOv3": 3,
    "SigLIP": 0,
}  # tokens that are not patches, 1 by default
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": tiny.SIDE,
    "patch_size": 5,
}


def classifier_of(family: Family) -> type[PreTrainedModel]:
    return getattr(hf, family.classifier, DINOv3ViTForImageClassification)


def config(name: str, attention: str = "sdpa", labels: int = tiny.CLASSES, **settings) -> hf.PreTrainedConfig:
    made = classifier_of(BY_NAME[name]).config_class
    sizes = {**SIZES, **settings, "attn_implementation": attention}
    if name == "DINOv3":
        sizes["hidden_size"] = 36  # of heads whose width can be divided by 4, as rotary positions take it
    if name.startswith("DINOv"):
        sizes.update(num_register_tokens=2)
    if name == "SigLIP":
        sizes = {"vision_config": sizes, "attn_implementation": attention}
    return made(num_labels=labels, initializer_range=0.2, **sizes)


def make(name: str, attention: str = "sdpa", **settings) -> PreTrainedModel:
    """Return an untrained model with a head, of a family by its name."""
    with tiny.seeded(7):
        model = classifier_of(BY_NAME[name])(config(name, attention, **settings)).eval()
        for parameter in model.parameters():  # some begin at 0: tokens, positions, biases
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


ADAPTED = [(name, adapter) for name in BY_NAME for adapter in ("l2p", "dualprompt")]
