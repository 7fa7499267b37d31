"""The pool's selection rule."""

from __future__ import annotations

import pytest
import torch

from pgp_hf.tuners.base.pool import cosine_similarity, select_top_k


def test_cosine_by_hand():
    query, key = torch.randn(3, 7), torch.randn(4, 7)
    similarity = cosine_similarity(100 * query, 0.01 * key)
    for b in range(3):
        for m in range(4):
            expected = query[b] @ key[m] / (query[b].norm() * key[m].norm())
            assert float(similarity[b, m]) == pytest.approx(float(expected), abs=1e-6)


def test_cosine_stays_in_float32():
    """Ties would flip the selection: autocast and low-precision queries change nothing but the query."""
    query, key = torch.randn(3, 7).bfloat16(), torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        similarity = cosine_similarity(query, key)
    assert similarity.dtype == torch.float32
    assert torch.equal(similarity, cosine_similarity(query.float(), key))


def test_zero_vectors_are_similar_to_nothing():
    assert not cosine_similarity(torch.zeros(1, 3), torch.randn(2, 3)).any()


@pytest.mark.parametrize("top_k", [0, 1, 3, 5])
def test_top_k_per_image(top_k):
    similarity = torch.randn(6, 5)
    selected = select_top_k(similarity, top_k)
    assert selected.shape == (6, top_k)
    for row, chosen in zip(similarity, selected, strict=True):
        assert set(chosen.tolist()) == set(row.argsort(descending=True)[:top_k].tolist())


def test_batchwise_majority():
    """Every image gets the entries that most images voted for."""
    similarity = torch.tensor([[0.0, 3, 1, 2], [3, 1, 2, 0], [3, 2, 1, 0]])  # votes: 1 3 | 0 2 | 0 1
    assert select_top_k(similarity, 2, batchwise=True).sort().values.tolist() == [[0, 1]] * 3
    assert select_top_k(similarity, 2)[0].tolist() == [1, 3]
    assert select_top_k(similarity, 0, batchwise=True).shape == (3, 0)
