"""Wrap the embeddings of a backbone, with a pool of prompts behind the CLS token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..base.embeddings import PromptedEmbeddings
from ..base.layer import uniform
from ..base.learned import add_learned_entries
from .config import L2PConfig

if TYPE_CHECKING:
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    from ...backbones import Family


class L2PEmbeddings(PromptedEmbeddings):
    """Wrap embeddings such as `ViTEmbeddings`: CLS, then the selected prompts, then the patches.

    Parameters per adapter: `l2p_prompt` `(M, prompt_length, d)` and `l2p_key` `(M, d)`, M the size of the pool. Each prompt
    token gets the position embedding of CLS (L2P's released code), if it has one.

    Attributes:
        family: of the backbone.
        inserted: number of prompt tokens in the last output.
    """

    adapter_layer_names = ("l2p_prompt", "l2p_key")
    base_layer: ViTEmbeddings
    l2p_prompt: nn.ParameterDict
    l2p_key: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, family: Family) -> None:
        super().__init__(base_layer)
        self.family = family
        self.inserted = 0

    def update_layer(self, adapter_name: str, config: L2PConfig) -> None:
        width = cast(int, config.hidden_size)
        self.add_parameters(
            adapter_name,
            config.inference_mode,
            l2p_prompt=uniform(config.entries, config.prompt_length, width),
            l2p_key=uniform(config.entries, width),
        )
        if config.grow_pool is not None:
            add_learned_entries(self, "l2p_", adapter_name, config)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embeddings = self.embed(pixel_values, *args, **kwargs)
        self.inserted = 0
        if self.adapter is None or self.selected is None:
            return embeddings
        prompts = self.capture_per_sample(
            "l2p_prompt", self.l2p_prompt[self.adapter][self.selected]
        )  # (B, top_k, length, d)
        prompts = prompts.flatten(1, 2)
        if prompts.shape[1] == 0:
            return embeddings
        self.inserted = prompts.shape[1]
        prompts, start = self.family.place(self.base_layer, prompts), self.family.start
        return torch.cat([embeddings[:, :start], prompts.to(embeddings.dtype), embeddings[:, start:]], dim=1)
