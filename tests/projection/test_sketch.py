"""The sketch: exact until it shrinks, then within its bound, and a moment like any other to the energy rule."""

from __future__ import annotations

import numpy as np
import processes
import pytest
import torch

from pgp_hf.projection import Basis, FrequentDirections, SecondMoment, moments, second_moment

N, SIZE = 30, 8


def rows(count, seed=0, batch=(), decay=2.0, dim=N):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(*batch, count, dim)) * np.logspace(0, -decay, dim))


def gram(sketch, index=0):
    return sketch.held[index].mT @ sketch.held[index]


def dense(basis):
    return basis.columns @ basis.columns.mT


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_is_the_dense_moment_while_nothing_is_shrunk(batch, energy):
    """Over two tasks: same total, same share, same basis."""
    old, sketched = Basis.empty(N, batch), Basis.empty(N, batch)
    for seed in (0, 1):
        new = rows(2 * SIZE, seed, batch)
        moment, sketch = SecondMoment(N, batch).update(new), FrequentDirections(N, batch, size=SIZE).update(new)
        assert sketch.exact and (sketch.rows, sketch.dim, sketch.batch_shape) == (2 * SIZE, N, batch)
        assert torch.allclose(sketch.total, moment.total, rtol=1e-12)
        old, sketched = old.extend(moment, energy), sketched.extend(sketch, energy)
        assert torch.equal(old.ranks, sketched.ranks)
        assert torch.allclose(dense(old), dense(sketched), atol=1e-7)
        assert torch.allclose(old.captured(moment), sketched.captured(sketch), atol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_shrunk_it_stays_within_the_bound(decay):
    new = rows(300, decay=decay)
    sketch = FrequentDirections(N, size=SIZE).update(new)
    assert not sketch.exact and len(sketch.held[0]) <= 2 * SIZE and sketch.rows == 300
    assert torch.allclose(sketch.total, new.square().sum(), rtol=1e-12)  # tracked, not what the sketch has left
    lost = torch.linalg.eigvalsh(new.mT @ new - gram(sketch))
    assert lost.min() > -1e-9 * float(sketch.total)
    assert 1e-3 * float(sketch.total) / SIZE < lost.max() <= float(sketch.total) / SIZE


def test_a_faint_direction_that_keeps_coming_is_not_forgotten():
    """Where keeping the strongest directions each time, without subtraction, would drop it again and again."""
    strong, faint = 10 * torch.eye(N, dtype=torch.float64)[:SIZE], torch.eye(N, dtype=torch.float64)[[-1]]
    new = torch.cat([strong, faint.expand(1000, N)])
    sketch = FrequentDirections(N, size=SIZE).update(new)
    assert 1000 - float(gram(sketch)[-1, -1]) <= float(sketch.total) / SIZE


def test_energy_is_reached_or_every_direction_left_is_small():
    for decay in (0.0, 3.0):
        new = rows(300, decay=decay)
        moment, sketch = SecondMoment(N).update(new), FrequentDirections(N, size=SIZE).update(new)
        basis = Basis.empty(N).extend(sketch, 0.95)
        left = torch.linalg.eigvalsh(moment.sum - dense(basis) @ moment.sum @ dense(basis))
        reached = float(basis.captured(moment)) >= 0.95
        assert reached if decay else left.max() <= float(sketch.total) / SIZE
        assert float(basis.captured(sketch)) <= float(basis.captured(moment)) + 1e-12  # never more than there is


def test_low_rank_rows_lose_nothing():
    new = rows(500, dim=SIZE) @ rows(SIZE, seed=3, decay=0.0)
    sketch = FrequentDirections(N, size=SIZE).update(new)
    assert len(sketch.held[0]) <= 2 * SIZE
    assert torch.allclose(gram(sketch), new.mT @ new, atol=1e-9 * float(sketch.total))
    assert Basis.empty(N).extend(sketch, 1.0).rank >= SIZE


@pytest.mark.parametrize("chunks", [1, 3, 50, 120])
def test_batches_do_not_matter_even_when_it_shrinks(chunks):
    new = rows(120, batch=(2,))
    whole, parts = FrequentDirections(N, (2,), size=SIZE).update(new), FrequentDirections(N, (2,), size=SIZE)
    for chunk in new.tensor_split(chunks, dim=-2):
        parts.update(chunk)
    assert all(torch.allclose(gram(whole, i), gram(parts, i), atol=1e-9) for i in range(2))


def test_members_of_a_batch_and_zero_rows():
    """A member that saw zeros, as an entry that no image selected, takes no room and loses nothing."""
    new = rows(40, batch=(3,))
    new[1, 5:], new[2] = 0, 0
    sketch = FrequentDirections(N, (3,), size=SIZE).update(new)
    assert [len(held) for held in sketch.held][1:] == [5, 0] and sketch.rows == 40
    assert torch.allclose(gram(sketch, 0), gram(FrequentDirections(N, size=SIZE).update(new[0])), atol=1e-12)
    assert torch.equal(gram(sketch, 1), new[1].mT @ new[1])
    assert Basis.empty(N, (3,)).extend(sketch, 1.0).ranks.tolist()[1:] == [5, 0]


@pytest.mark.parametrize("count", [10, 100])
def test_processes_agree_and_are_one_process(count):
    new = rows(count, batch=(2,), decay=1.0)
    new[1, 3:] = 0  # members of different lengths, and one process with none
    whole = FrequentDirections(N, (2,), size=SIZE).update(new)

    def work(rank, reduce, gather, broadcast):
        sketch = FrequentDirections(N, (2,), size=SIZE).update(new[:, rank::3])
        sketch.merge(reduce, gather)
        return sketch

    merged = processes.run(3, work)
    for sketch in merged:
        assert torch.allclose(sketch.total, whole.total) and sketch.rows == count
        assert sketch.exact == whole.exact == (count == 10)
        for i in range(2):
            assert torch.equal(gram(sketch, i), gram(merged[0], i))
            lost = torch.linalg.eigvalsh(new[i].mT @ new[i] - gram(sketch, i)).abs().max()
            assert lost <= (float(whole.total[i]) / SIZE if count == 100 and i == 0 else 1e-12)


def test_the_smaller_one_is_taken(monkeypatch):
    monkeypatch.setattr(moments, "SKETCH", 6)
    assert isinstance(second_moment(12), SecondMoment)
    sketch = second_moment(13, (2,))
    assert isinstance(sketch, FrequentDirections) and sketch.size == 6
    sketch.update(rows(100, batch=(2,), dim=13))
    assert sum(held.numel() for held in sketch.held) <= second_moment(12, (2,)).sum.numel() * 13 / 12


@pytest.mark.parametrize(
    ("bad", "message"),
    [(torch.zeros(5, 7), r"\(5, 7\).*\(N, 30\)"), (torch.full((2, N), float("nan")), "not finite.*60 of 60")],
)
def test_refuses(bad, message):
    sketch = FrequentDirections(N, size=SIZE)
    with pytest.raises(ValueError, match=message):
        sketch.update(bad)
    assert sketch.rows == 0 and not sketch.total
    with pytest.raises(ValueError, match="pass gather"):
        sketch.merge(lambda tensor: tensor, None)
    with pytest.raises(ValueError, match=r"does not fit.*expected \(30, 30\)"):
        Basis.empty(N).extend(FrequentDirections(7), 0.9)
