"""Change the image size of a backbone for good."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def resized(model: PreTrainedModel, side: int) -> PreTrainedModel:
    """Return the model for square images of this size, with a ViT's position embeddings interpolated to it.

    A model without position embeddings, such as a convolutional network, is returned as it is.
    """
    found = {}
    for name, module in model.named_modules():
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, nn.Parameter) and hasattr(module, "interpolate_pos_encoding"):
            special = positions.shape[1] - module.patch_embeddings.num_patches  # the CLS token, for example
            patches = (side // model.config.patch_size) ** 2
            tokens = positions.new_empty(1, special + patches, positions.shape[2])
            found[f"{name}.position_embeddings"] = module.interpolate_pos_encoding(tokens, side, side)
    if not found or model.config.image_size == side:
        return model
    config = copy.deepcopy(model.config)
    config.image_size = side
    made: Any = type(model)(config)
    made.to(model.dtype).load_state_dict({**model.state_dict(), **found})
    return made.eval()
