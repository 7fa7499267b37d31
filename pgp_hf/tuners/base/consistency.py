"""Compute the rows along which prompt tokens must not move, so that the first attention stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from ...backbones.family import Rotate


class SelfAttention(Protocol):
    """An attention module, as far as it forms logits: those of ViT and CLIP do it this way."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    head_dim: int


def consistency_rows(
    tokens: Tensor,
    norms: Sequence[nn.LayerNorm],
    attention: SelfAttention,
    inserted: int,
    start: int = 1,
    rotate: Rotate | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rows for the two conditions under which an attention stays consistent (Lu et al., NeurIPS 2024).

    Token l of the prompt, p_l, reaches the attention as `z_l = a (p_l - mu_l) / s_l + b`, with the weight a and the
    bias b of the LayerNorm and the token's own mean mu_l and standard deviation s_l. As long as these stay the same,
    `dz_l = a dp_l / s_l`. For the query q_h of any token in head h, the attention weights S_h over the prompt tokens,
    W_k,h and W_v this gives:

        logits:    q_h W_k,h dz_l^T = 0       if dp_l is orthogonal to the row  a * (q_h W_k,h)
        output:    S_h dz W_v = 0             if every column of dp is orthogonal to the row  S_h / s

    The paper writes the second condition as `S_h dp = 0`, which is the same where all tokens have the same standard
    deviation. Several norms in a row are treated as one, with the product of their weights and of the standard
    deviations. This assumes that mean and standard deviation in the second norm stay the same too, which is not
    enforced. Neither condition covers the queries of the prompt tokens themselves, the residual stream or later layers.

    Args:
        tokens: as they enter the network, `(B, T, d)`, the prompt among them.
        norms: the LayerNorms between the tokens and the attention.
        attention: the first attention.
        inserted: number of prompt tokens P.
        start: number of tokens in front of the prompt.
        rotate: turns queries and keys by their tokens' positions, and leaves those of the prompt as they are.

    Returns:
        Rows along the width, `(B, H, T, d)`, and over the prompt tokens, `(B, H, T, P)`.
    """
    hidden, scale, std = tokens, tokens.new_ones(()), tokens.new_ones(())
    for norm in norms:
        std = std * (hidden.float().var(-1, correction=0) + norm.eps).sqrt()
        scale, hidden = scale * norm.weight, norm(hidden)
    query, key = (
        projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2).float()
        for projection in (attention.q_proj, attention.k_proj)
    )
    if rotate is not None:
        query, key = rotate(query, key)
    weights = (query @ key.mT * attention.head_dim**-0.5).softmax(-1)
    w_k = attention.k_proj.weight.float().unflatten(0, (-1, attention.head_dim))  # (H, dh, d)
    prompt = slice(start, start + inserted)
    return query @ w_k * scale, weights[..., prompt] / std[:, None, None, prompt]
