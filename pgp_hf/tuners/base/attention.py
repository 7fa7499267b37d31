"""Add prefix keys and values to an attention module, by way of transformers' attention interface.

An attention module of transformers calls the function whose name its configuration gives. A wrapped module's
configuration names the function below, which puts the prefixes in front of keys and values and hands over to the
function that the model's own configuration names. Prefixes come as arguments of the module, which most hand on to that
function; SigLIP's does not, and has them as an attribute while it runs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "pgp_prefix"


class _Prefixed(Protocol):
    """An attention module that takes prefixes.

    Attributes:
        config: its own copy of the configuration, which names `prefix_attention`.
        model_config: the configuration that it shares with the rest of the model.
        prefixes: arguments that it does not hand on itself, while it runs.
    """

    config: PreTrainedConfig
    model_config: PreTrainedConfig
    prefixes: dict[str, Any]


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
    """Attend to `[prefix; tokens]`.

    Args:
        module, query, key, value, attention_mask, kwargs: as any function of the interface takes them.
        prefix_key, prefix_value: `(B, H, L, dh)`.
        record: receives the queries `(B, H, T, dh)` and the weights `(B, H, T, L)` that they give to the prefix.
    """
    if prefix_key is not None and prefix_value is not None:
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


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend by the function that the model's own configuration names."""
    # read at each call: `set_attn_implementation` changes it in the model's configuration at any time
    implementation = cast(_Prefixed, module).model_config._attn_implementation
    # "eager" is not in the registry, since every file of models has its own
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, cast(Callable[..., Any], eager))
    found: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **kwargs)
    return found


def _with_carried(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    return prefix_attention(
        module, query, key, value, attention_mask, **{**kwargs, **vars(module).get("prefixes", {})}
    )


AttentionInterface.register(NAME, _with_carried)


@contextmanager
def carrying(attention: nn.Module, prefixes: dict[str, Any]) -> Iterator[None]:
    """Let an attention module that does not hand its arguments on have prefixes inside.

    Args:
        attention: `install` has been called for it.
        prefixes: arguments of `prefix_attention`.
    """
    vars(attention)["prefixes"] = prefixes
    try:
        yield
    finally:
        del vars(attention)["prefixes"]


@contextmanager
def in_products(config: Any) -> Iterator[None]:
    """Let attentions of this configuration multiply their matrices one by one inside the block.

    In bfloat16 on a CPU, that takes a fifth of the time of PyTorch's fused kernel, which makes everything else wait there.
    """
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def install(attention: nn.Module, name: str = NAME) -> None:
    """Let an attention module call the function of this name: by default the one that takes prefixes."""
    own = cast(_Prefixed, attention)
    # a copy, since all modules share one configuration: there the name would reach layers without prefixes, and the
    # functions that make the masks, which depend on it too
    own.model_config, own.config = own.config, copy.copy(own.config)
    # not by the property `_attn_implementation`: it would set sub-configurations as well, which the copy still shares
    own.config._attn_implementation_internal = name


def uninstall(attention: nn.Module) -> None:
    """Undo `install`."""
    own = cast(_Prefixed, attention)
    own.config = own.model_config
    del own.model_config
