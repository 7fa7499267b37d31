"""Select prompts of a pool: by the cosine similarity of a frozen query with learned keys (L2P, Sec. 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_similarity(query: Tensor, key: Tensor) -> Tensor:
    """Return cos(q_b, k_m) for queries `(B, d)` and keys `(M, d)`: `(B, M)`, in float32 even under autocast."""
    with torch.autocast(device_type=query.device.type, enabled=False):
        return F.normalize(query.float(), dim=-1) @ F.normalize(key.float(), dim=-1).T


def select_top_k(similarity: Tensor, top_k: int, batchwise: bool = False) -> Tensor:
    """Return the indices `(B, top_k)` of the pool entries for each image.

    Args:
        similarity: `(B, M)`.
        top_k: number of entries for each image.
        batchwise: give all images the entries that most images of the batch have voted for. Released code does so, at
            test time too; it lets the other images of a batch decide, and is here for comparison only.
    """
    selected = similarity.topk(top_k, dim=-1).indices
    if batchwise:
        votes = F.one_hot(selected.flatten(), similarity.shape[-1]).sum(0)
        selected = votes.topk(top_k).indices.expand(similarity.shape[0], -1)
    return selected
