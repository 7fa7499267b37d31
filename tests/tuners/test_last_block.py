"""The last block computes only the tokens that are read: the same numbers up to rounding, and less of them."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch


def passed(model, pixels, seen):
    """Run model and query; return scores, the query and gradients, and note the shapes that the last block's parts see."""
    tuner, last = model.base_model, model.base_model.backbone.layers[-1]
    hooks = [
        part.register_forward_hook(
            lambda part, args, output, name=name: seen.setdefault(name, []).append(args[0].shape[1])
        )
        for name, part in (("mlp", last.mlp), ("key", last.attention.k_proj), ("first", tuner.backbone.layers[0].mlp))
    ]
    model.zero_grad()
    output = model(pixel_values=pixels, labels=torch.arange(len(pixels)))
    output.loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: value.grad for name, value in tuner.trainable().items() if value.grad is not None}
    return output.logits.detach(), tuner.query(pixels), gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("adapter", "settings", "tokens"),
    [
        ("l2p", {}, 1 + 4),
        ("l2p", {"head_type": "token"}, 1 + 4),
        ("dualprompt", {"general_layers": [0], "expert_layers": [0]}, 1),
    ],
)
def test_scores_and_gradients_agree(adapter, settings, tokens, attention):
    model, pixels = tiny.model(adapter, attention=attention, **settings).train().double(), tiny.images().double()
    whole, less = {}, {}
    expected = passed(model, pixels, whole)
    model.base_model.read_last_block()
    found = passed(model, pixels, less)
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-12)
    assert torch.allclose(found[1], expected[1], rtol=0, atol=1e-12)
    assert found[2].keys() == expected[2].keys() and len(found[2]) > 2
    for name, gradient in expected[2].items():
        exact = not name.endswith("_key")  # the similarity with keys is in float32 always
        assert torch.allclose(found[2][name], gradient, rtol=0, atol=1e-9 if exact else 1e-7), name
    inserted = tokens - 1
    assert whole["mlp"] == [17, 17 + inserted] and less["mlp"] == [1, tokens]  # the query, and then the model
    assert less["first"] == whole["first"] and max(less["key"]) == max(whole["key"])
    model.base_model.read_last_block(False)
    assert torch.equal(passed(model, pixels, {})[0], expected[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_the_block_again_and_gets_the_same(reentrant):
    model, pixels = tiny.model().train(), tiny.images()
    expected = passed(model, pixels, {})
    model.base_model.read_last_block()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found, tokens = passed(model, pixels, seen := {}), seen["mlp"]
    assert torch.allclose(found[0], expected[0], atol=1e-5) and tokens[0] == 1  # the query, which nothing runs again
    for name, gradient in expected[2].items():
        assert torch.allclose(found[2][name], gradient, atol=1e-6, rtol=1e-4), name


@torch.no_grad()
def test_a_pass_that_failed_leaves_nothing_to_the_next():
    model, pixels = tiny.model(), tiny.images()
    query, expected = model.base_model.query(pixels), model(pixel_values=pixels).logits
    model.base_model.read_last_block()
    hook = model.base_model.backbone.layers[-1].attention.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(pixel_values=pixels, prompt_query=query)
    hook.remove()
    whole = model(pixel_values=pixels[:2], prompt_query=query[:2], output_hidden_states=True)
    assert torch.allclose(whole.logits, expected[:2], atol=1e-5)


@torch.no_grad()
def test_whoever_asks_for_all_tokens_gets_them():
    model, pixels = tiny.model(), tiny.images()
    tuner, config = model.base_model, model.base_model.backbone.layers[-1].attention.config

    def outputs():
        with model.disable_adapter():
            unprompted = model(pixels).logits
        hidden = model(pixels, output_hidden_states=True).hidden_states
        return [unprompted, tuner.backbone(pixels, prompt_query=query).last_hidden_state, *hidden]

    query = tuner.query(pixels)
    whole = outputs()
    tuner.read_last_block()
    # the prompts of a pass are selected by a query of the last block's own, which may differ in the last bits
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs(), whole, strict=True))
    assert torch.equal(outputs()[0], whole[0]) and torch.equal(outputs()[1], whole[1])
    copied = copy.deepcopy(model)
    assert torch.equal(copied(pixels).logits, model(pixels).logits)
    assert model.unload().vit.layers[-1].attention.config is config


def test_models_of_which_all_is_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has prompts in its last block"):
        tiny.model("dualprompt").base_model.read_last_block()
    with pytest.raises(ValueError, match="last_block='read' is for prompts on a ViT.*'clip_prompt'"):
        tiny.trainer(tmp_path, model=tiny.model("clip"), last_block="read")


@torch.no_grad()
def test_prefixes_in_a_last_block_that_was_read_make_it_whole():
    model, pixels = tiny.model("dualprompt", general_layers=[0], expert_layers=[0]), tiny.images()
    expected = model(pixels).logits
    model.base_model.read_last_block()
    model.add_adapter("other", tiny.config("dualprompt", general_layers=[1], expert_layers=[]))
    assert torch.equal(model(pixels).logits, expected) and not model.base_model.reads_last_block
    model.set_adapter("other")
    assert not torch.allclose(model(pixels).logits, expected)


def test_a_run_records_it_and_keeps_its_queries_apart(tmp_path):
    runs = {}
    for choice in ("full", "read"):
        with tiny.without_figures():
            trainer = tiny.trainer(
                tmp_path / choice,
                stream=tiny.stream(dataset=tiny.data(train=2, test=2), num_tasks=1),
                num_train_epochs=1,
                last_block=choice,
                query_cache=str(tmp_path / "queries"),
            )
            trainer.train()
        assert trainer.results.training["last_block"] == choice
        runs[choice] = trainer.progress.references.features[0]
    assert len(list((tmp_path / "queries").glob("*.safetensors"))) == 2
    assert torch.allclose(*(torch.from_numpy(found) for found in runs.values()), atol=1e-4)


@pytest.mark.parametrize("adapter", ["l2p", "dualprompt"])
def test_a_pass_embeds_its_images_once(adapter, monkeypatch):
    model, pixels = tiny.model(adapter).train(), tiny.images()
    tuner, embedded = model.base_model, []
    embeddings, embed = tuner.layer.base_layer, tuner.layer.base_layer.forward
    monkeypatch.setattr(
        embeddings, "forward", lambda *args, **given: embedded.append(embed(*args, **given)) or embedded[-1]
    )

    def scores(pixels=pixels, **given):
        embedded.clear()
        output = model(pixel_values=pixels, **given)
        tuner.layer.forget()
        return output.logits

    apart = scores(prompt_query=tuner.query(pixels))
    assert torch.equal(scores(), apart) and len(embedded) == 1
    hook = tuner.layer.register_forward_pre_hook(lambda layer, args: None if layer.bypass else 1 / 0)
    changed = pixels.clone()
    for given in (changed, pixels):
        with pytest.raises(ZeroDivisionError):
            model(pixel_values=given)
        changed.neg_()  # in place, after a pass that failed
        assert torch.equal(tuner.query(changed), tuner.query(changed.clone()))
    hook.remove()
    failing = tuner.blocks[0].register_forward_pre_hook(lambda block, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # in the query: nothing of these images is kept
        model(pixel_values=pixels)
    failing.remove()
    assert tuner.layer._shared is None
    other = torch.flip(pixels, [0])
    assert torch.equal(scores(other, prompt_query=tuner.query(other)), apart.flip(0)) and len(embedded) == 1
    scores(pixels.clone().requires_grad_()).sum().backward()  # such as a map of what the scores depend on
    assert len(embedded) == 2 and embedded[1].requires_grad
    watch = embeddings.patch_embeddings.register_forward_hook(lambda *args: None)
    scores()
    assert len(embedded) == 2
    watch.remove()
    embeddings.dropout.p = 0.5
    scores()
    assert len(embedded) == 2
    model.eval()
    assert torch.equal(scores(), apart) and len(embedded) == 1


def test_no_graph_is_kept_below_the_first_layer_with_a_prompt():
    model = tiny.model("dualprompt", general_layers=[], expert_layers=[1]).train()
    found = [
        layer.register_forward_hook(lambda layer, args, output, i=i: recorded.append((i, output.requires_grad)))
        for i, layer in enumerate(model.base_model.backbone.layers)
    ]
    recorded: list[tuple[int, bool]] = []
    model(pixel_values=tiny.images(), labels=torch.arange(5)).loss.backward()
    assert len(found) == 2 and recorded == [
        (0, False),
        (1, False),
        (0, False),
        (1, True),
    ]  # the query, and then the model
