"""Every projection on every adapter, through the trainer: what old images showed is held while the next task trains."""

from __future__ import annotations

import pytest
import tiny
import torch

from pgp_hf import ProjectionConfig
from pgp_hf.projection import Observation

pytestmark = pytest.mark.usefixtures("without_figures")

METHODS = {
    "pgp": {"energy": 0.9},
    "attention": {"energy": 0.7, "value_energy": 0.7},
    "functional": {"energy": 0.7, "max_images": 12},
}


def two_tasks(folder, method, adapter, **settings):
    """A trainer after two tasks; the bases that held during the second; how far each parameter moved in it."""
    config = ProjectionConfig(method=method, key_energy=0.9, **settings)
    trainer = tiny.trainer(folder, model=tiny.model(adapter, head="statistics"), projection=config)
    trainer.train_task(0)
    start = {name: p.detach().clone() for name, p in trainer.tuner.prompt_parameters().items()}
    bases = dict(trainer.projection.bases)
    trainer.train_task(1)
    moved = {name: p.detach() - start[name] for name, p in trainer.tuner.prompt_parameters().items()}
    return trainer, bases, moved


def share_inside(basis, moved):
    """Share of a movement's square inside the span of a basis."""
    rows = moved.double().reshape(*basis.batch_shape, -1, basis.dim)
    return float(1 - basis.project(rows).square().sum() / rows.square().sum())


PAIRS = [(method, adapter) for method in METHODS for adapter in tiny.ADAPTERS]
QUICK = {("pgp", "clip"), ("attention", "dualprompt"), ("functional", "l2p"), ("functional", "dualprompt")}


@pytest.mark.parametrize(
    ("method", "adapter"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_training_stays_in_the_null_space(tmp_path, method, adapter):
    trainer, bases, moved = two_tasks(tmp_path / "held", method, adapter, **METHODS[method])
    _, _, free = two_tasks(tmp_path / "free", "none", adapter)
    assert {name.removesuffix(".T") for name in bases} == set(moved)
    for name, basis in bases.items():
        of, swap = name.removesuffix(".T"), name.endswith(".T")
        inside = [share_inside(basis, part[of].mT if swap else part[of]) for part in (moved, free)]
        assert basis.rank > 0 and moved[of].any()
        assert abs(inside[0]) < 1e-9, name
        assert inside[1] > 1e-3, name  # without projection it is moved there
    results = trainer.results.to_dict()
    assert len(results["projection_rank"]) == 2 and results["projection_rank"][1] >= results["projection_rank"][0] > 0
    assert {"linear", "statistics"} == set(results["heads"])


def test_protected_keys_keep_the_selection(tmp_path):
    """Of old test images: their queries are near those of the training images, which alone are protected."""
    held, _, _ = two_tasks(tmp_path / "held", "pgp", "l2p", energy=0.5)
    free, _, _ = two_tasks(tmp_path / "free", "none", "l2p")
    assert held.results.changed[1] < free.results.changed[1]


@pytest.mark.parametrize("adapter", tiny.ADAPTERS)
@pytest.mark.parametrize("method", ["pgp", "attention", "functional", "frozen"])
def test_every_method_yields_observations(method, adapter):
    from pgp_hf.projection import CONDITIONS, Context

    model, pixels = tiny.model(adapter), tiny.images(2)
    found = list(CONDITIONS[method](model.base_model, {"pixel_values": pixels}, Context(ProjectionConfig(), [0, 1])))
    assert found and all(isinstance(one, Observation) for one in found)
    assert all(torch.isfinite(one.rows).all() and one.name and one.role for one in found)
