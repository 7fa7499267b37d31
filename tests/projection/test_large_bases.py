"""Large bases: kept in single precision, without unused columns, and projecting to the bit as in double precision."""

from __future__ import annotations

import pytest
import torch

from pgp_hf.projection import Basis, FrequentDirections, NullSpaceProjector, SecondMoment

RANKS = (5, 0, 12, 9)


@pytest.fixture
def small(monkeypatch):
    """Return a function that makes bases of more than 500 values large."""
    return lambda: monkeypatch.setattr("pgp_hf.projection.basis.SINGLE", 500)


def columns(batch=(2, 2), dim=24):
    """Return columns of entries with different ranks that single precision holds exactly."""
    torch.manual_seed(0)
    made = torch.zeros(4, dim, max(RANKS))
    for entry, rank in zip(made, RANKS, strict=True):
        entry[:, :rank] = torch.linalg.qr(torch.randn(dim, rank)).Q
    return made.reshape(*batch, dim, max(RANKS))


def test_the_same_bits_from_half_the_bytes(small):
    given = columns()
    double = Basis(given)
    assert double.columns.dtype == torch.float64 and double.nbytes == 8 * given.numel()
    small()
    single = Basis(given)
    assert single.columns.dtype == torch.float32 and torch.equal(single.columns, given)
    assert single.nbytes == 4 * 24 * sum(RANKS) < double.nbytes / 3
    assert torch.equal(single.ranks, double.ranks) and single.batch_shape == (2, 2) and single.rank == 12
    rows, strength = torch.randn(2, 2, 3, 24, dtype=torch.float64), torch.rand(2, 2, 12, dtype=torch.float64)
    for factor in (None, strength):
        assert torch.equal(single.project(rows, factor), double.project(rows, factor))
    assert torch.equal(single.to("cpu").columns, given) and not single.full


@pytest.mark.parametrize("kind", [SecondMoment, FrequentDirections])
def test_extending_rounds_once(small, kind):
    """What was kept stays to the bit, and what is new is that of double precision, rounded."""
    torch.manual_seed(1)
    moment = kind(24, (4,)).update(torch.randn(4, 9, 24) * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None, None])
    old = columns((4,))
    double = Basis(old).extend(moment, 0.9)
    small()
    single = Basis(old).extend(moment, 0.9)
    assert single.columns.dtype == torch.float32 and single.rank == double.rank > 12
    assert torch.equal(single.columns, double.columns.float())
    assert torch.equal(single.columns[..., :5][0], old[0, :, :5])
    assert torch.equal(single.captured(moment), Basis(single.columns.double()).captured(moment))
    grown = Basis.empty(24, (4,)).extend(moment, 0.9)
    assert grown.columns.dtype == torch.float32 and 0 in grown.ranks


def test_no_movement_leaks(small):
    """A parameter in single precision, projected by a basis in single precision, stays within its own rounding."""
    small()
    torch.manual_seed(2)
    basis, parameter = Basis(columns((4,))), torch.nn.Parameter(torch.randn(4, 2, 12))
    projector = NullSpaceProjector({"p": basis})
    projector.anchor([("p", parameter)])
    start = parameter.detach().clone()
    parameter.data += torch.randn_like(parameter)
    projector.project_updates_([("p", parameter)])
    moved = (parameter.detach() - start).double().reshape(4, 1, 24)
    assert (moved @ basis.columns.double()).norm() < 1e-6 * moved.norm()
    assert moved[1].norm() > 1  # of no rank: free


def test_refuses_what_is_not_orthonormal(small):
    small()
    bad = columns()
    for spoil in (lambda: bad[1, 1].mul_(1.01), lambda: bad[0, 0].fill_(torch.nan)):
        spoil()
        with pytest.raises(ValueError, match="not orthonormal"):
            Basis(bad)
