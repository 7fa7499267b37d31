"""Functional projection: per-image gradients, the bound that they give, and old features that stay to first order."""

from __future__ import annotations

import copy

import processes
import pytest
import tiny
import torch
from safetensors.torch import load_file

from pgp_hf.projection import CONDITIONS, Basis, Projection, ProjectionConfig, moments
from pgp_hf.projection.conditions import Context, probes

pytestmark = pytest.mark.usefixtures("without_figures")

SEED, TASK = 3, 1


def config(**kwargs):
    return ProjectionConfig(**{"method": "functional", "energy": 1.0, "key_energy": 0.9, **kwargs})


def observations(model, pixels, settings=None, indices=None, classes=None):
    indices = range(len(pixels)) if indices is None else indices
    context = Context(settings or config(), list(indices), TASK, SEED, classes)
    with torch.no_grad():  # as the trainer calls it
        return list(CONDITIONS["functional"](model.base_model, {"pixel_values": pixels}, context))


def prompts(found):
    return {name: rows for name, role, rows in found if role == "prompt"}


def parameters(model):
    return model.base_model.prompt_parameters()


def learned(model, pixels, settings):
    projection = Projection(settings)
    for i in range(0, len(pixels), 2):
        chunk = pixels[i : i + 2]
        images = list(range(i, i + len(chunk)))
        projection.observe(model.base_model, {"pixel_values": chunk}, images, task=TASK, seed=SEED)
    projection.end_task({name: tuple(p.shape) for name, p in parameters(model).items()})
    return projection


@pytest.mark.parametrize("space", ["features", "logits"])
@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_rows_are_the_gradients_of_one_image_at_a_time(method, space):
    """By plain autograd on the parameter itself, image by image and probe by probe."""
    model, pixels = tiny.model(method, attention="eager"), tiny.images(4)
    classes = [4, 1, 2] if space == "logits" else None
    settings, indices = config(probes=3, probe_space=space), [7, 2, 30, 5]
    found = prompts(observations(model, pixels, settings, indices, classes))
    assert set(found) == {name for name in parameters(model) if not name.endswith("key") or method == "dualprompt"}
    tuner, context = model.base_model, Context(settings, indices, TASK, SEED)
    for b, image in enumerate(indices):
        caught = []
        watch = tuner.watch_features(caught.append)
        model(pixel_values=pixels[b : b + 1])
        watch.remove()
        output = tuner.linear_logits(caught[0])[:, classes] if classes else caught[0]
        context.images = [image]
        for probe in range(3):
            direction = probes(context, probe, output)
            own = [parameters(model)[name] for name in found]
            gradients = torch.autograd.grad((direction * output).sum(), own, retain_graph=True)
            for (name, rows), gradient in zip(found.items(), gradients, strict=True):
                expected = gradient.flatten(1) if method == "l2p" else gradient.flatten()
                assert expected.norm() > 1e-3
                assert torch.allclose(rows[..., 3 * b + probe, :], expected, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_probes_in_the_metric_of_the_statistics_head(method):
    """The rows' second moment is J^T Sigma^-1 J: by linearity, those of probes multiplied by a root of Sigma^-1."""
    model, pixels = tiny.model(method, head="statistics"), tiny.images(6)
    tuner = model.base_model
    settings = config(probes=2, probe_space="statistics")
    with pytest.raises(ValueError, match="knows no class yet"):
        observations(model, pixels, settings)
    tuner.statistics.update(tiny.features(tiny.model(method), pixels), torch.tensor([0, 1, 2, 0, 1, 2]))
    root = tuner.statistics.whitening()
    assert torch.allclose(root @ root.mT, torch.linalg.inv(tuner.statistics.covariance), rtol=1e-6)
    found = prompts(observations(model, pixels[:1], settings))
    context, caught = Context(settings, [0], TASK, SEED), []
    watch = tuner.watch_features(caught.append)
    model(pixel_values=pixels[:1])
    watch.remove()
    for probe in range(2):
        direction = probes(context, probe, caught[0]).double() @ root.mT
        own = [parameters(model)[name] for name in found]
        gradients = torch.autograd.grad((direction * caught[0]).sum(), own, retain_graph=True)
        for (name, rows), gradient in zip(found.items(), gradients, strict=True):
            expected = gradient.flatten(1) if method == "l2p" else gradient.flatten()
            assert expected.norm() > 1e-3
            assert torch.allclose(rows[..., probe, :], expected, rtol=1e-3, atol=1e-3 * expected.abs().max()), name


def test_the_metric_of_a_head_that_is_not_there():
    with pytest.raises(ValueError, match="needs a statistics head"):
        observations(tiny.model(), tiny.images(2), config(probe_space="statistics"))


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_leaves_no_trace(method):
    model, pixels = tiny.model(method), tiny.images()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected, state = tiny.features(model, pixels), torch.get_rng_state()
    found = observations(model, pixels)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(rows.requires_grad for _, _, rows in found)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not model.training and torch.equal(tiny.features(model, pixels), expected)
    copy.deepcopy(model)  # no tensor of a graph is left behind
    with pytest.raises((ValueError, RuntimeError)):  # nor after a pass that failed
        model.base_model.traced(pixels[:, :2])
    assert all(layer.copies is None for layer in model.base_model.layers)


def test_traced_features_are_the_features():
    for method in tiny.ADAPTERS:
        for attention in ("eager", "sdpa"):
            model, pixels = tiny.model(method, attention=attention), tiny.images()
            traced = model.base_model.traced(pixels)
            assert torch.allclose(traced.features, tiny.features(model, pixels), atol=1e-6)
            assert all(copies.values.shape[0] == 5 and copies.values.is_leaf for copies in traced.copies.values())


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_sdpa_is_eager_and_autocast_is_close(method):
    pixels = tiny.images()
    expected = prompts(observations(tiny.model(method, attention="eager"), pixels))
    sdpa = prompts(observations(tiny.model(method, attention="sdpa"), pixels))
    with torch.autocast("cpu", torch.bfloat16):
        half = prompts(observations(tiny.model(method), pixels))
    for name, rows in expected.items():
        assert torch.allclose(sdpa[name], rows, rtol=1e-3, atol=1e-4)
        assert half[name].dtype == torch.float32
        chosen = half[name].any(-1) & rows.any(-1)
        cosine = torch.nn.functional.cosine_similarity(half[name], rows, dim=-1)[chosen]
        assert cosine.min() > 0.6 and cosine.mean() > 0.95


def test_unselected_entries_see_nothing():
    model, pixels = tiny.model(prompt_length=3), tiny.images()
    (rows,) = prompts(observations(model, pixels)).values()
    model(pixel_values=pixels)
    chosen = torch.zeros(5, 5, dtype=torch.bool).scatter(1, model.base_model.selected_prompts, True)
    assert rows.shape == (5, 5 * 2, 3 * 24)
    assert torch.equal(rows.any(-1), chosen.T.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_batches_and_order_do_not_matter(method):
    """A probe belongs to its image: the rows of an image are the same in any company."""
    model, pixels = tiny.model(method), tiny.images(6)
    whole = prompts(observations(model, pixels))
    order = torch.tensor([4, 0, 5, 3, 1, 2])
    parts = [prompts(observations(model, pixels[i], indices=i.tolist())) for i in order.split(4)]
    for name, rows in whole.items():
        got = torch.cat([part[name] for part in parts], dim=-2).unflatten(-2, (6, 2))
        assert torch.allclose(got, rows.unflatten(-2, (6, 2))[..., order, :, :], rtol=1e-3, atol=1e-5)


def test_probes_are_unit_gaussians_of_their_counters():
    context, output = Context(config(), list(range(400)), TASK, SEED), torch.zeros(400, 24)
    first = probes(context, 0, output)
    assert abs(float(first.mean())) < 0.05 and abs(float(first.var()) - 1) < 0.05
    assert torch.equal(first, probes(context, 0, output))
    others = [
        probes(Context(config(), list(range(400)), *task_and_seed), probe, output)
        for task_and_seed, probe in (((TASK, SEED), 1), ((TASK + 1, SEED), 0), ((TASK, SEED + 1), 0))
    ]
    for other in [*others, first.roll(1, 0)]:
        assert abs(float((first * other).mean())) < 0.05


def test_images_must_be_numbered():
    model, pixels = tiny.model(), tiny.images()
    for images, given in ((None, "none"), ([1, 2], "2")):
        with pytest.raises(ValueError, match=f"5 images and {given} indices"):
            Projection(config()).observe(model.base_model, {"pixel_values": pixels}, images)


@pytest.mark.parametrize("energy", [0.5, 0.95])
@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_the_basis_holds_its_share_and_the_bound_holds(method, energy):
    """sum_x |J_x D|^2 <= min((1 - energy) tr G, l) |D|^2 for D in the null space, with G the estimate from probes.

    And for several parameters that move together, at most as many times the sum of their bounds.
    """
    model, pixels = tiny.model(method), tiny.images(12)
    projection = learned(model, pixels, config(energy=energy))
    generator, drift, bound, parts = torch.Generator().manual_seed(3), 0.0, 0.0, 0
    for name, rows in prompts(observations(model, pixels)).items():
        basis, rows = projection.bases[name], rows.double()
        shape = list(parameters(model)[name].shape)
        read = [shape[0], 1, shape[1] * shape[2]] if method == "l2p" else [1, parameters(model)[name].numel()]
        assert projection.info[name]["shape"] == read
        flat, left = rows.reshape(-1, *rows.shape[-2:]), basis.project(rows).reshape(-1, *rows.shape[-2:])
        free = torch.eye(basis.dim, dtype=torch.float64).expand(*basis.batch_shape, -1, -1)
        free = basis.project(free).reshape(-1, basis.dim, basis.dim)
        for g, residual, null_space in zip(flat, left, free, strict=True):
            total = g.square().sum()
            assert residual.square().sum() <= (1 - energy) * total * (1 + 1e-9)
            outside = torch.linalg.eigvalsh(g.mT @ g).flip(0)[null_space.shape[0] - round(float(null_space.trace())) :]
            limit = min((1 - energy) * total, outside[0] if len(outside) else 0.0)
            for _ in range(5):
                move = null_space @ torch.randn(basis.dim, generator=generator, dtype=torch.float64)
                assert (g @ move).square().sum() <= limit * move.square().sum() * (1 + 1e-9)
            # each parameter's rows are those of the same probes of the same images
            drift, bound, parts = drift + g @ move, bound + limit * move.square().sum(), parts + 1
        assert 0 < basis.rank < basis.dim
    assert parts == (5 if method == "l2p" else len(projection.bases))
    assert drift.square().sum() <= parts * bound * (1 + 1e-9)


def moved(model, pixels, step, projection=None, seed=5):
    """Features after one step of a given length in a random direction, with and without projection."""
    named = [(name, p) for name, p in parameters(model).items() if "l2p_key" not in name]
    before = [p.detach().clone() for _, p in named]
    if projection is not None:
        projection.projector.anchor(parameters(model).items())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in named:
            direction = torch.randn(p.shape, generator=generator)
            p.add_(step * direction / direction.norm())
        if projection is not None:
            projection.projector.project_updates_(parameters(model).items())
        result = tiny.features(model, pixels)
        length = sum(float((p - old).norm()) for (_, p), old in zip(named, before, strict=True))
        for (_, p), old in zip(named, before, strict=True):
            p.copy_(old)
    return result, length


@pytest.mark.parametrize("space", ["features", "logits"])
@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_old_features_stay_to_first_order(method, space):
    """With every direction seen protected: half the step, a quarter of the drift; unprojected, half of it."""
    model, pixels = tiny.model(method).double(), tiny.images(1).double()
    for p in parameters(model).values():  # PEFT may have kept them in float32
        p.data = p.data.double()
    projection = learned(model, pixels, config(energy=1.0, key_energy=None, probes=40, probe_space=space))
    head = (lambda f: f) if space == "features" else model.base_model.linear_logits
    start = head(tiny.features(model, pixels))

    def drift(step, projection=None):
        features, length = moved(model, pixels, step, projection)
        assert length > 0.5 * step
        return float((head(features) - start).detach().norm())

    free, held = [[drift(step, p) for step in (2e-3, 1e-3)] for p in (None, projection)]
    assert free[0] / free[1] == pytest.approx(2, rel=0.1)
    assert held[0] / held[1] == pytest.approx(4, rel=0.2)
    assert held[0] < 0.02 * free[0]


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_adam_cannot_leave_the_null_space(method):
    """Real steps on a real loss: the movement has nothing in the span, and old features hardly move."""
    drifts = {}
    old, new = tiny.images(2), tiny.images(4, seed=1)
    for protected in (False, True):
        model = tiny.model(method)
        projection = learned(model, old, config(energy=1.0, probes=20, key_energy=None))
        named = {name: p for name, p in parameters(model).items() if name in projection.bases}
        start, before = tiny.features(model, old), {name: p.detach().double() for name, p in named.items()}
        optimizer = torch.optim.Adam(named.values(), lr=1e-3)
        if protected:
            projection.projector.anchor(named.items())
            projection.projector.attach(optimizer, named.items)
        caught = []
        model.base_model.watch_features(caught.append)
        for _ in range(5):
            optimizer.zero_grad()
            model(pixel_values=new)
            caught.pop().square().sum().backward()
            optimizer.step()
        for name, p in named.items():
            basis = projection.bases[name]
            step = (p.detach().double() - before[name]).reshape(*basis.batch_shape, -1, basis.dim)
            leak = float((step @ basis.columns).norm() / step.norm())
            # what is left is the rounding of float32 values, beside a short way
            rounding = 2.0**-24 * float(before[name].norm() / step.norm())
            assert (leak < 1e-6 + rounding) if protected else leak > 0.05, (name, leak)
        drifts[protected] = float((tiny.features(model, old) - start).norm())
    assert drifts[True] < 0.3 * drifts[False]


def test_keys_are_held_like_those_of_pgp():
    model, pixels = tiny.model(), tiny.images()
    inputs = {"pixel_values": pixels}
    (ours,) = (o.rows for o in observations(model, pixels) if o.role == "key")
    (theirs,) = (rows for _, role, rows in model.base_model.protected_rows(**inputs) if role == "key")
    assert torch.equal(ours, theirs)
    query = model.base_model.query(pixels)
    context = Context(config(), list(range(5)), TASK, SEED)
    again = CONDITIONS["functional"](model.base_model, {**inputs, "prompt_query": query}, context)
    assert all(torch.allclose(a.rows, b.rows) for a, b in zip(again, observations(model, pixels), strict=True))


def test_nothing_is_protected_where_nothing_is_prompted():
    model = tiny.model(prompt_length=0)
    assert not prompts(observations(model, tiny.images()))
    assert not prompts(observations(tiny.model("clip", image_length=0), tiny.images()))


@pytest.mark.parametrize("sketch", [512, 20])
def test_two_processes_are_one(sketch, monkeypatch):
    """Images shared out; in second moments, and in sketches that need not shrink."""
    monkeypatch.setattr(moments, "SKETCH", sketch)
    model, pixels = tiny.model(), tiny.images(7)
    whole = learned(model, pixels, config(energy=0.9))

    def work(rank, reduce, gather, broadcast):
        projection = Projection(config(energy=0.9))
        own = list(range(rank, 7, 2))
        batches = (({"pixel_values": pixels[i : i + 1]}, [i]) for i in own)
        gathers = {"reduce": reduce, "gather": gather, "broadcast": broadcast}
        projection.update_bases(copy.deepcopy(model).base_model, batches, task=TASK, seed=SEED, **gathers)
        return projection

    first, second = processes.run(2, work)
    for name, basis in whole.bases.items():
        assert torch.equal(first.bases[name].columns, second.bases[name].columns)
        assert torch.equal(first.bases[name].ranks, basis.ranks)
        mine, theirs = (b.columns @ b.columns.mT for b in (first.bases[name], basis))
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert first.info == second.info == whole.info


def test_a_stream(tmp_path):
    """Through the trainer: files, and a resumed run equal to the bit."""
    projection = config(energy=0.95, key_energy=0.95, probes=4)

    def trainer(folder, **kwargs):
        arguments = {"learning_rate": 0.02, "num_train_epochs": 1, "stream": tiny.stream(num_tasks=2)}
        return tiny.trainer(tmp_path / folder, **{**arguments, "projection": projection, **kwargs})

    straight = trainer("a")
    straight.train()
    info = straight.projection.info["base_model.model.vit.embeddings.l2p_prompt"]
    assert info["shape"] == [5, 1, 48] and info["samples"] == 2 * 24 * 4
    assert info["rank_per_task"] == sorted(info["rank_per_task"]) and info["rank"] < 48
    trainer("b").train_task(0)
    with pytest.raises(ValueError, match="probes=4, this one 2"):
        trainer("b", projection=config(energy=0.95, key_energy=0.95)).train(resume_from_checkpoint=True)
    trainer("b").train(resume_from_checkpoint=True)
    for file in ("adapter_model.safetensors", "projection.safetensors"):
        a, b = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_wide_basis_is_saved_in_single_precision(monkeypatch):
    """The projector uses the rounded basis from the start, so that a resumed run continues with the same."""
    monkeypatch.setattr("pgp_hf.projection.basis.SINGLE", 500)
    model = tiny.model()
    projection = learned(model, tiny.images(12), config(energy=0.9))
    tensors, description = projection.state()
    wide, narrow = (next(n for n in tensors if part in n) for part in ("l2p_prompt", "l2p_key"))
    assert (tensors[wide].dtype, tensors[narrow].dtype) == (torch.float32, torch.float64)
    loaded = Projection(config(energy=0.9))
    loaded.load_state(tensors, description)
    for name, basis in projection.bases.items():
        assert torch.equal(loaded.bases[name].columns, basis.columns)
    assert isinstance(loaded.bases[wide], Basis) and loaded.info == projection.info
