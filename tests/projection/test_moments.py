"""Second moments: the same sum however the rows arrive."""

from __future__ import annotations

import pytest
import torch

from pgp_hf.projection import SecondMoment


@pytest.mark.parametrize("chunks", [1, 2, 7, 50])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_streaming_in_any_chunking_is_the_sum_over_rows(batch, chunks):
    rows = torch.randn(*batch, 50, 6, dtype=torch.float64)
    moment = SecondMoment(6, batch)
    for chunk in rows.tensor_split(chunks, dim=-2):
        moment.update(chunk)
    expected = torch.zeros(*batch, 6, 6, dtype=torch.float64)
    for i in range(50):
        z = rows[..., i, :]
        expected += z[..., :, None] * z[..., None, :]
    assert torch.allclose(moment.sum, expected, rtol=1e-12, atol=1e-12)
    assert (moment.rows, moment.dim, moment.batch_shape) == (50, 6, batch)


def test_batched_moments_are_independent():
    rows = torch.randn(4, 9, 5)
    batched = SecondMoment(5, (4,)).update(rows)
    for i in range(4):
        assert torch.allclose(batched.sum[i], SecondMoment(5).update(rows[i]).sum, rtol=1e-13, atol=1e-13)


def test_uncentred():
    """A condition x dp^T = 0 must hold for the mean of x too."""
    moment = SecondMoment(3).update(torch.tensor([[1.0, 2.0, 2.0]]).repeat(5, 1))
    assert torch.equal(moment.sum, 5 * torch.tensor([[1.0, 2, 2], [2, 4, 4], [2, 4, 4]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_in_float64(dtype):
    """Low-precision rows are squared and summed in float64: nothing is lost beyond the rows' own rounding."""
    rows = torch.randn(3000, 4).to(dtype)
    moment = SecondMoment(4)
    for row in rows.split(10):
        moment.update(row)
    exact = rows.double().mT @ rows.double()
    assert moment.sum.dtype == torch.float64
    assert torch.allclose(moment.sum, exact, rtol=1e-12)
    assert not torch.allclose((rows.mT @ rows).double(), exact, rtol=1e-9)  # which low precision would fail


def test_no_rows_and_gradients_leave_no_trace():
    moment = SecondMoment(4).update(torch.zeros(0, 4))
    assert moment.rows == 0 and not moment.sum.any()
    assert not moment.update(torch.randn(2, 4, requires_grad=True)).sum.requires_grad


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(5, 7), r"\(5, 7\).*\(N, 4\)"),
        (torch.zeros(4), r"\(4,\)"),
        (torch.zeros(2, 5, 4), r"\(2, 5, 4\)"),
        (torch.tensor([[0.0, float("nan"), 0, float("inf")]]), "not finite.*2 of 4"),
    ],
)
def test_refuses(rows, message):
    moment = SecondMoment(4)
    with pytest.raises(ValueError, match=message):
        moment.update(rows)
    assert moment.rows == 0 and not moment.sum.any()


def test_refuses_batches_of_another_shape():
    with pytest.raises(ValueError, match=r"expected \(3, N, 4\)"):
        SecondMoment(4, (3,)).update(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="dim=0"):
        SecondMoment(0)
