"""Recognise a frozen backbone by the digest of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

# under which `results.json` keeps a backbone's digest, one for each precision
BACKBONE_KEYS = {
    f"backbone.{str(dtype).removeprefix('torch.')}": dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def backbone_key(model: nn.Module) -> str:
    """Return the name under which `results.json` keeps a backbone's digest."""
    return f"backbone.{str(next(model.parameters()).dtype).removeprefix('torch.')}"


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's values, whatever their layout in memory."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()


@torch.no_grad()
def backbone_sha256(model: nn.Module, modules_to_save: Iterable[str] | None) -> str | None:
    """Return the digest of a model's frozen weights, the same with and without an adapter; None if they are sharded.

    Args:
        model: the backbone, or a model that a prompt adapter has wrapped.
        modules_to_save: names of the modules that the adapter saves whole, which are left out.
    """
    saved = set(modules_to_save or ()) | {"modules_to_save"}
    own = {
        id(parameter)
        for module in model.modules()
        for container in getattr(module, "adapter_layer_names", ())
        for parameter in getattr(module, container).parameters()
    }
    digests = []
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "to_local"):  # a DTensor: this process holds a part of it
            return None
        # without the name, which changes where an adapter wraps the module
        if id(parameter) not in own and not saved & set(name.split(".")):
            digest = hashlib.sha256(str(tuple(parameter.shape)).encode())
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            digests.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
