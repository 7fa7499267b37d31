"""The embeddings of a ViT, with a pool of prompts behind the CLS token."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._shared.pool import cosine_similarity, select_top_k
from .config import L2PConfig


class L2PEmbeddings(nn.Module, BaseTunerLayer):
    """Wraps `ViTEmbeddings`: CLS, then the selected prompts, then the patches.

    Parameters per adapter: `l2p_prompt` `(pool_size, prompt_length, d)` and `l2p_key` `(pool_size, d)`, uniform in
    (-1, 1). Each prompt token gets the position embedding of CLS (L2P's released code).

    Attributes:
        bypass: set during the query pass, which must see the frozen model.
        selected: `(B, top_k)` indices chosen for the last batch, or None.
        inserted: number of prompt tokens in the last output.
        hooks: handles of the tuner's hooks around this layer's model; adapters side by side share them.
    """

    adapter_layer_names = ("l2p_prompt", "l2p_key")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: L2PConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.l2p_prompt = nn.ParameterDict()
        self.l2p_key = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.bypass = False
        self.selected: Tensor | None = None
        self.inserted = 0
        self.hooks: list[RemovableHandle] = []
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        # ViTModel reads patch_embeddings and others through its embeddings
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: L2PConfig) -> None:
        """Add an adapter's prompts and keys."""
        width = self.position_embeddings.shape[-1]
        self.l2p_prompt[adapter_name] = nn.Parameter(
            torch.empty(config.pool_size, config.prompt_length, width).uniform_(-1, 1)
        )
        self.l2p_key[adapter_name] = nn.Parameter(torch.empty(config.pool_size, width).uniform_(-1, 1))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return base_layer.position_embeddings.device, base_layer.position_embeddings.dtype

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use, None when disabled or bypassed."""
        if self.disable_adapters or self.bypass:
            return None
        return next((name for name in self.active_adapters if name in self.l2p_key), None)

    def select(self, query: Tensor, config: L2PConfig) -> Tensor:
        """Choose the prompts of the coming batch.

        Args:
            query: `(B, d)`, the frozen model's CLS feature.

        Returns:
            `(B,)`, each image's summed cosine with its selected keys; its gradient reaches the keys alone.
        """
        similarity = cosine_similarity(query, self.l2p_key[self.adapter])
        self.selected = select_top_k(similarity.detach(), config.top_k, config.batchwise_prompt)
        return similarity.gather(1, self.selected).sum(-1)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embeddings = self.base_layer(pixel_values, *args, **kwargs)
        self.inserted = 0
        if self.adapter is None or self.selected is None:
            return embeddings
        prompts = self.l2p_prompt[self.adapter][self.selected].flatten(1, 2)  # (B, top_k * prompt_length, d)
        if prompts.shape[1] == 0:
            return embeddings
        self.inserted = prompts.shape[1]
        prompts = self.base_layer.dropout(prompts + self.base_layer.position_embeddings[:, :1])
        return torch.cat([embeddings[:, :1], prompts.to(embeddings.dtype), embeddings[:, 1:]], dim=1)
