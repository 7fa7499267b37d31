"""The prompt pool's selection rule: cosine similarity of a frozen query with learned keys (L2P, Sec. 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_similarity(query: Tensor, key: Tensor) -> Tensor:
    """cos(q_b, k_m) of queries `(B, d)` and keys `(M, d)`, shape `(B, M)`, float32 also under autocast."""
    with torch.autocast(device_type=query.device.type, enabled=False):
        return F.normalize(query.float(), dim=-1) @ F.normalize(key.float(), dim=-1).T


def select_top_k(similarity: Tensor, top_k: int, batchwise: bool = False) -> Tensor:
    """Indices `(B, top_k)` of the pool entries for each image.

    Args:
        similarity: `(B, M)`.
        batchwise: take the entries that most of the batch voted for, for all images alike. This is what released
            code does, also at test time; it lets an image's neighbours decide, and is here for comparison only.
    """
    selected = similarity.topk(top_k, dim=-1).indices
    if batchwise:
        votes = F.one_hot(selected.flatten(), similarity.shape[-1]).sum(0)
        selected = votes.topk(top_k).indices.expand(similarity.shape[0], -1)
    return selected
