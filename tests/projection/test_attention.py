"""Consistent attention: the rows of both axes, the two-sided projection, and the LayerNorm penalty."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
import torch
from torch import nn

from pgp_hf.projection import CONDITIONS, Basis, NullSpaceProjector, Projection, ProjectionConfig
from pgp_hf.projection.conditions import Context

pytestmark = pytest.mark.usefixtures("without_figures")

HEADS = 3


def config(**kwargs):
    return ProjectionConfig(
        **{"method": "attention", "energy": 1.0, "key_energy": None, "value_energy": 1.0, **kwargs}
    )


def observed(model, pixels):
    found = CONDITIONS["attention"](model.base_model, {"pixel_values": pixels}, Context(config()))
    return {name: (role, rows) for name, role, rows in found}


def entrance(model):
    """The norms before the first attention, and that attention."""
    backbone = model.base_model.backbone
    if hasattr(backbone, "pre_layrnorm"):
        first = backbone.encoder.layers[0]
        return [backbone.pre_layrnorm, first.layer_norm1], first.self_attn
    first = backbone.layers[0]
    return [first.layernorm_before], first.attention


def randomise(model):
    """Give the norms weights and biases unlike those of a new model, and all tokens the same query."""
    norms, attention = entrance(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(1 + 0.5 * torch.randn(norm.weight.shape, generator=generator))
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
        attention.q_proj.bias.copy_(torch.randn(attention.q_proj.bias.shape, generator=generator))
        attention.q_proj.weight.zero_()  # leaves few rows, and room for the prompt to move
    return model


def tokens(model, pixels):
    """Return the tokens that enter the network, `(B, T, d)`, and the number of prompt tokens."""
    model(pixel_values=pixels)
    layer = model.base_model.layer
    return layer(pixels).detach(), layer.inserted


def through(norms, x, statistics=None):
    """Apply the norms, written out, with `statistics` of an earlier call in place of those of `x`."""
    used = []
    for i, norm in enumerate(norms):
        mean, deviation = x.mean(-1, keepdim=True), (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        mean, deviation = (mean, deviation) if statistics is None else statistics[i]
        used.append((mean, deviation))
        x = (x - mean) / deviation * norm.weight + norm.bias
    return x, used


def by_head(projection, hidden):
    return projection(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)


@pytest.mark.parametrize("method", ["l2p", "clip"])
def test_rows_by_definition(method):
    """One head, one image and one token at a time; the entries' columns in their places."""
    model, pixels = tiny.model(method, **({"prompt_length": 3} if method == "l2p" else {})), tiny.images(3)
    norms, attention = entrance(model)
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    found = observed(model, pixels)
    x, inserted = tokens(model, pixels)
    hidden, statistics = through(norms, x)
    name = next(iter(model.base_model.prompt_parameters()))
    role, width = found[name]
    transposed_role, length = found[f"{name}.T"]
    assert (role, transposed_role) == ("prompt", "value")
    dh, scale = attention.head_dim, torch.stack([norm.weight for norm in norms]).prod(0)
    width = width.unflatten(0, (3, HEADS, -1))
    length = length.unflatten(-2, (3, HEADS, -1)) if method == "l2p" else length.unflatten(0, (3, HEADS, -1))
    selected = model.base_model.selected_prompts
    for b in range(3):
        for head in range(HEADS):
            part = slice(head * dh, head * dh + dh)
            query = (hidden[b] @ attention.q_proj.weight.T + attention.q_proj.bias)[:, part]
            key = (hidden[b] @ attention.k_proj.weight.T + attention.k_proj.bias)[:, part]
            expected = query @ attention.k_proj.weight[part] * scale
            assert torch.allclose(width[b, head], expected, rtol=1e-4, atol=1e-4)
            weights = (query @ key.T / dh**0.5).softmax(-1)[:, 1 : 1 + inserted]
            for _, deviation in statistics:
                weights = weights / deviation[b, 1 : 1 + inserted, 0]
            if method == "clip":
                assert torch.allclose(length[b, head], weights, rtol=1e-4, atol=1e-5)
                continue
            for entry in range(5):
                slot = (selected[b] == entry).nonzero().flatten().tolist()
                expected = weights[:, 3 * slot[0] : 3 * slot[0] + 3] if slot else torch.zeros_like(weights[:, :3])
                assert torch.allclose(length[entry, b, head], expected, rtol=1e-4, atol=1e-5)


def learned(model, pixels, settings):
    projection = Projection(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        projection.update_bases(model.base_model, [({"pixel_values": pixels}, list(range(len(pixels))))])
    return projection


@pytest.mark.parametrize("method", ["l2p", "clip"])
def test_the_first_attention_of_old_images_is_consistent(method):
    """As long as the tokens' statistics stay: the logits of old queries for the prompt, and the prompt's contribution."""
    settings = {"prompt_length": 5} if method == "l2p" else {"image_length": 5}
    model, old = randomise(tiny.model(method, **settings)), tiny.images(1)
    norms, attention = entrance(model)
    start, inserted = tokens(model, old)
    prompt = slice(1, 1 + inserted)
    hidden, statistics = through(norms, start)
    query = by_head(attention.q_proj, hidden)

    def sides(x):
        z = through(norms, x, statistics)[0]  # statistics from before: only the penalty limits their drift
        logits = query @ by_head(attention.k_proj, z).mT
        weights = (query @ by_head(attention.k_proj, hidden).mT * attention.head_dim**-0.5).softmax(-1)
        return logits[..., prompt], weights[..., prompt] @ by_head(attention.v_proj, z)[..., prompt, :]

    name, parameter = next(iter(model.base_model.prompt_parameters().items()))
    before = parameter.detach().clone()
    changes = {}
    for kind, values in (("none", None), ("one", None), ("both", 1.0)):
        projection = learned(model, old, config(value_energy=values))
        projection.projector.anchor(model.base_model.prompt_parameters().items())
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            if kind != "none":
                projection.projector.project_updates_(model.base_model.prompt_parameters().items())
            changes[kind] = [
                float((a - b).abs().max()) for a, b in zip(sides(tokens(model, old)[0]), sides(start), strict=True)
            ]
            assert (parameter - before).norm() > 1  # room is left
            parameter.copy_(before)
    assert min(changes["none"]) > 0.1
    assert changes["one"][0] < 1e-4 < 0.05 < changes["one"][1]
    assert max(changes["both"]) < 1e-4
    assert set(projection.bases) == {name, f"{name}.T"}


def test_both_projections_hold_under_adam():
    """(batch, rows, n): along n by one basis, along the rows by the other, in either order."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(4, 6, 10))
    right = Basis(torch.linalg.qr(torch.randn(10, 3)).Q)
    left = Basis(torch.linalg.qr(torch.randn(4, 6, 2)).Q)
    finals = []
    for bases in ({"p": right, "p.T": left}, {"p.T": left, "p": right}):
        one = nn.Parameter(parameter.detach().clone())
        optimizer = torch.optim.Adam([one], lr=0.1)
        projector = NullSpaceProjector(bases)
        projector.anchor([("p", one)])
        projector.attach(optimizer, lambda one=one: [("p", one)])
        for _ in range(5):
            optimizer.zero_grad()
            (one.square() * torch.linspace(0.1, 3, 10)).sum().backward()
            optimizer.step()
        moved = (one - parameter).detach().double()
        assert moved.norm() > 1
        assert (moved @ right.columns).norm() < 1e-6 * moved.norm() > (moved.mT @ left.columns).norm()
        finals.append(moved)
    assert torch.allclose(*finals, atol=1e-6)
    projector = NullSpaceProjector({"p": right, "p.T": left}, "gradient")
    parameter.grad = torch.randn_like(parameter)
    projector.project_gradients_([("p", parameter)])
    assert (parameter.grad.double() @ right.columns).norm() < 1e-5 > (parameter.grad.double().mT @ left.columns).norm()


def test_a_transposed_basis_must_fit():
    projector = NullSpaceProjector({"p.T": Basis.empty(10, (4,))})
    with pytest.raises(ValueError, match=r"p\.T has shape \(4, 10, 6\).*\(4, rows, 10\)"):
        projector.anchor([("p", torch.zeros(4, 6, 10))])
    with pytest.raises(ValueError, match="no parameter is named 'q'"):
        NullSpaceProjector({"q.T": Basis.empty(6)}).anchor([("p", torch.zeros(4, 6, 10))])


def test_prefixes_meet_the_attention_directly():
    model, pixels = tiny.model("dualprompt"), tiny.images()
    ours = CONDITIONS["attention"](model.base_model, {"pixel_values": pixels}, Context(config()))
    theirs = CONDITIONS["pgp"](model.base_model, {"pixel_values": pixels}, Context(config()))
    for a, b in zip(ours, theirs, strict=True):
        assert a[:2] == b[:2] and torch.equal(a[2], b[2])


def test_files_name_both_axes(tmp_path):
    model = randomise(tiny.model(prompt_length=5))
    projection = learned(model, tiny.images(1), config(key_energy=0.9))
    tensors, description = projection.state()
    prompt, key = model.base_model.prompt_parameters()
    assert set(tensors) == {prompt, f"{prompt}.T", key}
    shapes = {name: description[name]["shape"] for name in tensors}
    assert shapes == {prompt: [25, 24], f"{prompt}.T": [5, 24, 5], key: [5, 24]}
    loaded = Projection(config(key_energy=0.9))
    loaded.load_state(tensors, json.loads(json.dumps(description)))
    loaded.projector.anchor(model.base_model.prompt_parameters().items())
    assert loaded.projector.hold_norm == {key} and loaded.info == projection.info
    assert all(torch.equal(loaded.bases[name].columns, projection.bases[name].columns) for name in tensors)


def entering(model, pixels, count):
    """Return the prompt tokens of an image as they enter the first LayerNorm, `(P, d)`."""
    backbone, found = model.base_model.backbone, []
    norm = backbone.pre_layrnorm if hasattr(backbone, "pre_layrnorm") else backbone.layers[0].layernorm_before
    hook = norm.register_forward_pre_hook(lambda module, args: found.append(args[0].detach().clone()))
    with torch.no_grad():
        model(pixel_values=pixels)
    hook.remove()
    return found[-1][0, 1 : 1 + count]  # an earlier pass, if any, computed the query


@pytest.mark.parametrize(("method", "settings", "count"), [("l2p", {"top_k": 5}, 15), ("clip", {}, 3)])
def test_penalty_is_the_change_of_mean_and_deviation(method, settings, count):
    """It concerns tokens as they enter: a prompt may keep both while its sum with a position embedding does not."""
    model, pixels = tiny.model(method, **settings), tiny.images(2)  # an image selects the whole pool
    if method == "l2p":
        with torch.no_grad():
            model.base_model.layer.position_embeddings.mul_(20)
    tuner = model.base_model
    projection = Projection(config(ln_penalty=0.3, energy=0.5, value_energy=0.5))
    assert projection.penalty(tuner) == 0  # the first task has nothing to keep
    projection.update_bases(tuner, [({"pixel_values": pixels}, [0, 1])])
    with pytest.raises(RuntimeError, match="anchor"):
        projection.penalty(tuner)
    projection.projector.anchor(tuner.prompt_parameters().items())
    prompt, *keys = tuner.prompt_parameters().values()
    start = prompt.detach().clone()
    assert float(projection.penalty(tuner).detach()) == 0

    def expected():
        now, then = (tokens.double() for tokens in (entering(model, pixels, count), before))
        return 0.3 * sum(
            float((of(now) - of(then)).abs().sum()) for of in (lambda z: z.mean(-1), lambda z: z.std(-1, correction=0))
        )

    before = entering(model, pixels, count)
    with torch.no_grad():
        prompt.copy_(start.flip(-1))  # the same numbers in another order
    penalty = projection.penalty(tuner)
    if method == "l2p":
        assert float(penalty.detach()) > 0.1
    assert float(penalty.detach()) == pytest.approx(expected(), rel=1e-3, abs=1e-5)
    with torch.no_grad():
        prompt.copy_(1.5 * start + 0.2)
        for key in keys:
            key.mul_(2)  # no token, no LayerNorm, and the same selection
    penalty = projection.penalty(tuner)
    assert float(penalty.detach()) == pytest.approx(expected(), rel=1e-3)
    penalty.backward()
    assert prompt.grad.isfinite().all() and prompt.grad.any() and not any(key.grad is not None for key in keys)
    with torch.no_grad():
        prompt.copy_(
            1 - tuner.token_offsets()[next(iter(tuner.prompt_parameters()))]
        )  # a standard deviation of 0 has a finite slope too
    prompt.grad = None
    projection.penalty(tuner).backward()
    assert prompt.grad.isfinite().all()
    assert learned(model, pixels, config(energy=0.5)).penalty(tuner) == 0


def test_penalty_is_for_tokens(tmp_path):
    """A prefix passes through no LayerNorm."""
    model = tiny.model("dualprompt")
    settings = config(ln_penalty=1.0, energy=0.5, value_energy=0.5)
    projection = learned(model, tiny.images(2), settings)
    projection.projector.anchor(model.base_model.prompt_parameters().items())
    with torch.no_grad():
        for prefix in model.base_model.prompt_parameters().values():
            prefix.mul_(2)
    assert projection.penalty(model.base_model) == 0
    with pytest.raises(ValueError, match=r"ln_penalty=1.0 is for prompts that enter.*dualprompt adapter has none"):
        tiny.trainer(tmp_path, model=model, projection=settings)


def test_penalty_is_counted_once_a_step(tmp_path):
    """Splitting a step's images into batches does not change the loss."""
    settings = config(ln_penalty=0.5, energy=0.9, value_energy=0.5)
    trainer = tiny.trainer(tmp_path, projection=settings, num_train_epochs=1)
    trainer.train_task(0)
    model = trainer.model.eval()
    parameters = model.base_model.prompt_parameters()
    trainer.projection.projector.anchor(parameters.items())
    with torch.no_grad():
        next(iter(parameters.values())).mul_(1.1)
    penalty = float(trainer.projection.penalty(model.base_model).detach())
    pixels, labels = tiny.images(6), torch.tensor(list(trainer.stream.tasks[0].classes) * 3)

    def loss(part, items):
        inputs = {"pixel_values": pixels[part], "labels": labels[part]}
        return float(trainer.compute_loss(model, inputs, num_items_in_batch=items).detach())

    with_penalty = [loss(slice(None), None), loss(slice(2), 6) + loss(slice(2, 6), 6)]
    trainer.projection.config.ln_penalty = 0.0
    assert penalty > 0.1
    assert with_penalty == pytest.approx([loss(slice(None), None) + penalty] * 2, rel=1e-5)
