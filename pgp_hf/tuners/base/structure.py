"""Check by its modules that a model can take CLIP prompts, before anything of it is wrapped."""

from __future__ import annotations

from torch import nn


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
