"""ViT and what is built like it: DeiT and ViT-MSN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .family import Family


class ViTLike(Family):
    """A model with the modules of a ViT."""

    def _own_reasons(self, model: nn.Module, backbone: Any) -> Iterator[str]:
        embeddings, patches = backbone.embeddings, backbone.embeddings.patch_embeddings
        positions, count = (
            getattr(*given, None) for given in ((embeddings, "position_embeddings"), (patches, "num_patches"))
        )
        if hasattr(model, "distillation_classifier"):
            yield (
                "it has two heads, for CLS and the distillation token, of which one can learn; load its checkpoint with "
                "one, by pgp_hf.load_backbone(name, stream)"
            )
        if any(isinstance(module, nn.Conv3d) for module in patches.modules()):  # for videos
            yield "it does not read single images"
        if not isinstance(positions, Tensor) or positions.ndim != 3:
            yield "it adds no position embeddings to its tokens, which prompts would get as well"
        elif not isinstance(count, int) or positions.shape[1] - count not in (1, 2):
            yield "its tokens are not CLS, patches and at most a distillation token"
        if hasattr(embeddings, "random_masking"):
            yield "it leaves out patches at random"
        if any(name.endswith("position_bias") for name, _ in backbone.named_modules()):
            yield "its attention adds a bias for each pair of positions, and prompts have no position"
        if getattr(backbone.config, "use_mean_pooling", False):
            yield "its head reads the mean of the patches and not the CLS token"


class ViTFamily(ViTLike):
    """A ViT, by name or by its modules."""

    def fits(self, module: nn.Module) -> bool:
        embeddings = getattr(module, "embeddings", None)
        return hasattr(embeddings, "patch_embeddings") and hasattr(embeddings, "cls_token")


VIT = ViTFamily("ViT", ("ViTModel",), "ViTForImageClassification", "google/vit-base-patch16-224-in21k")
# a distillation token, if there is one, is not read
DEIT = ViTLike("DeiT", ("DeiTModel",), "DeiTForImageClassification", "facebook/deit-base-distilled-patch16-224")
VIT_MSN = ViTLike("ViT-MSN", ("ViTMSNModel",), "ViTMSNForImageClassification", "facebook/vit-msn-base")
