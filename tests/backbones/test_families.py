"""Every family of backbones takes prompts: they are put and read where they should be, and none change nothing."""

from __future__ import annotations

import families
import pytest
import tiny
import torch
from families import ADAPTED, BY_NAME, LEADING
from torch import nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import rotate_half

from pgp_hf.backbones import find

FINAL = {"DINOv3": "norm", "SigLIP": "post_layernorm"}  # the last LayerNorm, "layernorm" by default
IN_DEFAULT = ("DINOv2 with registers", "DINOv3", "SigLIP")


def some(pairs):
    slow = [pytest.mark.slow]
    return [pytest.param(*pair, marks=[] if pair[0] in IN_DEFAULT else slow) for pair in pairs]


@pytest.mark.parametrize("attention", tiny.some_of(("eager", "sdpa"), "sdpa"))
@pytest.mark.parametrize(("name", "adapter"), ADAPTED)
def test_no_prompts_leave_the_model_as_it_is_to_the_bit(name, adapter, attention):
    none = {"prompt_length": 0} if adapter == "l2p" else {"general_length": 0, "expert_length": 0}
    options = {"output_hidden_states": True, **({"output_attentions": True} if attention == "eager" else {})}
    images = tiny.images(3)
    for bare in (False, True):
        base = families.make(name, attention)
        base = base.get_submodule(find(base)[0]) if bare else base
        with torch.no_grad():  # frozen all the same: torch's MultiheadAttention rounds differently if it could learn
            expected = base.requires_grad_(False)(pixel_values=images, **options)
            found = tiny.model(adapter, base=base, **none)(pixel_values=images, **options)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            pairs = [(value, found[key])] if torch.is_tensor(value) else zip(value, found[key], strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), key


# ---- L2P by hand -----------------------------------------------------------------------------------------------------


def turned(name, backbone, pixels, states):
    """Queries or keys `(B, H, T, dh)`, those of patches turned by their positions where the family does so."""
    if name != "DINOv3":
        return states
    cos, sin = backbone.rope_embeddings(pixels)
    patches = states[:, :, -len(cos) :]
    return torch.cat([states[:, :, : -len(cos)], patches * cos + rotate_half(patches) * sin], dim=2)


def by_hand(name, model, pixels, prompts):
    """The last hidden state with prompts put into it, by the layers of the unmodified model."""
    place, family = find(model)
    backbone, start = model.get_submodule(place), 0 if name == "SigLIP" else 1
    embedded = backbone.embeddings(pixels)
    hidden = torch.cat([embedded[:, :start], prompts, embedded[:, start:]], dim=1)
    extra = {"position_embeddings": backbone.rope_embeddings(pixels)} if name == "DINOv3" else {}
    for layer in backbone.get_submodule(family.layers):
        hidden = layer(hidden, attention_mask=None, **extra)
    return getattr(backbone, FINAL.get(name, "layernorm"))(hidden)


def head_input(name, hidden, inserted, head_type):
    """What the head reads, by what each of transformers' own classifiers reads."""
    leading = LEADING.get(name, 1)
    first = 0 if name == "SigLIP" else 1
    prompts = hidden[:, first : first + inserted].mean(1)
    token = hidden[:, 0] if head_type == "token" else prompts
    patches = hidden[:, leading + inserted :].mean(1)
    if name == "SigLIP":
        return patches if head_type == "token" else prompts
    return torch.cat([token, patches], 1) if name.startswith("DINO") else token


@torch.no_grad()
@pytest.mark.parametrize("head_type", ["prompt", "token"])
@pytest.mark.parametrize("name", BY_NAME)
def test_prompts_are_put_and_read_where_they_should_be(name, head_type):
    base, images = families.make(name).requires_grad_(False), tiny.images(3)
    place, family = find(base)
    unprompted = base.get_submodule(place)(pixel_values=images)
    query = unprompted.pooler_output if name == "SigLIP" else unprompted.last_hidden_state[:, 0]
    model = tiny.model("l2p", base=families.make(name), head_type=head_type)
    tuner = model.base_model
    assert torch.equal(tuner.query(images), query)
    found, output = tiny.features(model, images), model(pixel_values=images, output_hidden_states=True)
    layer = tuner.layer
    keys = nn.functional.normalize(layer.l2p_key["default"], dim=-1)
    chosen = (nn.functional.normalize(query, dim=-1) @ keys.T).topk(2).indices
    assert torch.equal(layer.selected, chosen)
    prompts = layer.l2p_prompt["default"][chosen].flatten(1, 2)
    if name not in ("DINOv3", "SigLIP"):  # where CLS has a position, the prompts share it
        prompts = prompts + base.get_submodule(place).embeddings.position_embeddings[:, :1]
    expected = head_input(name, by_hand(name, base, images, prompts), 4, head_type)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, model.get_base_model().classifier(expected), rtol=1e-4, atol=1e-4)
    assert all(hidden.shape == unprompted.last_hidden_state.shape for hidden in output.hidden_states)
    assert found.shape[1] == family.parts * family.width(tuner.backbone) == tuner._head_width(None)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.some_of(BY_NAME, "DINOv3", "SigLIP"))
def test_rows_of_the_first_attention_by_definition(name):
    """Queries as they meet the prompt, turned where the family turns them, and the attention that they pay to it."""
    model, images = tiny.model("l2p", base=families.make(name)), tiny.images(2)
    tuner = model.base_model
    place, family = find(model.get_base_model())
    rows = {key: found for key, _, found in tuner.attention_rows(images)}
    key_name = next(iter(tuner.prompt_parameters()))
    tokens, first = tuner._tokens(images, tuner.query(images)), family.blocks(tuner.backbone)[0]
    norm = next(module for module in first.children() if isinstance(module, nn.LayerNorm))
    attention = next(module for module in first.children() if hasattr(module, "q_proj"))
    hidden = norm(tokens)
    query, key = (part(hidden).unflatten(-1, (3, -1)).transpose(1, 2) for part in (attention.q_proj, attention.k_proj))
    query, key = (turned(name, tuner.backbone, images, states) for states in (query, key))
    weight = attention.k_proj.weight.unflatten(0, (3, -1))
    expected = torch.einsum("bhtk,hkd->bhtd", query, weight) * norm.weight
    torch.testing.assert_close(rows[key_name], expected.flatten(0, 2), rtol=1e-4, atol=1e-4)
    start = 0 if name == "SigLIP" else 1
    deviation = (tokens.var(-1, correction=0) + norm.eps).sqrt()[:, None, None, start : start + 4]
    paid = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)[..., start : start + 4] / deviation
    for b, entries in enumerate(tuner.selected_prompts):
        for slot, entry in enumerate(entries):
            found = rows[f"{key_name}.T"].unflatten(1, (2, -1))[entry, b]
            part = paid[b, ..., 2 * slot : 2 * slot + 2].flatten(0, 1)
            torch.testing.assert_close(found, part, rtol=1e-4, atol=1e-5)


# ---- DualPrompt ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.some_of(BY_NAME, "DINOv3", "SigLIP"))
def test_prefixes_meet_the_attention_without_a_position(name):
    model, images = tiny.model("dualprompt", base=families.make(name)), tiny.images(2)
    tuner, caught = model.base_model, []
    first = tuner.attentions[0]
    first.base_layer.register_forward_pre_hook(lambda module, args, kwargs: caught.append(args[0]), with_kwargs=True)
    first.record = []
    model(pixel_values=images)
    _, weights = first.record[-1]
    attention, hidden = first.base_layer, caught[-1]
    query, key = (part(hidden).unflatten(-1, (3, -1)).transpose(1, 2) for part in (attention.q_proj, attention.k_proj))
    query, key = (turned(name, tuner.backbone, images, states) for states in (query, key))
    prefix = first.dualprompt_general_key["default"].expand(2, -1, -1, -1)
    expected = (query @ torch.cat([prefix, key], 2).mT * query.shape[-1] ** -0.5).softmax(-1)[..., :3]
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


# ---- other sizes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.some_of([one for one in BY_NAME if one != "ViT"], "SigLIP"))
def test_images_of_another_size(name):
    """The adapter's setting reaches backbone and query; where positions fit any size, it changes nothing."""
    model, images = tiny.model("l2p", base=families.make(name), interpolate_pos_encoding=True), tiny.images(2, size=30)
    base = families.make(name).requires_grad_(False)
    backbone = base.get_submodule(find(base)[0])
    options = {} if name.startswith("DINO") else {"interpolate_pos_encoding": True}
    expected = find(base)[1].query(backbone(pixel_values=images, **options))
    assert torch.equal(model.base_model.query(images), expected)
    assert model(pixel_values=images).logits.shape == (2, tiny.CLASSES)
