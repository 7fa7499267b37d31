"""Check by its modules that a model can take prompts, before anything of it is wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "head_dim", "num_attention_heads")


def backbone_name(model: nn.Module) -> str:
    """Return the name of the ViT inside `model`, empty when it is the model itself.

    Raises:
        ValueError: there is none.
    """
    for name, module in model.named_modules():
        embeddings = getattr(module, "embeddings", None)
        if hasattr(embeddings, "patch_embeddings") and hasattr(embeddings, "cls_token"):
            return name
    raise ValueError(_refusal(model, "it has no patch embeddings with a CLS token"))


def check_vit(model: nn.Module, backbone: nn.Module) -> None:
    """Raise ValueError unless prompts can be put into the backbone of a model as into a ViT."""
    for reason in _unlike_vit(backbone):
        raise ValueError(_refusal(model, reason))


def _unlike_vit(backbone: Any) -> Iterator[str]:
    """Yield why prompts do not fit."""
    embeddings, patches = backbone.embeddings, backbone.embeddings.patch_embeddings
    positions, count = (
        getattr(*given, None) for given in ((embeddings, "position_embeddings"), (patches, "num_patches"))
    )
    deep = any(isinstance(module, nn.Conv3d) for module in patches.modules())  # for videos
    if getattr(backbone, "main_input_name", "pixel_values") != "pixel_values" or deep:
        yield "it does not read single images"
    if not isinstance(positions, Tensor) or positions.ndim != 3:
        yield "it adds no position embeddings to its tokens, which prompts would get as well"
    elif not isinstance(count, int) or positions.shape[1] - count not in (1, 2):
        yield "its tokens are not CLS, patches and at most a distillation token"
    if hasattr(embeddings, "random_masking"):
        yield "it leaves out patches at random"
    blocks = getattr(backbone, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not all(_is_block(block) for block in blocks):
        yield "its layers are not those of a ViT, with layernorm_before and an attention of q_proj, k_proj and v_proj"
    if any(name.endswith("position_bias") for name, _ in backbone.named_modules()):
        yield "its attention adds a bias for each pair of positions, and prompts have no position"
    if getattr(backbone.config, "use_mean_pooling", False):
        yield "its head reads the mean of the patches and not the CLS token"


def _is_block(block: nn.Module) -> bool:
    attention = getattr(block, "attention", None)
    return hasattr(block, "layernorm_before") and all(hasattr(attention, name) for name in ATTENTION)


def _refusal(model: nn.Module, reason: str) -> str:
    return (
        f"{type(model).__name__} cannot take visual prompts: {reason}. Use a ViT, DeiT or ViTMSN model, such as "
        "ViTForImageClassification, or train this one without prompts (pgp_hf.set_trainable and StreamTrainer)."
    )


def check_clip(model: nn.Module) -> None:
    """Raise ValueError unless prompts can be put into both towers of a model as into a CLIPModel."""
    parts = (
        *("vision_model.embeddings.class_embedding", "vision_model.embeddings.embed_dim", "vision_model.pre_layrnorm"),
        *(
            "vision_model.encoder.layers",
            "text_model.embeddings.token_embedding",
            "text_model.embeddings.position_embedding",
        ),
        *("visual_projection", "text_projection", "logit_scale"),
    )
    for part in parts:
        if not _has(model, part):
            raise ValueError(
                f"{type(model).__name__} cannot take CLIP prompts: it has no {part}. They need the vision and text towers of a "
                "CLIPModel."
            )


def _has(module: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True
