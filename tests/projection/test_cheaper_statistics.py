"""Statistics that cost less: keys protected by the queries of all images, and passes in bfloat16."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from pgp_hf import ProjectionConfig
from pgp_hf.projection import Basis, Projection
from pgp_hf.projection.config import ADDED

pytestmark = pytest.mark.usefixtures("without_figures")

FUNCTIONAL = {"method": "functional", "energy": 0.9, "key_energy": 0.9}


@pytest.mark.parametrize("method", ["pgp", "functional"])
def test_keys_see_all_images(method, tmp_path):
    """Keys are protected as without `max_images`, prompts as with it."""
    found = {}
    for name, given in (
        ("all", {}),
        ("few", {"max_images": 5}),
        ("both", {"max_images": 5, "all_keys": True}),
    ):
        projection = ProjectionConfig(method=method, energy=0.9, key_energy=0.9, **given)
        trainer = tiny.trainer(tmp_path / name, projection=projection, num_train_epochs=1)
        trainer.train_task(0)
        found[name] = trainer.projection
    key, prompt = (next(name for name in found["all"].info if part in name) for part in ("l2p_key", "l2p_prompt"))
    for name, as_in in ((key, "all"), (prompt, "few")):
        assert found["both"].info[name] == found[as_in].info[name]
        assert torch.equal(found["both"].bases[name].columns, found[as_in].bases[name].columns)
    assert found["few"].info[key] != found["all"].info[key] and found["few"].info[key]["samples"] == 5


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_passes_in_bfloat16_find_the_same_directions(method):
    """Within two degrees; the keys, whose queries stay in float32, to the bit."""
    model, pixels, moments = tiny.model(method), tiny.images(16), {}
    for low in (False, True):
        projection = Projection(ProjectionConfig(**FUNCTIONAL, bf16_probes=low))
        projection.observe(model.base_model, {"pixel_values": pixels}, range(16))
        moments[low] = projection._observed
    assert moments[False].keys() == moments[True].keys()
    for name, (role, _, exact) in moments[False].items():
        near = moments[True][name].moment
        if role == "key":
            assert torch.equal(near.sum, exact.sum)
            continue
        assert near.sum.dtype == torch.float64 and not torch.equal(near.sum, exact.sum)
        bases = [Basis.empty(m.dim, m.batch_shape).extend(m, 0.9) for m in (exact, near)]
        shares = [basis.captured(exact)[exact.total > 0] for basis in bases]
        assert (shares[0] - shares[1]).abs().max() < 1e-3
        left = bases[0].columns.mT - bases[1].project(bases[0].columns.mT)
        for own, kept in zip(
            bases[0].ranks.flatten().tolist(), left.reshape(-1, *left.shape[-2:]).norm(dim=-1), strict=True
        ):
            assert own == 0 or math.degrees(math.acos(min(1.0, float(kept[:own].square().mean().sqrt())))) < 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bf16_probes": True}, "bf16_probes=True does nothing with method='pgp'"),
        ({"method": "frozen", "all_keys": True}, "all_keys=True does nothing with method='frozen'"),
        ({"key_energy": None, "all_keys": True}, "key_energy=None"),
        ({"all_keys": 1}, "all_keys=1 is neither True nor False"),
    ],
)
def test_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        ProjectionConfig(**given)
    assert ADDED["all_keys"] is ADDED["bf16_probes"] is False  # what older files mean


def test_refuses_keys_where_tasks_share_none(tmp_path):
    projection = ProjectionConfig(**FUNCTIONAL, all_keys=True)
    with pytest.raises(ValueError, match="all_keys=True is for the keys of a pool"):
        tiny.trainer(tmp_path, model=tiny.model("dualprompt"), projection=projection)
