"""The projector under real optimizers: what moves, what must not, and what a plain gradient projection misses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pgp_hf.projection import Basis, NullSpaceProjector, SecondMoment
from pgp_hf.projection.config import APPLY_TO

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.05}),
    "sgd momentum": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd momentum decay": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "adam": (ADAM, {"lr": 0.03}),
    "adamw": (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}),
    "adamw fused": (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1, "fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
}
if hasattr(torch.optim, "Adafactor"):  # torch 2.5
    OPTIMIZERS["adafactor"] = (torch.optim.Adafactor, {"lr": 0.05})

# one parameter as a prompt pool, one as keys, one with a basis for each head, one without a basis
SHAPES = {"prompt": (6, 3, 12), "key": (6, 12), "heads": (3, 4, 8), "free": (5, 12)}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}  # unit roundoff


class Task(nn.Module):
    """A random regression with gradients of very different scales, which Adam distorts."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape).mul(2).sub(1).to(dtype)))
        self.generator = torch.Generator().manual_seed(1)

    def loss(self):
        total = 0.0
        for parameter in self.parameters():
            scales = torch.logspace(-2, 1, parameter.shape[-1])
            target = torch.randn(parameter.shape, generator=self.generator)
            total = total + (scales * (parameter.float() - target)).square().mean()
        return total


def make_bases():
    def basis(dim, ranks, batch):
        rows = torch.randn(*batch, dim, dim)
        for index, rank in enumerate(ranks):
            rows.view(-1, dim, dim)[index, rank:] = 0
        return Basis.empty(dim, batch).extend(SecondMoment(dim, batch).update(rows), 1.0)

    return {"prompt": basis(12, [5], ()), "key": basis(12, [2], ()), "heads": basis(8, [3, 1, 6], (3,))}


def train(task, optimizer, steps=20, accumulate=2, clip=1.0):
    optimizer = OPTIMIZERS[optimizer][0](task.parameters(), **OPTIMIZERS[optimizer][1])

    def run():
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(accumulate):
                (task.loss() / accumulate).backward()
            nn.utils.clip_grad_norm_(task.parameters(), clip)
            optimizer.step()

    return optimizer, run


def values(task):
    return {name: parameter.detach().clone() for name, parameter in task.named_parameters()}


def inside(bases, before, after):
    """Per protected parameter: norm of the movement in the protected space, and of the whole movement."""
    norms = {}
    for name, basis in bases.items():
        moved = (after[name].double() - before[name].double()).reshape(*basis.batch_shape, -1, basis.dim)
        norms[name] = float((moved @ basis.columns).norm()), float(moved.norm())
    return norms


def run(optimizer, apply_to, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    bases, task = make_bases(), Task(dtype)
    before = values(task)
    trained, go = train(task, optimizer, **kwargs)
    if apply_to is not None:
        projector = NullSpaceProjector(bases, apply_to)
        projector.anchor(task.named_parameters())
        projector.attach(trained, task.named_parameters)
    go()
    return bases, before, values(task)


@pytest.mark.parametrize("apply_to", ["update", "both"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_stay_in_the_null_space(optimizer, apply_to):
    for name, (protected, whole) in inside(*run(optimizer, apply_to)).items():
        assert whole > 1e-2, name
        assert protected / whole < 1e-5, (name, protected / whole)
    for name, (protected, whole) in inside(*run(optimizer, None)).items():
        assert protected / whole > 0.1, name  # what the projection had to remove


def test_rounding_does_not_pile_up():
    """After many steps the movement in the protected space is the rounding of one value, not of hundreds."""
    bases, before, after = run("adamw", "update", steps=300)
    for name, (protected, _) in inside(bases, before, after).items():
        assert protected <= UNIT[torch.float32] * float(after[name].double().norm()) * 1.01


@pytest.mark.parametrize("optimizer", ["adamw", "sgd momentum"])
def test_bfloat16_leaves_the_rounding_of_the_value(optimizer):
    """The bound that holds in low precision: |dp M| <= u |p|, with unit roundoff u = 2^-9."""
    bases, before, after = run(optimizer, "update", torch.bfloat16)
    for name, (protected, whole) in inside(bases, before, after).items():
        assert after[name].dtype == torch.bfloat16
        bound = UNIT[torch.bfloat16] * float(after[name].double().norm()) * 1.01
        assert protected <= bound < whole
        assert inside(*run(optimizer, None, torch.bfloat16))[name][0] > 2 * bound


@pytest.mark.parametrize("optimizer", ["sgd", "sgd momentum"])
def test_projected_gradients_suffice_for_sgd(optimizer):
    for name, (protected, whole) in inside(*run(optimizer, "gradient")).items():
        assert whole > 1e-2 and protected / whole < 1e-5, name


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd momentum decay"])
def test_projected_gradients_do_not_suffice_for_adam_or_weight_decay(optimizer):
    """Why "update" is the default: the poster's form leaves the null space under these optimizers."""
    for name, (protected, whole) in inside(*run(optimizer, "gradient")).items():
        assert protected / whole > 1e-2, (name, protected / whole)


@pytest.mark.parametrize("apply_to", APPLY_TO)
def test_parameters_without_a_basis_train_as_ever(apply_to):
    without = float("inf")  # clipping ties parameters together
    assert torch.equal(*(run("adamw", mode, clip=without)[2]["free"] for mode in (None, apply_to)))
    task, empty = Task(), Task()
    empty.load_state_dict(task.state_dict())
    projector = NullSpaceProjector({name: Basis.empty(12) for name in ("prompt", "key")}, apply_to)
    projector.anchor(empty.named_parameters())
    optimizer, go = train(empty, "adamw")
    projector.attach(optimizer, empty.named_parameters)
    go()
    train(task, "adamw")[1]()
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), empty.parameters(), strict=True))


def test_with_both_the_optimizer_knows_the_null_space_alone():
    """Adam's moments, and so its step sizes, do not depend on gradients in the protected space."""
    basis, start, gradient = make_bases()["key"], torch.randn(6, 12), torch.randn(6, 12)
    moved = {}
    for apply_to in ("update", "both"):
        for protected in (0.0, 100.0):
            parameter = nn.Parameter(start.clone())
            optimizer = torch.optim.Adam([parameter], lr=0.1)
            projector = NullSpaceProjector({"p": basis}, apply_to)
            projector.anchor([("p", parameter)])
            handle = projector.attach(optimizer, lambda p=parameter: [("p", p)])
            parameter.grad = gradient + protected * basis.columns.sum(-1).float()
            optimizer.step()
            moved[apply_to, protected] = parameter.detach() - start
            handle.remove()
            assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert torch.allclose(moved["both", 0.0], moved["both", 100.0], atol=1e-4)
    assert not torch.allclose(moved["update", 0.0], moved["update", 100.0], atol=1e-2)


def test_null_space_component_is_the_unprojected_one():
    """Under plain SGD with constant gradients the movement is exactly what remains of the free one."""
    basis, start, gradient = make_bases()["key"], torch.randn(6, 12), torch.randn(6, 12)
    for apply_to in APPLY_TO:
        parameter = nn.Parameter(start.clone())
        optimizer = SGD([parameter], lr=0.1)
        projector = NullSpaceProjector({"p": basis}, apply_to)
        projector.anchor([("p", parameter)])
        projector.attach(optimizer, lambda p=parameter: [("p", p)])
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
        assert torch.allclose(parameter, start - 0.3 * basis.project(gradient), atol=1e-6)


def test_each_head_has_its_own_directions():
    """(heads, rows, n): a direction protected in one head is free in the others."""
    columns = torch.zeros(2, 4, 1)
    columns[0, 0], columns[1, 3] = 1, 1
    parameter = nn.Parameter(torch.zeros(2, 3, 4))
    projector = NullSpaceProjector({"p": Basis(columns)})
    projector.anchor([("p", parameter)])
    parameter.data.fill_(1.0)
    projector.project_updates_([("p", parameter)])
    expected = torch.ones(2, 3, 4)
    expected[0, :, 0], expected[1, :, 3] = 0, 0
    assert torch.equal(parameter.data, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply_to", APPLY_TO)
def test_full_basis_means_no_movement_to_the_bit(apply_to, dtype):
    """Of a whole parameter, and of one head among others."""
    task = Task(dtype)
    before = values(task)
    full = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    heads = torch.zeros(3, 8, 8, dtype=torch.float64)
    heads[1] = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    projector = NullSpaceProjector({"prompt": Basis(full), "key": Basis(full), "heads": Basis(heads)}, apply_to)
    projector.anchor(task.named_parameters())
    optimizer, go = train(task, "adam" if apply_to == "gradient" else "adamw")
    projector.attach(optimizer, task.named_parameters)
    go()
    after = values(task)
    assert torch.equal(after["prompt"], before["prompt"]) and torch.equal(after["key"], before["key"])
    moved = [not torch.equal(after["heads"][h], before["heads"][h]) for h in range(3)]
    assert moved == [True, False, True] and not torch.equal(after["free"], before["free"])
    assert all(torch.isfinite(value).all() for value in after.values())


def test_removed_handles_stop_projecting():
    bases, task = make_bases(), Task()
    before = values(task)
    optimizer, go = train(task, "adamw", steps=3)
    projector = NullSpaceProjector(bases)
    projector.anchor(task.named_parameters())
    handle = projector.attach(optimizer, task.named_parameters)
    go()
    assert all(protected / whole < 1e-5 for protected, whole in inside(bases, before, values(task)).values())
    handle.remove()
    go()
    assert all(protected / whole > 1e-2 for protected, whole in inside(bases, before, values(task)).values())


def test_parameters_are_looked_up_at_every_step():
    """Sharding may swap parameter objects between `attach` and the first step."""
    current = {"p": nn.Parameter(torch.zeros(2, 3))}
    projector = NullSpaceProjector({"p": Basis(torch.eye(3)[:, :1])})
    projector.anchor(current.items())
    current["p"] = nn.Parameter(torch.zeros(2, 3))
    optimizer = SGD(current.values(), lr=1.0)
    projector.attach(optimizer, current.items)
    current["p"].grad = -torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(current["p"].data, torch.tensor([[0.0, 1, 1]] * 2))


@pytest.mark.parametrize("apply_to", APPLY_TO)
def test_skipped_and_scaled_steps_of_a_gradient_scaler(apply_to):
    """A step that the scaler skips changes nothing; in the others the projector sees unscaled gradients."""
    finals = []
    for scaled in (False, True):
        torch.manual_seed(0)
        bases, task = make_bases(), Task()
        start = values(task)
        optimizer = SGD(task.parameters(), lr=0.05, momentum=0.9)
        projector = NullSpaceProjector(bases, apply_to)
        projector.anchor(task.named_parameters())
        projector.attach(optimizer, task.named_parameters)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(6):
            if step == 3:
                if not scaled:
                    continue
                before, scale = values(task), scaler.get_scale()
                scaler.scale(sum(p.sum() for p in task.parameters()) * float("inf")).backward()
            else:
                scaler.scale(task.loss()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step == 3:
                assert scaler.get_scale() < scale  # it was skipped
                assert all(torch.equal(before[n], p) for n, p in task.named_parameters())
        finals.append(values(task))
        assert all(protected / whole < 1e-5 for protected, whole in inside(bases, start, finals[-1]).values())
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in SHAPES)


def test_sharded_parameters_are_projected_shard_by_shard():
    """A DTensor (FSDP2) on dim 0; one process is enough to exercise the path."""
    dist = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs a process group of its own")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        bases = {"p": make_bases()["key"]}
        start = torch.randn(6, 12)
        parameter = nn.Parameter(tensor.distribute_tensor(start.clone(), mesh, [tensor.Shard(0)]))
        for apply_to in APPLY_TO:
            projector = NullSpaceProjector(bases, apply_to)
            projector.anchor([("p", parameter)])
            optimizer = SGD([parameter], lr=0.1)
            projector.attach(optimizer, lambda: [("p", parameter)])
            parameter.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ((protected, whole),) = inside(bases, {"p": start}, {"p": parameter.full_tensor().detach()}).values()
            assert whole > 0.1 and protected / whole < 1e-5
    finally:
        dist.destroy_process_group()


def one(shape=(2, 3), **kwargs):
    return [("p", nn.Parameter(torch.zeros(shape)))], NullSpaceProjector({"p": Basis(torch.eye(3)[:, :1])}, **kwargs)


def test_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="apply_to='step'.*update, gradient, both"):
        one(apply_to="step")


@pytest.mark.parametrize("shape", [(2, 4), (3, 2)])
def test_refuses_parameters_that_the_basis_does_not_fit(shape):
    named, projector = one(shape)
    with pytest.raises(ValueError, match=r"p has shape .*rows, 3\)"):
        projector.anchor(named)


def test_refuses_heads_that_do_not_divide():
    projector = NullSpaceProjector({"p": Basis.empty(4, (3,))})
    with pytest.raises(ValueError, match=r"\(3, rows, 4\)"):
        projector.anchor([("p", torch.zeros(2, 2, 4))])


@pytest.mark.parametrize("call", ["anchor", "project_updates_", "project_gradients_"])
def test_refuses_a_missing_parameter(call):
    """Such as one that a wrapper has renamed: it would go unprotected."""
    ((_, parameter),), projector = one()
    projector.anchor([("p", parameter)])
    with pytest.raises(ValueError, match="no parameter is named 'p'.*module.p"):
        getattr(projector, call)([("module.p", parameter)])


def test_refuses_to_project_from_no_or_an_old_anchor():
    named, projector = one()
    with pytest.raises(RuntimeError, match="p has no anchor"):
        projector.project_updates_(named)
    projector.anchor(named)
    projector.project_updates_(named)
    projector.bases = {"p": Basis(torch.eye(3)[:, :2])}  # the next task's
    with pytest.raises(RuntimeError, match="p has no anchor"):
        projector.project_updates_(named)
