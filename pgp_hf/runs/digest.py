"""The digest of a frozen backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn


def backbone_key(model: nn.Module) -> str:
    """Under which name `results.json` keeps a backbone's digest; weights of another precision have another."""
    return f"backbone.{str(next(model.parameters()).dtype).removeprefix('torch.')}"


@torch.no_grad()
def backbone_sha256(model: nn.Module, modules_to_save: Iterable[str] | None) -> str | None:
    """Digest of a model's frozen weights, the same with and without an adapter; None when they are sharded.

    Args:
        model: the backbone, or a model that a prompt adapter has wrapped.
        modules_to_save: names of the modules that the adapter brings along, which do not count.
    """
    brought = set(modules_to_save or ()) | {"modules_to_save"}
    own = {
        id(parameter)
        for module in model.modules()
        for container in getattr(module, "adapter_layer_names", ())
        for parameter in getattr(module, container).parameters()
    }
    digests = []
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "to_local"):
            return None
        if id(parameter) not in own and not brought & set(name.split(".")):
            digest = hashlib.sha256(str(tuple(parameter.shape)).encode())
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            digests.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
