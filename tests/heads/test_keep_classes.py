"""The classes that may win, by their ids and by a mask for each image."""

from __future__ import annotations

import pytest
import torch

from pgp_hf.heads import keep_classes

LOGITS = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
LOWEST = float("-inf")


def test_ids_hold_for_the_whole_batch():
    expected = torch.tensor([[LOWEST, 1.0, LOWEST, 0.0], [LOWEST, 1.0, LOWEST, 3.0]])
    assert torch.equal(keep_classes(LOGITS, [1, 3]), expected)
    assert torch.equal(keep_classes(LOGITS, (3, 1)), expected)
    assert LOGITS.isfinite().all()  # the caller's are left alone


def test_none_keeps_all():
    assert keep_classes(LOGITS, None) is LOGITS


def test_a_mask_gives_each_image_its_own_classes():
    mask = torch.tensor([[False, True, True, False], [True, True, False, False]])
    kept = keep_classes(LOGITS, mask)
    assert torch.equal(kept, torch.tensor([[LOWEST, 1.0, 2.0, LOWEST], [0.0, 1.0, LOWEST, LOWEST]]))
    assert kept.argmax(-1).tolist() == [2, 1]
    rows = [keep_classes(LOGITS[i : i + 1], own) for i, own in enumerate(([1, 2], [0, 1]))]
    assert torch.equal(kept, torch.cat(rows))


def test_an_image_without_a_class_has_no_winner():
    assert torch.isneginf(keep_classes(LOGITS, torch.zeros_like(LOGITS, dtype=torch.bool))).all()


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 3), (2, 1)])
def test_a_mask_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"one row for each image and one column for each class"):
        keep_classes(LOGITS, torch.ones(shape, dtype=torch.bool))


def test_half_precision_stays():
    assert keep_classes(LOGITS.half(), [0]).dtype == torch.float16
