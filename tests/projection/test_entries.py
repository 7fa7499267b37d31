"""Pools that grow under a projection: new entries are free, those before stay protected."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file

from pgp_hf import ProjectionConfig, load_pretrained
from pgp_hf.models import stream_model
from pgp_hf.projection import Basis, Projection

METHODS = ("pgp", "attention", "functional")
KEY = "base_model.model.vit.embeddings.l2p_prompt"

pytestmark = pytest.mark.usefixtures("without_figures")


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.base_model.prompt_parameters().items()}


def learned(method, **settings):
    """An L2P model whose first task has given a projection its bases."""
    model = tiny.model("l2p", grow_pool=2, **settings)
    projection = Projection(ProjectionConfig(method=method, energy=0.6, key_energy=0.6, value_energy=0.6))
    model.base_model.begin_task(0)
    projection.update_bases(model.base_model, [({"pixel_values": tiny.images(6)}, range(6))])
    return model, projection


@pytest.mark.parametrize("method", METHODS)
def test_new_entries_get_empty_columns(method):
    model, projection = learned(method)
    before, info = dict(projection.bases), dict(projection.info)
    projection.fit_entries(shapes(model))
    assert projection.bases == before and projection.info == info  # the same objects: nothing has grown
    stream_model(model).add_task(1, [2, 3], seed=3)
    projection.fit_entries(shapes(model))
    batched = 0
    for name, basis in projection.bases.items():
        old = before[name]
        if old.batch_shape == (5,):
            batched += 1
            assert basis.batch_shape == (7,) and torch.equal(basis.columns[:5], old.columns)
            assert not basis.ranks[5:].any() and not basis.columns[5:].any()
        else:
            assert basis is old
        parameter = shapes(model)[name.removesuffix(".T")]
        assert torch.Size(projection.info[name]["shape"]).numel() == torch.Size(parameter).numel()
        assert projection.info[name]["rank_per_task"] == info[name]["rank_per_task"]
    assert batched == {"pgp": 0, "attention": 1, "functional": 1}[method]
    again = Projection(projection.config)
    again.load_state(*projection.state())  # what files hold is consistent
    projection.projector.anchor(model.base_model.prompt_parameters().items())


@pytest.mark.parametrize("method", METHODS)
def test_old_entries_stay_protected_and_new_ones_are_free(method):
    model, projection = learned(method)
    tuner = model.base_model
    tuner.add_task(1, [2, 3], seed=3)
    tuner.begin_task(1)
    projection.fit_entries(shapes(model))
    projector = projection.projector
    projector.anchor(tuner.prompt_parameters().items())
    start = tuner.prompt_parameters()[KEY].detach().clone()
    with torch.no_grad():
        tuner.prompt_parameters()[KEY].add_(torch.randn_like(start))
    projector.project_updates_(tuner.prompt_parameters().items())
    moved = (tuner.prompt_parameters()[KEY] - start).detach().double()
    assert (moved.flatten(1).norm(dim=-1) > 0).all()
    for name, basis in projection.bases.items():
        if name.startswith(KEY):
            rows = (moved.mT if name.endswith(".T") else moved).reshape(*basis.batch_shape, -1, basis.dim)
            assert basis.rank and (rows @ basis.columns).abs().max() < 1e-5
    projection.update_bases(tuner, [({"pixel_values": tiny.images(6, seed=1)}, range(6))], task=1)
    for name, basis in projection.bases.items():  # and they grow together
        assert torch.Size(projection.info[name]["shape"]).numel() == shapes(model)[name.removesuffix(".T")][0] * (
            torch.Size(shapes(model)[name.removesuffix(".T")][1:]).numel()
        )
        assert len(projection.info[name]["rank_per_task"]) == 2 and isinstance(basis, Basis)


@pytest.mark.parametrize("adapter", ["dualprompt", "clip"])
def test_bases_of_what_does_not_grow_are_left_alone(adapter):
    model = tiny.model(adapter)
    projection = Projection(ProjectionConfig(energy=0.6))
    stream_model(model).prepare_stream([[0, 1], [2, 3], [4, 5]], {label: f"class {label}" for label in range(6)})
    projection.update_bases(model.base_model, [({"pixel_values": tiny.images(6)}, range(6))])
    before = dict(projection.bases)
    stream_model(model).add_task(4, [0], seed=3)
    projection.fit_entries(shapes(model))
    assert before and all(projection.bases[name] is basis for name, basis in before.items())


@pytest.mark.parametrize("method", ["pgp", "functional"])
def test_a_run_with_a_growing_pool(tmp_path, method):
    """A stream known in advance: the pool has all entries from the start, and each task selects among its own and older."""

    def trainer(folder):
        config = ProjectionConfig(method=method, energy=0.7, key_energy=0.7)
        return tiny.trainer(
            folder, model=tiny.model("l2p", grow_pool=2), projection=config, num_train_epochs=1, compensate_drift=False
        )

    made = trainer(tmp_path / "straight")
    made.train()
    assert [len(row) for row in made.results.usage] == [9, 9, 9]
    configs = [
        stream_model(
            load_pretrained(tmp_path / "straight" / f"task-{t}", backbone=tiny.backbone()).model
        ).adapter_config
        for t in (1, 2, 3)
    ]
    assert [(one.pool_size, one.entries, one.learned_entries) for one in configs] == [(5, 9, 5), (5, 9, 7), (5, 9, 9)]
    trainer(tmp_path / "resumed").train_task(0)
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same_results(made.results.to_dict(), resumed.results.to_dict())
    files = [load_file(tmp_path / run / "adapter_model.safetensors") for run in ("straight", "resumed")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
