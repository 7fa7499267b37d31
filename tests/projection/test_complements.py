"""Very large bases: entries that span more than half of all dimensions are kept by their complements."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgp_hf.projection import Basis, FrequentDirections, NullSpaceProjector, Projection, ProjectionConfig, SecondMoment
from pgp_hf.projection.state import BasisInfo, Observed

DIM, COUNT = 24, 3


@pytest.fixture(autouse=True)
def very_large(monkeypatch):
    monkeypatch.setattr("pgp_hf.projection.basis.SINGLE", 50)
    monkeypatch.setattr("pgp_hf.projection.basis.HALVED", 100)


def moments(kind, seed, rows=(20, 3, 0)):
    """Return a moment whose entries have seen directions of very different numbers, and the rows."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randn(COUNT, max(rows), DIM, generator=generator, dtype=torch.float64)
    for entry, count in zip(seen, rows, strict=True):
        entry[count:] = 0
    return kind(DIM, (COUNT,)).update(seen), seen


def grown(kind, halve, energy=0.98):
    basis = Basis.empty(DIM, (COUNT,))
    for task, rows in enumerate([(15, 3, 0), (4, 2, 0), (3, 12, 5)]):
        basis = basis.extend(moments(kind, task, rows)[0], energy, halve=halve)
    return basis


@pytest.mark.parametrize("kind", [SecondMoment, FrequentDirections])
def test_the_same_projection_from_fewer_bytes(kind):
    direct, halved = grown(kind, False), grown(kind, True)
    assert torch.equal(direct.ranks, halved.ranks) and halved.rank == direct.rank > DIM / 2
    assert halved._inverse == [True, True, False] and direct.stored[1] is None
    rows = torch.randn(COUNT, 5, DIM, dtype=torch.float64)
    assert (direct.project(rows) - halved.project(rows)).abs().max() < 1e-6 * rows.norm()
    assert halved.nbytes < direct.nbytes and halved.nbytes <= 4 * COUNT * DIM * DIM / 2
    columns = halved.columns  # span the same
    assert columns.shape == direct.columns.shape
    assert (Basis(columns).project(rows) - halved.project(rows)).abs().max() < 1e-6 * rows.norm()
    assert torch.allclose(direct.captured(moments(kind, 9)[0]), halved.captured(moments(kind, 9)[0]), atol=1e-6)


@pytest.mark.parametrize("kind", [SecondMoment, FrequentDirections])
def test_no_rank_falls_and_the_share_is_held(kind):
    basis, held = Basis.empty(DIM, (COUNT,)), []
    for task in range(6):
        moment, rows = moments(kind, task, (7, 9, 2))
        before, basis = basis, basis.extend(moment, 0.9, halve=True)
        held.append(rows)
        assert (basis.ranks >= before.ranks).all()
        for old in held:  # of each task: what a movement within the null space meets
            left = basis.project(old).square().sum((-2, -1))
            assert (left <= 0.1 * old.square().sum((-2, -1)) * (1 + 1e-5)).all()
    for task in range(20, 40):  # until nothing is free
        basis = basis.extend(moments(kind, task, (24, 24, 24))[0], 1.0, halve=True)
    assert basis.full and basis.nbytes == 0 and not basis.project(torch.randn(COUNT, 2, DIM)).any()


def test_no_movement_leaks_in_real_steps():
    """Adam, weight decay and all: what the protected rows see of the movement stays below its rounding."""
    moment, rows = moments(SecondMoment, 3, (14, 20, 3))
    basis = Basis.empty(DIM, (COUNT,)).extend(moment, 1.0, halve=True)
    parameter = torch.nn.Parameter(torch.randn(COUNT, 2, DIM // 2))
    projector, start = NullSpaceProjector({"p": basis}), parameter.detach().clone()
    assert basis._inverse == [True, True, False]
    optimizer = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.1)
    projector.anchor([("p", parameter)])
    projector.attach(optimizer, lambda: [("p", parameter)])
    for _ in range(20):
        optimizer.zero_grad()
        (parameter - 3).square().sum().backward()
        optimizer.step()
    projector.check([("p", parameter)])
    moved = (parameter.detach() - start).double().reshape(COUNT, 1, DIM)
    assert (moved.norm(dim=-1) > 1).all()
    assert ((moved * rows).sum(-1).abs() <= 2e-6 * moved.norm(dim=-1) * rows.norm(dim=-1)).all()


def learned(softness=0.0):
    projection = Projection(ProjectionConfig(method="functional", energy=0.99, softness=softness))
    for task in range(2):
        projection._observed = {"p": Observed("prompt", 0.99, moments(SecondMoment, task, (16, 3, 0))[0])}
        projection.end_task({"p": (COUNT, 2, DIM // 2)})
    return projection


def test_files_hold_what_the_projector_uses():
    projection = learned()
    tensors, description = projection.state()
    info: BasisInfo = description["p"]
    assert info["complement"] == [True, False, False] and info["rank"] == projection.rank > tensors["p"].shape[-1]
    loaded = Projection(projection.config)
    loaded.load_state(tensors, description)
    rows = torch.randn(COUNT, 2, DIM, dtype=torch.float64)
    assert torch.equal(loaded.bases["p"].project(rows), projection.bases["p"].project(rows))
    assert loaded.info == projection.info and loaded.state()[1] == description
    loaded.fit_entries({"p": (COUNT + 1, 2, DIM // 2)})
    wider = loaded.bases["p"]
    assert wider.ranks.tolist() == [*projection.bases["p"].ranks.tolist(), 0]
    assert torch.equal(wider.project(rows.new_ones(COUNT + 1, 2, DIM))[-1], rows.new_ones(2, DIM))
    with pytest.raises(ValueError, match="its description says 9"):
        loaded.load_state(tensors, {**description, "p": {**info, "rank": 9}})


def test_files_of_full_bases_have_no_columns(tmp_path):
    projection = Projection(ProjectionConfig(method="functional"))
    projection._observed = {"p": Observed("prompt", 1.0, moments(SecondMoment, 0, (30, 30, 30))[0])}
    with pytest.warns(UserWarning, match="The basis of p has full rank 24"):
        projection.end_task({"p": (COUNT, 2, DIM // 2)})
    tensors, description = projection.state()
    save_file(tensors, tmp_path / "bases.safetensors")
    loaded = Projection(projection.config)
    loaded.load_state(load_file(tmp_path / "bases.safetensors"), description)
    basis = loaded.bases["p"]
    assert basis.full and tensors["p"].shape == (COUNT, DIM, 0) and loaded.info == projection.info
    assert basis.columns.shape == (COUNT, DIM, DIM) and not basis.project(torch.randn(COUNT, 2, DIM)).any()


@pytest.mark.parametrize("flags", [[True], True, None, [1, 0, 1], ["no"] * COUNT])
def test_flags_are_those_of_the_entries(flags):
    projection = learned()
    tensors, description = projection.state()
    with pytest.raises(ValueError, match="'p' has complement=.*: expected true or false for each of its 3 entries"):
        projection.load_state(tensors, {**description, "p": {**description["p"], "complement": flags}})
    with pytest.raises(ValueError, match="complement has 1 flags: expected one for each of 3 entries"):
        Basis(tensors["p"], [True])


def test_files_of_before_keep_their_columns():
    columns = torch.zeros(COUNT, DIM, 20)
    columns[:2] = torch.linalg.qr(torch.randn(2, DIM, 20)).Q
    basis = Basis(columns)
    assert torch.equal(basis.columns, columns) and basis.stored[1] is None
    more = basis.extend(moments(SecondMoment, 1, (2, 0, 0))[0], 1.0, halve=True)
    assert more._inverse == [True, True, False] and more.ranks.tolist() == [22, 20, 0]


def test_what_is_soft_keeps_its_columns():
    basis = learned(softness=0.1).bases["p"]
    assert basis.stored[1] is None and basis.rank > DIM / 2
    with pytest.raises(ValueError, match="kept by its complement"):
        learned().bases["p"].project(torch.zeros(COUNT, 1, DIM), torch.ones(COUNT, 20))


def test_processes_take_over_the_main_one():
    sent = []
    main = learned().bases["p"]

    def broadcast(tensor):
        given = main.stored
        sent.append(tensor.dtype)
        if len(sent) == 1:
            return torch.tensor(given[1]).long()
        return torch.tensor(given[0].shape[-1]) if tensor.ndim == 0 else given[0]

    from pgp_hf.projection.state import _main_process_basis

    other = _main_process_basis(Basis.empty(DIM, (COUNT,)), broadcast)
    rows = torch.randn(COUNT, 2, DIM, dtype=torch.float64)
    assert torch.equal(other.project(rows), main.project(rows))
