"""SigLIP's vision tower, also with the weights of SigLIP 2: no CLS token, a pooling head, the mean of the patches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .family import Family


class SiglipFamily(Family):
    """A tower of patches alone: prompts stand in front of them, without a position."""

    def _own_reasons(self, model: nn.Module, backbone: Any) -> Iterator[str]:
        if not isinstance(getattr(backbone, "head", None), nn.Module):
            yield "it lacks the pooling head (vision_use_head=False), whose output selects prompts"

    def offset(self, embeddings: Any) -> Tensor:
        return embeddings.position_embedding.weight.new_zeros(())

    def place(self, embeddings: Any, prompts: Tensor) -> Tensor:
        return prompts

    def set_positions(self, kwargs: dict[str, Any], interpolate: bool) -> None:
        if interpolate:  # the model around the tower says False where its caller has said nothing
            kwargs["interpolate_pos_encoding"] = True

    def query(self, output: Any) -> Tensor:
        query: Tensor = output.pooler_output
        return query

    def with_prompts_read(self, hidden: Tensor, prompts: Tensor) -> Tensor:
        return prompts.expand_as(hidden)  # the head reads the mean of these

    def pooled(self, backbone: Any, hidden: Tensor) -> Tensor:
        pooled: Tensor = backbone.head(hidden)
        return pooled


SIGLIP = SiglipFamily(
    "SigLIP",
    ("SiglipVisionModel",),
    "SiglipForImageClassification",
    "google/siglip2-base-patch16-224",
    query_from="the pooling head's output",
    head_input="the mean of the patches",
    layers="encoder.layers",
    attention="self_attn",
    norm="layer_norm1",
    start=0,
    hands_on=False,
)
