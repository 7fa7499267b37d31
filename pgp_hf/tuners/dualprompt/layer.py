"""Wrap a backbone's attention, with general and expert prefixes, and its embeddings, with the experts' keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..base.attention import carrying, install, uninstall
from ..base.embeddings import PromptedEmbeddings
from ..base.layer import PromptLayer, uniform
from ..base.learned import add_learned_entries
from .config import DualPromptConfig

if TYPE_CHECKING:
    from transformers.models.vit.modeling_vit import ViTAttention

    from ...backbones import Family


class DualPromptEmbeddings(PromptedEmbeddings):
    """Wrap the embeddings to hold the experts' keys, `(pool_size, d)`; the forward pass is the backbone's own."""

    adapter_layer_names = ("dualprompt_key",)
    dualprompt_key: nn.ParameterDict

    def update_layer(self, adapter_name: str, config: DualPromptConfig) -> None:
        key = uniform(config.entries, cast(int, config.hidden_size))
        self.add_parameters(adapter_name, config.inference_mode, dualprompt_key=key)
        add_learned_entries(self, "dualprompt_", adapter_name, config)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.embed(*args, **kwargs)


class DualPromptAttention(PromptLayer):
    """Wrap an attention such as `ViTAttention`: keys become `[p_k; k]`, values `[p_v; v]`; queries and the sequence stay.

    Prefixes are in the space of projected keys and values (no W_k, W_v, LayerNorm or position), for each head. In each
    parameter the first axis is that of the heads, and the last the one along which a projection acts:

        dualprompt_general_key    (H, L, dh)       dualprompt_general_value  (H, dh, L)
        dualprompt_expert_key     (H, M, L, dh)    dualprompt_expert_value   (H, M, L, dh)

    Attributes:
        mixture: weight of each expert for each image of the running batch, `(B, M)`; None to use the selected ones.
        record: a list that receives queries and prefix weights of the next forward passes, or None.
    """

    adapter_layer_names = (
        "dualprompt_general_key",
        "dualprompt_general_value",
        "dualprompt_expert_key",
        "dualprompt_expert_value",
    )
    base_layer: ViTAttention
    dualprompt_general_key: nn.ParameterDict
    dualprompt_general_value: nn.ParameterDict
    dualprompt_expert_key: nn.ParameterDict
    dualprompt_expert_value: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, family: Family) -> None:
        super().__init__(base_layer)
        self.family = family
        self.mixture: Tensor | None = None
        self.record: list[tuple[Tensor, Tensor]] | None = None
        install(base_layer)

    def release(self) -> None:
        uninstall(self.base_layer)

    def update_layer(self, adapter_name: str, config: DualPromptConfig, general: bool, expert: bool) -> None:
        width = self.base_layer.head_dim
        heads = self.base_layer.k_proj.out_features // width
        parameters: dict[str, Tensor] = {}
        if general:
            parameters["dualprompt_general_key"] = uniform(heads, config.general_length, width)
            parameters["dualprompt_general_value"] = uniform(heads, width, config.general_length)
        if expert:
            shape = heads, config.entries, config.expert_length, width
            parameters["dualprompt_expert_key"] = uniform(*shape)
            parameters["dualprompt_expert_value"] = uniform(*shape)
        self.add_parameters(adapter_name, config.inference_mode, **parameters)

    def prepare(self, batch: int) -> None:
        self.prepared = self._prefix(batch)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # `len` would fix the size of batches in an export
        prefix = self._prefix(hidden_states.shape[0]) if self.prepared is None else self.prepared
        if prefix is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        given = {"prefix_key": prefix[0], "prefix_value": prefix[1], "record": self.record}
        if self.family.hands_on:
            return self.base_layer(hidden_states, *args, **kwargs, **given)
        with carrying(self.base_layer, given):
            return self.base_layer(hidden_states, *args, **kwargs)

    def _prefix(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """Return the prefix keys and values of the running batch, `(B, H, L, dh)` each, general before expert."""
        name, keys, values = self.adapter, [], []
        if name is None or self.selected is None:
            return None
        if name in self.dualprompt_general_key:
            keys.append(self.expand_to_batch("dualprompt_general_key", batch))
            values.append(self.expand_to_batch("dualprompt_general_value", batch).mT)
        if name in self.dualprompt_expert_key:
            for found, experts in ((keys, self.dualprompt_expert_key), (values, self.dualprompt_expert_value)):
                if self.mixture is None:
                    found.append(experts[name][:, self.selected[:, 0]].transpose(0, 1))
                else:
                    known = experts[name][:, : self.mixture.shape[1]]
                    found.append(torch.einsum("bm,hmld->bhld", self.mixture.to(known), known))
        length = sum(key.shape[2] for key in keys)  # 0 where both lengths are
        return (torch.cat(keys, dim=2), torch.cat(values, dim=2)) if length else None
