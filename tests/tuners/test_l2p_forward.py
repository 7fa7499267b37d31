"""The L2P forward pass: against a plain reference, and invisible to everything downstream."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional as F

EVERY_MODEL = pytest.mark.parametrize("kind", ["classification", "backbone"])
EVERY_ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


def backbone_of(model):
    return getattr(model, "vit", model)


def flat(output, path=""):
    """Every tensor of an output, by where it is."""
    tensors = {}
    items = output.items() if hasattr(output, "items") else enumerate(output)
    for name, value in items:
        if isinstance(value, torch.Tensor):
            tensors[f"{path}{name}"] = value
        elif value is not None:
            tensors.update(flat(value, f"{path}{name}."))
    return tensors


def equal(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shapes(output):
    return {name: tuple(value.shape) for name, value in flat(output).items()}


@torch.no_grad()
def reference(base, prompts, keys, images, top_k, head_type):
    """L2P image by image, written out: (selected indices, last hidden state, head input)."""
    vit = backbone_of(base)
    queries = vit(images).last_hidden_state[:, 0]
    position = vit.embeddings.position_embeddings[0, 0]
    selected, hidden = [], []
    for image, query in zip(images, queries, strict=True):
        cosines = torch.stack([query @ key / (query.norm() * key.norm()) for key in keys])
        selected.append(cosines.argsort(descending=True)[:top_k])
        tokens = vit.embeddings(image[None])[0]
        inserted = torch.cat([prompts[m] + position for m in selected[-1]])
        x = torch.cat([tokens[:1], inserted, tokens[1:]])[None]
        for layer in vit.layers:
            x = layer(x)
        x = vit.layernorm(x)[0]
        head = x[1 : 1 + len(inserted)].mean(0) if head_type == "prompt" else x[0]
        hidden.append(torch.cat([head[None], x[1 + len(inserted) :]]))
    return torch.stack(selected), torch.stack(hidden)


# ---- the method ------------------------------------------------------------------------------------------------------


@EVERY_ATTENTION
@EVERY_MODEL
@pytest.mark.parametrize("head_type", ["prompt", "token"])
def test_is_the_reference(kind, attention, head_type):
    base, images = tiny.backbone(kind, attention), tiny.images(6)
    model = tiny.model(kind=kind, attention=attention, head_type=head_type)
    layer = model.base_model.layer
    prompts, keys = layer.l2p_prompt["default"], layer.l2p_key["default"]
    selected, hidden = reference(base, prompts, keys, images, 2, head_type)
    with torch.no_grad():
        output = model(images)
    assert torch.equal(model.base_model.selected_prompts.sort().values, selected.sort().values)
    assert len({tuple(row.tolist()) for row in selected.sort().values}) > 1  # images differ in what they select
    if kind == "classification":
        assert torch.allclose(output.logits, base.classifier(hidden[:, 0]), atol=1e-5)
    else:
        assert torch.allclose(output.last_hidden_state, hidden, atol=1e-5)
        assert torch.allclose(output.pooler_output, base.pooler(hidden), atol=1e-5)
    assert (hidden - backbone_of(base)(images).last_hidden_state).abs().max() > 1e-2  # the prompts do something


def test_prompts_and_keys_start_uniform():
    layer = tiny.model(pool_size=40, prompt_length=5).base_model.layer
    for parameter, shape in ((layer.l2p_prompt["default"], (40, 5, 24)), (layer.l2p_key["default"], (40, 24))):
        assert parameter.shape == shape and -1 <= parameter.min() < -0.9 and 0.9 < parameter.max() <= 1


# ---- the model stays what it was -------------------------------------------------------------------------------------


@EVERY_ATTENTION
@EVERY_MODEL
@pytest.mark.parametrize("none", ["prompt_length", "top_k", "disabled", "unloaded"])
def test_without_prompts_it_is_the_base_model_to_the_bit(kind, attention, none):
    base, images = tiny.backbone(kind, attention), tiny.images()
    what = EVERYTHING if attention == "eager" else {"output_hidden_states": True}
    model = tiny.model(kind=kind, attention=attention, **({none: 0} if none in ("prompt_length", "top_k") else {}))
    with torch.no_grad():
        expected = base(images, **what)
        if none == "disabled":
            assert not equal(model(images, **what), expected)
            with model.disable_adapter():
                assert equal(model(images, **what), expected)
                assert equal(model(images, return_dict=False), base(images, return_dict=False))
            assert not equal(model(images, **what), expected)
            return
        if none == "unloaded":
            assert not equal(model(images, **what), expected)
            model = model.unload()
            assert type(model) is type(base) and not hasattr(model, "peft_config")
            assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in (model, backbone_of(model)))
        assert equal(model(images, **what), expected)


@EVERY_MODEL
@pytest.mark.parametrize("head_type", ["prompt", "token"])
def test_outputs_keep_their_unprompted_shapes(kind, head_type):
    base, images = tiny.backbone(kind, "eager"), tiny.images(3)
    model = tiny.model(kind=kind, attention="eager", head_type=head_type)
    with torch.no_grad():
        output, expected = model(images, **EVERYTHING), base(images, **EVERYTHING)
        assert shapes(output) == shapes(expected) and type(output) is type(expected)
        as_tuple = model(images, return_dict=False, **EVERYTHING)
        assert isinstance(as_tuple, tuple) and equal(as_tuple, output.to_tuple())
        assert shapes(as_tuple) == shapes(base(images, return_dict=False, **EVERYTHING))
    assert len(output.attentions) == 2 and output.attentions[0].shape == (3, 3, 17, 17)
    # of the tokens that stay, index 0 is CLS and the rest are the patches
    assert torch.equal(output.hidden_states[0], expected.hidden_states[0])
    assert not torch.equal(output.hidden_states[1], expected.hidden_states[1])


def test_config_may_ask_for_tuples():
    model = tiny.model(kind="backbone")
    assert not isinstance(model(tiny.images(2), return_dict=None), tuple)
    model.get_base_model().config.return_dict = False
    assert isinstance(model(tiny.images(2)), tuple) and isinstance(model(tiny.images(2), return_dict=None), tuple)
    assert model(tiny.images(2), return_dict=True).last_hidden_state.shape == (2, 17, 24)


@EVERY_MODEL
def test_every_way_in_passes_through_the_adapter(kind):
    """PeftModel, tuner, base model; pixels by name or by position."""
    model, images = tiny.model(kind=kind), tiny.images()
    with torch.no_grad():
        outputs = [
            model(images),
            model(pixel_values=images),
            model.base_model(images),
            model.get_base_model()(images),
        ]
    assert all(equal(outputs[0], output) for output in outputs)


# ---- selection -------------------------------------------------------------------------------------------------------


def test_predictions_do_not_depend_on_the_batch():
    """Batch size, order and neighbours change nothing."""
    model, images = tiny.model(), tiny.images(12)
    with torch.no_grad():
        logits, selected = model(images).logits, model.base_model.selected_prompts
        assert len({tuple(sorted(row)) for row in selected.tolist()}) > 2
        order = torch.randperm(12)
        for parts in (order[None], order.chunk(3), order.split(1), order.split(5)):
            for part in parts:
                alone = model(images[part]).logits
                assert torch.equal(model.base_model.selected_prompts, selected[part])
                assert torch.allclose(alone, logits[part], atol=1e-5)


def test_batchwise_selection_warns_and_depends_on_the_batch():
    with pytest.warns(UserWarning, match="batchwise_prompt=True.*depend on batch size and order"):
        model = tiny.model(batchwise_prompt=True)
    per_image, images = tiny.model(), tiny.images(12)
    with torch.no_grad():
        together = model(images).logits
        assert len({tuple(row) for row in model.base_model.selected_prompts.tolist()}) == 1
        alone = torch.cat([model(image[None]).logits for image in images])
        assert torch.allclose(alone, per_image(images).logits, atol=1e-5)
    assert (together - alone).abs().amax(1).gt(1e-2).any()


@EVERY_MODEL
def test_given_queries_are_the_computed_ones(kind):
    model, images = tiny.model(kind=kind), tiny.images()
    with torch.no_grad():
        query = model.base_model.query(images)
        assert torch.equal(query, backbone_of(tiny.backbone(kind))(images).last_hidden_state[:, 0])
        live = model(images)
        assert equal(model(images, prompt_query=query), live)
        other = model(images, prompt_query=query.flip(0))  # it is used, not recomputed
        assert not equal(other, live)
        with model.disable_adapter():
            assert equal(model(images, prompt_query=query), tiny.backbone(kind)(images))
            assert model.base_model.selected_prompts is None
    for wrong in (query[:-1], query[:, :-1]):
        with pytest.raises(ValueError, match=r"prompt_query of shape .*expected \(5, 24\)"):
            model(images, prompt_query=wrong)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_does_not_reach_the_query(training):
    """The query is deterministic in training, leaves every module's mode alone and draws no random number."""
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model, images = tiny.model(base=tiny.backbone(**dropout), prompt_length=3), tiny.images()
    model.train(training)
    model.base_model.backbone.layers[0].train(not training)  # a mixture, as users make it
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    query = model.base_model.query(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(query, tiny.backbone(**dropout).vit(images).last_hidden_state[:, 0])
    first, second = (model(images).logits for _ in range(2))
    assert not torch.equal(first, second)  # there was dropout in the prompted pass
    assert [module.training for module in model.modules()] == modes
    prompts = model.base_model.layer(images)[:, 1:7]
    assert (0.3 < float((prompts == 0).float().mean()) < 0.7) == training  # prompts are dropped like other tokens


def test_modes_survive_an_error_in_the_query():
    model = tiny.model().train()
    with pytest.raises(ValueError, match="image size"):
        model(torch.zeros(1, 3, 30, 30))
    assert all(module.training for module in model.modules()) and not model.base_model.layer.bypass


# ---- sizes -----------------------------------------------------------------------------------------------------------


@EVERY_MODEL
@pytest.mark.parametrize("by", ["config", "call"])
def test_another_image_size(kind, by):
    """20 -> 30 pixels, by the adapter's config or by the model's own argument; the query is interpolated too."""
    base, images = tiny.backbone(kind), tiny.images(4, size=30)
    model = tiny.model(kind=kind, interpolate_pos_encoding=by == "config")
    argument = {} if by == "config" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = base(images, interpolate_pos_encoding=True)
        output = model(images, **argument)
        assert shapes(output) == shapes(expected)
        query = backbone_of(base)(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        assert equal(output, model(images, prompt_query=query, **argument))
        nothing = tiny.model(kind=kind, interpolate_pos_encoding=by == "config", prompt_length=0)
        assert equal(nothing(images, **argument), expected)
        native = tiny.images(4)
        assert equal(model(native, **argument), tiny.model(kind=kind)(native))
        with pytest.raises(ValueError, match="doesn't match model"):
            model(images, interpolate_pos_encoding=False)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 32, "num_attention_heads": 4, "patch_size": 4, "image_size": 16, "num_channels": 1},
        {"hidden_size": 8, "num_attention_heads": 1, "patch_size": 10, "num_hidden_layers": 1, "num_labels": 11},
        {"image_size": (10, 25), "num_channels": 4, "qkv_bias": False},
    ],
)
def test_any_vit(sizes):
    base = tiny.backbone(**sizes)
    model = tiny.model(base=tiny.backbone(**sizes), pool_size=3, prompt_length=3, top_k=3)
    images = tiny.images(4, base.config.image_size, base.config.num_channels)
    layer = model.base_model.layer
    _, hidden = reference(base, layer.l2p_prompt["default"], layer.l2p_key["default"], images, 3, "prompt")
    with torch.no_grad():
        assert torch.allclose(model(images).logits, base.classifier(hidden[:, 0]), atol=1e-5)
    assert layer.l2p_prompt["default"].shape == (3, 3, base.config.hidden_size)


# ---- what is protected -----------------------------------------------------------------------------------------------


@EVERY_MODEL
@pytest.mark.parametrize("size", [20, 30])
def test_protected_rows(kind, size):
    """For the prompts: CLS, selected prompts and patches with their positions; for the keys: unit queries."""
    base, images = tiny.backbone(kind), tiny.images(5, size)
    interpolate = size != 20
    model = tiny.model(kind=kind, prompt_length=3, interpolate_pos_encoding=interpolate)
    tuner, vit = model.base_model, backbone_of(base)
    with torch.no_grad():
        before = model(images)
        (prompt_name, prompt_role, tokens), (key_name, key_role, queries) = tuner.protected_rows(images)
        assert (prompt_role, key_role) == ("prompt", "key")
        assert [prompt_name, key_name] == list(tuner.prompt_parameters())
        patches = (size // 5) ** 2
        assert tokens.shape == (5 * (1 + 2 * 3 + patches), 24) and queries.shape == (5, 24)
        embedded = vit.embeddings(images, interpolate_pos_encoding=interpolate)
        query = vit(images, interpolate_pos_encoding=interpolate).last_hidden_state[:, 0]
        position = vit.embeddings.position_embeddings[0, 0]
        prompts = tuner.layer.l2p_prompt["default"]
        for b, rows in enumerate(tokens.view(5, -1, 24)):
            selected = tuner.selected_prompts[b]
            assert torch.equal(rows[0], embedded[b, 0]) and torch.equal(rows[7:], embedded[b, 1:])
            assert torch.equal(rows[1:7], (prompts[selected] + position).flatten(0, 1))
            assert torch.allclose(queries[b], query[b] / query[b].norm(), atol=1e-6)
        again = list(tuner.protected_rows(images, prompt_query=query))
        assert torch.equal(again[0][2], tokens) and torch.equal(again[1][2], queries)
        flipped = list(tuner.protected_rows(images, prompt_query=query.flip(0)))
        assert torch.equal(flipped[1][2], queries.flip(0))
        assert equal(model(images), before)  # looking leaves nothing behind
    assert not tokens.requires_grad and F.normalize(queries).allclose(queries)


def test_protected_rows_without_prompts_are_the_tokens():
    images = tiny.images(2)
    rows = dict((role, rows) for _, role, rows in tiny.model(top_k=0).base_model.protected_rows(images))
    assert torch.equal(rows["prompt"], tiny.backbone().vit.embeddings(images).flatten(0, 1)) and len(rows["key"]) == 2


def test_protected_rows_of_a_bfloat16_backbone():
    """Pixels arrive in float32, as every image processor makes them."""
    model = tiny.model(base=tiny.backbone().bfloat16(), prompt_length=3)
    rows = [rows for _, _, rows in model.base_model.protected_rows(tiny.images(2))]
    assert [tuple(r.shape) for r in rows] == [(2 * 23, 24), (2, 24)] and all(r.isfinite().all() for r in rows)
