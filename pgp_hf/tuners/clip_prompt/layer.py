"""Wrap the embeddings of CLIP, with image prompts behind CLS and context tokens before the class name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..base.layer import PromptLayer
from .config import ClipPromptConfig

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPTextEmbeddings, CLIPVisionEmbeddings


class ClipImagePrompt(PromptLayer):
    """Wrap `CLIPVisionEmbeddings`: CLS, then `clip_prompt_image` `(L, d)`, then the patches.

    The prompts get no position embedding and pass the pre-norm with the tokens (released code of CLIP-PGP).

    Attributes:
        inserted: number of prompt tokens in the last output.
    """

    adapter_layer_names = ("clip_prompt_image",)
    base_layer: CLIPVisionEmbeddings
    clip_prompt_image: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inserted = 0

    def update_layer(self, adapter_name: str, config: ClipPromptConfig) -> None:
        width = self.base_layer.embed_dim
        prompt = torch.empty(config.image_length, width).uniform_(-(width**-0.5), width**-0.5)
        self.add_parameters(adapter_name, config.inference_mode, clip_prompt_image=prompt)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embeddings = self.base_layer(pixel_values, *args, **kwargs)
        self.inserted = 0
        if self.adapter is None or len(self.clip_prompt_image[self.adapter]) == 0:
            return embeddings
        prompts = self.expand_to_batch("clip_prompt_image", embeddings.shape[0])  # `len` would fix it in an export
        self.inserted = prompts.shape[1]
        return torch.cat([embeddings[:, :1], prompts.to(embeddings.dtype), embeddings[:, 1:]], dim=1)


class ClipTextContext(PromptLayer):
    """Wrap `CLIPTextEmbeddings`: the context of the running task takes the place of the tokens 1 to L.

    `clip_prompt_context` `(M, L, d)` holds the contexts (CoOp: generic, class token at the end), the buffer
    `clip_prompt_features` `(C, P)` each class's projected text feature: zero-shot until its task has ended, then
    constant, since its context never moves again.

    Attributes:
        entry: index of the context that the text in the running forward pass takes, None for the text as it is.
    """

    adapter_layer_names = ("clip_prompt_context",)
    other_param_names = ("clip_prompt_features",)
    base_layer: CLIPTextEmbeddings
    clip_prompt_context: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.clip_prompt_features = BufferDict({}, persistent=True)
        self.entry: int | None = None

    def update_layer(self, adapter_name: str, config: ClipPromptConfig, projection_dim: int) -> None:
        width = self.base_layer.token_embedding.embedding_dim
        context = 0.02 * torch.randn(config.entries, config.text_length, width)
        self.clip_prompt_features[adapter_name] = torch.zeros(len(config.class_tokens or []), projection_dim)
        self.add_parameters(adapter_name, config.inference_mode, clip_prompt_context=context)

    def forward(self, input_ids: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.adapter is None or self.entry is None:
            return self.base_layer(input_ids=input_ids, position_ids=position_ids, **kwargs)
        tokens = self.base_layer.token_embedding(input_ids)
        context = self.clip_prompt_context[self.adapter][self.entry].to(tokens.dtype).expand(len(tokens), -1, -1)
        tokens = torch.cat([tokens[:, :1], context, tokens[:, 1 + context.shape[1] :]], dim=1)
        return self.base_layer(inputs_embeds=tokens, position_ids=position_ids)
