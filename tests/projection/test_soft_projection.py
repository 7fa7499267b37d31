"""Projections that shrink movements instead of cutting them, and images that count the same."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from pgp_hf import ProjectionConfig
from pgp_hf.projection import CONDITIONS, Basis, NullSpaceProjector, Projection, SecondMoment
from pgp_hf.projection.conditions import Context
from pgp_hf.projection.config import ADDED
from pgp_hf.projection.state import Observed

pytestmark = pytest.mark.usefixtures("without_figures")

FUNCTIONAL = {"method": "functional", "energy": 0.9, "key_energy": 0.9}


@pytest.mark.parametrize("apply_to", ["update", "both"])
def test_a_tasks_movement_is_shrunk_once(apply_to):
    """Along each column by its strength, however many steps there were."""
    torch.manual_seed(0)
    columns = torch.linalg.qr(torch.randn(2, 6, 3, dtype=torch.float64)).Q
    strength = torch.tensor([[1.0, 0.5, 0.1], [0.9, 0.0, 1.0]], dtype=torch.float64)
    ends = []
    for soft in (False, True):
        parameter, goal = nn.Parameter(torch.ones(2, 4, 6)), torch.randn(2, 4, 6, generator=torch.Generator())
        projector = NullSpaceProjector({"p": Basis(columns)} if soft else {}, apply_to=apply_to)
        projector.strength = {"p": strength} if soft else {}
        projector.anchor([("p", parameter)])
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        projector.attach(optimizer, lambda parameter=parameter: [("p", parameter)])
        for _ in range(5):
            optimizer.zero_grad()
            (parameter * goal).sum().backward()  # the same gradient wherever it is
            optimizer.step()
        projector.check([("p", parameter)])  # which a strength promises nothing to
        ends.append((parameter.detach() - 1).double())
    free, soft = ends
    left = (1 - strength) ** (2 if apply_to == "both" else 1)
    inside = free @ columns
    expected = free - inside @ columns.mT + (inside * left[:, None]) @ columns.mT
    assert torch.allclose(soft, expected, atol=1e-6)


def test_shares_are_summed_over_the_tasks():
    """In a pool of two entries of which the second is not selected in the first task."""
    torch.manual_seed(0)
    projection = Projection(ProjectionConfig(method="functional", energy=0.8, softness=0.02))
    moments = []
    for scale in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0])):
        moments.append(SecondMoment(5, (2,)).update(torch.randn(2, 4, 5) * scale[:, None, None]))
        projection._observed = {"p": Observed("prompt", 0.8, moments[-1])}
        projection.end_task({"p": (2, 1, 5)})
    columns, info = projection.bases["p"].columns, projection.info["p"]
    first = info["rank_per_task"][0]
    expected = torch.zeros(2, columns.shape[-1], dtype=torch.float64)
    for task, moment in enumerate(moments):
        along = (columns * (moment.sum @ columns)).sum(-2) / moment.total.clamp_min(1e-300)[:, None]
        expected += along if task else along * (torch.arange(columns.shape[-1]) < first)
    shares = torch.tensor(info["shares"])
    assert torch.allclose(shares.double(), expected, atol=1e-6) and shares[1].any()
    assert torch.allclose(projection.projector.strength["p"].float(), shares / (shares + 0.02))
    again = Projection(projection.config)
    again.load_state(*projection.state())
    assert torch.equal(again.projector.strength["p"], projection.projector.strength["p"])
    projection.fit_entries({"p": (3, 1, 5)})
    assert not projection.projector.strength["p"][2].any()
    projection.info["p"]["shares"] = [[0.5] * 9]
    with pytest.raises(ValueError, match="do not fit a basis"):
        again.load_state(*projection.state())


def test_resumed_is_straight(tmp_path):
    soft = ProjectionConfig(**FUNCTIONAL, softness=0.01)
    kwargs = {"projection": soft, "num_train_epochs": 1}
    tiny.trainer(tmp_path / "straight", **kwargs).train()
    stopped = tiny.trainer(tmp_path / "stopped", **kwargs)
    stopped.train_task(0)
    stopped.train_task(1)
    tiny.trainer(tmp_path / "stopped", **kwargs).train(resume_from_checkpoint=True)
    ends = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "stopped")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    told = json.loads((tmp_path / "straight" / "projection.json").read_text(encoding="utf-8"))
    assert told["softness"] == 0.01 and any("shares" in info for info in told.values() if isinstance(info, dict))


def test_runs_of_earlier_versions_go_on():
    """Their files lack these settings, which are read as what these versions did."""
    assert {name: getattr(ProjectionConfig(), name) for name in ADDED} == ADDED


def test_equal_images_have_rows_of_norm_one():
    model, images = tiny.model(), tiny.images(4)
    found = []
    for equal in (False, True):
        context = Context(ProjectionConfig(**FUNCTIONAL, probes=3, equal_images=equal), range(4), 0, 0)
        with torch.no_grad():
            rows = CONDITIONS["functional"](model.base_model, {"pixel_values": images}, context)
            found.append(next(rows for _, role, rows in rows if role == "prompt").unflatten(-2, (4, 3)))
    plain, equal = found
    norm = plain.norm(dim=(-2, -1), keepdim=True)
    assert torch.allclose(equal * norm, plain, atol=1e-6)
    selected = norm[..., 0, 0] > 0
    assert torch.allclose(equal.norm(dim=(-2, -1)), selected.float()) and not selected.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"softness": -0.1}, "softness=-0.1"),
        ({"softness": float("nan")}, "softness=nan"),
        ({"equal_images": 1}, "equal_images=1"),
        ({"equal_images": True}, "equal_images=True does nothing with method='pgp'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ProjectionConfig(**settings)


def test_a_basis_of_full_rank_fixes_only_what_it_cuts():
    parameter, basis = nn.Parameter(torch.ones(4, 6)), Basis(torch.eye(6))
    projector = NullSpaceProjector({"p": basis})
    assert projector.fixed([("p", parameter)]) == [parameter]
    projector.strength = {"p": torch.full((6,), 0.5)}
    assert projector.fixed([("p", parameter)]) == []
