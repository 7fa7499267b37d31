"""Keys: the selection of old images stays because cosines do, norm and all; and the baseline that freezes everything."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from pgp_hf.projection import Basis, NullSpaceProjector, Projection, ProjectionConfig


class Tuner:
    """Show queries to a pool's keys."""

    def protected_rows(self, queries):
        yield "key", "key", queries


def adam(keys, projection, steps=30):
    """Pull the keys, rows of very different lengths, to some place; returns them before and after."""
    parameter = nn.Parameter(keys.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.05)
    projection.projector.anchor([("key", parameter)])
    projection.projector.attach(optimizer, lambda: [("key", parameter)])
    goal = torch.randn(keys.shape, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        (parameter - 3 * goal).square().sum().backward()
        optimizer.step()
    return parameter.detach()


def cosines(queries, keys):
    return F.normalize(queries.double(), dim=-1) @ F.normalize(keys.double(), dim=-1).mT


@pytest.mark.parametrize("energy", [1.0, 0.8])
def test_cosines_of_protected_queries_stay(energy):
    queries = torch.randn(40, 5) @ torch.randn(5, 24)
    keys = torch.randn(6, 24) * torch.tensor([0.1, 1, 1, 2, 5, 20])[:, None]
    changes = {}
    for hold in (True, False):
        projection = Projection(ProjectionConfig(key_energy=energy, hold_key_norm=hold))
        projection.observe(Tuner(), {"queries": queries})
        projection.end_task({"key": (6, 24)})
        after = adam(keys, projection)
        assert (after - keys).norm(dim=-1).min() > 0.1
        inside = queries if energy == 1 else projection.bases["key"].columns.mT  # what the energy rule protects
        changes[hold] = (cosines(inside, after) - cosines(inside, keys)).abs().max()
        products = (inside.double() @ (after - keys).double().mT).abs().max()
        assert products < 1e-4  # held by either
        if hold:
            assert torch.allclose(after.norm(dim=-1), keys.norm(dim=-1), rtol=1e-6)
    assert changes[True] < 1e-6 and changes[False] > 0.05


def held(start, value, columns):
    parameter = nn.Parameter(start.clone())
    projector = NullSpaceProjector({"key": Basis(columns)}, hold_norm={"key"})
    projector.anchor([("key", parameter)])
    parameter.data.copy_(value)
    projector.project_updates_([("key", parameter)])
    return parameter.detach()


def test_rows_without_a_free_part():
    """Zero at the start: it stays zero. Zero after the step: no direction to scale, so the start's is kept."""
    columns = torch.eye(4)[:, :2]
    start = torch.tensor([[1.0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 3, 4], [1, 0, 3, 4]])
    value = torch.tensor([[5.0, 5, 5, 5], [1, 1, 1, 1], [7, 7, 0, 0], [7, 7, 0, 2]])
    expected = torch.tensor([[1.0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 3, 4], [1, 0, 0, 5]])
    assert torch.allclose(held(start, value, columns), expected, atol=1e-6)
    assert torch.equal(held(start, value, torch.eye(4)), start)


def test_only_keys_are_held_and_only_if_asked():
    """The published rule holds nothing; prompts may grow."""
    rows = torch.randn(3, 8)

    class Both:
        def protected_rows(self):
            yield "prompt", "prompt", rows
            yield "key", "key", rows

    for hold, expected in ((True, {"key"}), (False, set())):
        projection = Projection(ProjectionConfig(hold_key_norm=hold))
        projection.observe(Both(), {})
        projection.end_task({"prompt": (2, 8), "key": (2, 8)})
        assert projection.projector.hold_norm == expected
        assert projection.state()[1]["hold_key_norm"] is hold
        loaded = Projection(ProjectionConfig(hold_key_norm=hold))
        loaded.load_state(*projection.state())
        assert loaded.projector.hold_norm == expected


@pytest.mark.parametrize("apply_to", ["update", "both"])
@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_frozen_learns_with_the_first_task_only(method, apply_to):
    """No image is touched, nothing is said about full rank, and nothing moves, to the bit."""
    model = tiny.model(method)
    projection = Projection(ProjectionConfig(method="frozen", apply_to=apply_to, energy=0.5, key_energy=None))

    def no_images():
        raise AssertionError("an image was asked for")
        yield

    named = model.base_model.prompt_parameters()
    for task in range(2):
        assert bool(projection.bases) == (task > 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            projection.update_bases(model.base_model, no_images(), task=task)
    assert set(projection.bases) == set(named)
    before = {name: p.detach().clone() for name, p in named.items()}
    projection.projector.anchor(named.items())
    optimizer = torch.optim.AdamW(named.values(), lr=0.1, weight_decay=0.1)
    projection.projector.attach(optimizer, named.items)
    for p in named.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in named.items())
    for name, basis in projection.bases.items():
        assert basis.full and basis.columns.shape == (named[name].shape[-1],) * 2  # small files
        assert projection.info[name]["rank_per_task"] == [basis.dim] * 2
    loaded = Projection(ProjectionConfig(method="frozen", energy=0.5, key_energy=None))
    loaded.load_state(*projection.state())
    loaded.projector.anchor(named.items())
