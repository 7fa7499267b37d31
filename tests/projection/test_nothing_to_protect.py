"""Adapters without shared prompts: every condition runs, and there is no basis."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch

from pgp_hf.projection import CONDITIONS, Context, Projection, ProjectionConfig, Protectable

WITHOUT = [
    ("dualprompt", {"general_length": 0}),
    ("dualprompt", {"general_layers": []}),
    ("clip", {"image_length": 0}),
]


def numbered(pixels):
    return [({"pixel_values": pixels}, list(range(len(pixels))))]


@pytest.mark.parametrize(("adapter", "settings"), WITHOUT)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_no_basis(condition, adapter, settings):
    model, pixels = tiny.model(adapter, **settings), tiny.images()
    tuner, config = model.base_model, ProjectionConfig(method=condition)
    assert tuner.prompt_parameters() == {}
    with torch.no_grad():
        found = CONDITIONS[condition](tuner, {"pixel_values": pixels}, Context(config, range(len(pixels))))
        assert list(found) == []
    projection = Projection(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in range(2):
            projection.observe(tuner, *numbered(pixels)[0])
            projection.update_bases(tuner, numbered(pixels), task=task)
    assert projection.bases == projection.info == {} and projection.rank == 0
    projection.projector.anchor(tuner.prompt_parameters().items())
    projection.projector.project_updates_(tuner.prompt_parameters().items())
    loaded = Projection(config)
    loaded.load_state(*projection.state())
    assert loaded.bases == {}


@pytest.mark.parametrize(("adapter", "settings"), WITHOUT)
def test_no_image_is_read(adapter, settings):
    def no_images():
        raise AssertionError("an image was asked for")
        yield

    Projection().update_bases(tiny.model(adapter, **settings).base_model, no_images())


@pytest.mark.parametrize("space", ["features", "logits", "statistics"])
@pytest.mark.parametrize(("adapter", "settings"), WITHOUT)
def test_a_traced_pass_without_copies(adapter, settings, space):
    model, pixels = tiny.model(adapter, head="statistics", **settings), tiny.images()
    model.base_model.statistics.update(
        tiny.features(tiny.model(adapter, **settings), pixels), torch.tensor([0, 1, 2, 0, 1])
    )
    traced = model.base_model.traced(pixels)
    assert traced.copies == {} and torch.allclose(traced.features, tiny.features(model, pixels), atol=1e-6)
    projection = Projection(ProjectionConfig(method="functional", probe_space=space))
    projection.observe(model.base_model, *numbered(pixels)[0])
    projection.end_task({})
    assert projection.bases == {}


@pytest.mark.parametrize("condition", ["pgp", "attention", "functional"])
def test_no_penalty(condition):
    model, pixels = tiny.model("clip", image_length=0), tiny.images()
    projection = Projection(ProjectionConfig(method=condition, ln_penalty=0.5))
    projection.update_bases(model.base_model, numbered(pixels))
    assert projection.penalty(model.base_model) == 0


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_prompt_of_length_zero_has_no_basis_although_keys_do(condition):
    """A basis for a parameter without elements would be refused when its file is read."""
    model, pixels = tiny.model(prompt_length=0, head_type="token"), tiny.images()
    projection = Projection(ProjectionConfig(method=condition))
    projection.update_bases(model.base_model, numbered(pixels))
    assert [name.rpartition(".")[2] for name in projection.bases] == ["l2p_key"]
    assert all(size > 0 for size in projection.info[next(iter(projection.bases))]["shape"])


@pytest.mark.parametrize("adapter", tiny.ADAPTERS)
def test_tuners_are_protectable(adapter):
    assert isinstance(tiny.model(adapter).base_model, Protectable)
