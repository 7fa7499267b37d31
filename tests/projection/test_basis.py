"""Bases against an independent numpy implementation of GPM's rule, and the properties that the rule promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pgp_hf.projection import Basis, SecondMoment

N = 16


def task_rows(seed: int, count: int = 40, dim: int = N, decay: float = 3.0) -> np.ndarray:
    """Rows with a spectrum falling over `decay` decades in a random frame, and a mean that is not zero."""
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return (rng.normal(size=(count, dim)) + 0.5) * np.logspace(0, -decay, dim) @ frame


def moment_of(rows: np.ndarray) -> SecondMoment:
    return SecondMoment(rows.shape[-1], rows.shape[:-2]).update(torch.from_numpy(rows))


def gpm(tasks: list[np.ndarray], energy: float) -> list[np.ndarray]:
    """GPM (Saha et al., 2021), on the rows themselves: the bases after each task, by SVD of the residual."""
    basis, bases = np.zeros((tasks[0].shape[1], 0)), []
    for rows in tasks:
        total = (rows**2).sum()
        residual = rows - rows @ basis @ basis.T
        _, s, vt = np.linalg.svd(residual, full_matrices=False)
        kept, r = total - (s**2).sum(), 0
        while kept < energy * total and r < len(s):
            kept += s[r] ** 2
            r += 1
        basis = np.linalg.qr(np.concatenate([basis, vt[:r].T], axis=1))[0]
        bases.append(basis)
    return bases


def grow(tasks: list[np.ndarray], energy: float) -> list[Basis]:
    bases = [Basis.empty(tasks[0].shape[-1], tasks[0].shape[:-2])]
    for rows in tasks:
        bases.append(bases[-1].extend(moment_of(rows), energy))
    return bases[1:]


def dense(columns) -> np.ndarray:
    columns = np.asarray(columns)
    return columns @ np.swapaxes(columns, -1, -2)


@pytest.mark.parametrize("energy", [0.3, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("seed", range(4))
def test_is_gpm_in_numpy(energy, seed):
    """Same ranks and same spans as the singular vectors of the stacked rows, over four tasks."""
    tasks = [task_rows(10 * seed + t) for t in range(4)]
    for ours, theirs in zip(grow(tasks, energy), gpm(tasks, energy), strict=True):
        assert ours.rank == theirs.shape[1]
        assert np.abs(dense(ours.columns) - dense(theirs)).max() < 1e-7


def test_first_basis_is_eigh_of_the_stacked_rows():
    """Tokens and prompts are stacked, not added: each row's direction is protected."""
    tokens, prompts = task_rows(1), task_rows(2, count=5)
    moment = moment_of(tokens).update(torch.from_numpy(prompts))
    values, vectors = np.linalg.eigh(dense(np.concatenate([tokens, prompts]).T))
    shares = values[::-1].cumsum() / values.sum()
    basis = Basis.empty(N).extend(moment, 0.95)
    assert basis.rank == np.searchsorted(shares, 0.95) + 1
    assert np.abs(dense(basis.columns) - dense(vectors[:, ::-1][:, : basis.rank])).max() < 1e-10


@pytest.mark.parametrize("energy", [0.2, 0.8, 0.97, 0.999])
def test_energy_is_reached_by_the_fewest_directions(energy):
    old = Basis.empty(N)
    for t in range(4):
        moment = moment_of(task_rows(t))
        new = old.extend(moment, energy)
        assert float(new.captured(moment)) >= energy - 1e-12
        if new.rank > old.rank:
            assert float(Basis(new.columns[:, :-1]).captured(moment)) < energy
        assert torch.equal(new.columns[:, : old.rank], old.columns)  # what was protected stays as it was
        error = new.columns.mT @ new.columns - torch.eye(new.rank)
        assert error.numel() == 0 or error.abs().max() < 1e-12
        old = new
    assert old.extend(moment, energy).rank == old.rank  # the same task again needs nothing new
    assert old.extend(moment_of(task_rows(9)), 1e-6).rank == old.rank


@pytest.mark.parametrize(("power", "ranks"), [(1, [536, 619, 715]), (2, [12, 20, 56])])
def test_the_rank_depends_on_the_spectrum(power, ranks):
    """Of 768 directions, where the energy of the i-th is i^-1 or i^-2."""
    moment = SecondMoment(768).update(torch.arange(1, 769, dtype=torch.float64).pow(-power / 2).diag())
    assert [Basis.empty(768).extend(moment, energy).rank for energy in (0.95, 0.97, 0.99)] == ranks


def test_ties_take_one_direction():
    moment = SecondMoment(4).update(torch.eye(4))
    assert [Basis.empty(4).extend(moment, e).rank for e in (0.25, 0.5, 0.500001, 1.0)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("dim", "seen", "count", "chunks"),
    [(2, 1, 1000, 1), (4, 1, 20000, 100), (8, 4, 50000, 1), (24, 12, 200, 3), (24, 5, 5, 1), (24, 23, 400, 1)],
)
@pytest.mark.parametrize("kind", ["constant", "varied"])
def test_energy_one_protects_what_was_seen_and_nothing_else(dim, seen, count, chunks, kind):
    """Also after many rows, whose rounding must not look like a direction (constant rows round all alike)."""
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    values = rng.normal(size=(count, seen))
    if kind == "constant":
        values = np.resize(1.7 * np.linalg.qr(values[:seen])[0], (count, seen))
    moment = SecondMoment(dim)
    for chunk in np.array_split(values @ frame[:seen], chunks):
        moment.update(torch.from_numpy(chunk))
    basis = Basis.empty(dim).extend(moment, 1.0)
    assert basis.rank == seen
    for vector, protected in zip(torch.from_numpy(frame), [True] * seen + [False] * (dim - seen), strict=True):
        left = basis.project(vector[None])[0]
        assert torch.allclose(left, torch.zeros_like(left) if protected else vector, atol=1e-6)
    again = moment_of(rng.normal(size=(30, seen)) @ frame[:seen])
    assert basis.extend(again, 1.0).rank == seen


def test_weak_new_directions_are_orthogonal_to_the_old_ones():
    """Eigenvectors of a residual far smaller than the protected part lean into that part by rounding."""
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.normal(size=(N, N)))[0]
    old = Basis.empty(N).extend(moment_of(rng.normal(size=(40, 4)) @ frame[:4]), 1.0)
    rows = rng.normal(size=(40, 4)) @ frame[:4] + 1e-6 * rng.normal(size=(40, 2)) @ frame[4:6]
    new = old.extend(moment_of(rows), 1.0)
    assert new.rank == 6
    assert (new.columns.mT @ new.columns - torch.eye(6)).abs().max() < 1e-12
    assert new.project(torch.from_numpy(frame[4:6])).abs().max() < 1e-2


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_projector_is_symmetric_and_idempotent(batch):
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(*batch, 5, 7)))
    basis = Basis.empty(7, batch).extend(SecondMoment(7, batch).update(rows), 0.9)
    z, w = torch.randn(2, *batch, 3, 7, dtype=torch.float64)
    once = basis.project(z)
    assert torch.allclose(basis.project(once), once, atol=1e-12)
    assert torch.allclose((z * basis.project(w)).sum(-1), (once * w).sum(-1), atol=1e-12)
    assert (once @ basis.columns).abs().max() < 1e-12 < (z @ basis.columns).abs().max()
    assert torch.allclose(once, z - z @ basis.columns @ basis.columns.mT, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project_keeps_the_dtype(dtype):
    basis = Basis(torch.eye(4)[:, :2])
    assert torch.equal(basis.project(torch.ones(2, 4, dtype=dtype)), torch.tensor([[0, 0, 1, 1]] * 2, dtype=dtype))


def test_batch_with_differing_ranks_is_padded_with_zeros():
    """Each member of a batch grows as it would alone, over two tasks; unused columns are zero and come last."""
    rng = np.random.default_rng(0)

    def rows(ranks):
        return np.stack([rng.normal(size=(9, 6)) * (np.arange(6) < r) for r in ranks])

    first, second = rows([1, 3, 0, 2]), rows([4, 3, 0, 6])
    together = grow([first, second], 1.0)
    assert [b.ranks.tolist() for b in together] == [[1, 3, 0, 2], [4, 3, 0, 6]]
    assert [b.rank for b in together] == [3, 6]
    for i in range(4):
        for batched, alone in zip(together, grow([first[i], second[i]], 1.0), strict=True):
            assert torch.equal(batched.columns[i, :, : alone.rank], alone.columns)
            assert not batched.columns[i, :, alone.rank :].any()
    assert not together[0].full and torch.equal(together[1].to("cpu").columns, together[1].columns)


def test_nothing_seen_protects_nothing():
    basis = Basis.empty(5).extend(SecondMoment(5), 1.0)
    assert basis.rank == 0 and not basis.full
    z = torch.randn(3, 5)
    assert torch.equal(basis.project(z), z)
    assert float(basis.captured(SecondMoment(5))) == 0
    some = basis.extend(moment_of(np.eye(5)[:2]), 1.0)
    assert torch.equal(some.extend(SecondMoment(5), 1.0).columns, some.columns)


def test_full_rank():
    basis = Basis.empty(5).extend(moment_of(task_rows(0, dim=5)), 1.0)
    assert basis.full and basis.rank == 5
    assert basis.extend(moment_of(task_rows(1, dim=5)), 1.0).rank == 5
    assert basis.project(torch.randn(4, 5)).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1e6, 1e150])
def test_scale_of_the_rows_does_not_matter(scale):
    rows = task_rows(0)
    basis = Basis.empty(N).extend(moment_of(rows), 0.95)
    scaled = Basis.empty(N).extend(moment_of(rows * scale), 0.95)
    assert scaled.rank == basis.rank and np.allclose(dense(scaled.columns), dense(basis.columns), atol=1e-9)


@pytest.mark.parametrize("energy", [0, -0.1, 1.0001, float("nan")])
def test_refuses_energy(energy):
    with pytest.raises(ValueError, match=f"energy={energy}.*outside"):
        Basis.empty(N).extend(SecondMoment(N), energy)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (torch.ones(4), r"\(4,\).*\(\*batch, n, r\)"),
        (torch.ones(4, 2), "not orthonormal"),
        (torch.full((4, 1), float("nan")), "not orthonormal"),
        (2 * torch.eye(4)[:, :2], "not orthonormal"),
        (torch.eye(4)[:, [0, 0]], "not orthonormal"),
        (torch.tensor([[0.0, 1.0], [0, 0]]), "unused columns are zero and come last"),
    ],
)
def test_refuses_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        Basis(columns)


@pytest.mark.parametrize("moment", [SecondMoment(5), SecondMoment(4, (2,))])
def test_refuses_moments_of_another_shape(moment):
    with pytest.raises(ValueError, match=r"does not fit.*expected \(4, 4\)"):
        Basis.empty(4).extend(moment, 0.9)
