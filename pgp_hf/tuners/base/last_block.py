"""Let the last block of a backbone compute only the tokens that are read, for which it needs keys and values of all.

The block gets those tokens alone, so that its queries, its output projection and its MLP are theirs. Its attention asks the
function below, which makes keys and values of all tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from .attention import attend, install, uninstall

NAME, TOKENS = "pgp_read", "_all_tokens"


def read_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend to all tokens, of which the module was given the first ones alone."""
    tokens = module.__dict__.pop(TOKENS, None)
    if tokens is not None:
        shape = *tokens.shape[:-1], -1, module.head_dim
        key, value = (project(tokens).view(shape).transpose(1, 2) for project in (module.k_proj, module.v_proj))
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, read_attention)


def begin_reading(attention: nn.Module) -> None:
    """Let the last block's attention take tokens by `narrow`."""
    if not is_reading(attention):
        install(attention, NAME)


def end_reading(attention: nn.Module) -> None:
    """Undo `begin_reading`."""
    if is_reading(attention):
        uninstall(attention)


def is_reading(attention: nn.Module) -> bool:
    """Return True between `begin_reading` and `end_reading`."""
    config: Any = getattr(attention, "config", None)
    return getattr(config, "_attn_implementation", None) == NAME


def forget(attention: nn.Module) -> None:
    """Drop the tokens of a pass that has failed within the block."""
    attention.__dict__.pop(TOKENS, None)


def narrow(attention: nn.Module, norm: nn.Module, hidden: Tensor, count: int) -> Tensor:
    """Return the first tokens of what enters the block, `(B, count, d)`; the next attention attends to all of them."""
    attention.__dict__[TOKENS] = norm(hidden)  # taken off by the attention: a tensor with a graph cannot be copied
    return hidden[:, :count]
