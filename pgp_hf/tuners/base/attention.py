"""Prefix keys and values, through transformers' attention interface.

Each wrapped attention module gets its own copy of the configuration, which names the function below; the model's
configuration, and with it masks and the back end, stays as it is. The function puts the prefixes in front of keys and
values and hands over to the model's back end, read at each call.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "pgp_prefix"


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    record: list[tuple[Tensor, Tensor]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over `[prefix; tokens]`; arguments as any function of the interface, prefixes `(B, H, L, dh)`.

    `record` receives the queries `(B, H, T, dh)` and the weights `(B, H, T, L)` that they give to the prefix.
    """
    config = module.model_config
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    if prefix_key is not None:
        length = prefix_key.shape[2]
        key = torch.cat([prefix_key.to(key.dtype), key], dim=2)
        value = torch.cat([prefix_value.to(value.dtype), value], dim=2)
        if attention_mask is not None:  # everything may attend to the prefix
            attention_mask = F.pad(
                attention_mask, (length, 0), value=True if attention_mask.dtype == torch.bool else 0.0
            )
        if record is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            weights = (query.float() @ key.float().mT * scaling).softmax(-1)
            record.append((query, weights[..., :length]))
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, prefix_attention)


def install(attention: nn.Module) -> None:
    """Let an attention module take prefixes."""
    object.__setattr__(attention, "model_config", attention.config)
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = NAME


def uninstall(attention: nn.Module) -> None:
    """Undo `install`."""
    attention.config = attention.model_config
    object.__delattr__(attention, "model_config")
