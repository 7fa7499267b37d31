"""Training L2P: which parameters learn, from which term of the loss, in which precision."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional as F

LABELS = torch.tensor([0, 1, 2, 3, 1, 0, 2, 3])


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model, images, labels=LABELS, **kwargs):
    model.zero_grad(set_to_none=True)
    output = model.train()(images, labels=labels, **kwargs)
    output.loss.backward()
    return output, gradients(model)


def parameter(grads, name):
    (value,) = (grad for key, grad in grads.items() if f"l2p_{name}" in key)
    return value


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_only_selected_prompts_keys_and_the_head_learn(attention):
    model, images = tiny.model(attention=attention, pool_size=12, top_k=1), tiny.images(8)
    _, grads = step(model, images)
    assert {name.split("default")[0].split(".")[-2] for name in grads} == {"l2p_prompt", "l2p_key", "modules_to_save"}
    assert set(grads) == {name for name, p in model.named_parameters() if p.requires_grad}
    selected = set(model.base_model.selected_prompts.flatten().tolist())
    assert 1 < len(selected) < 12
    for grad in (parameter(grads, "prompt"), parameter(grads, "key")):
        assert {m for m in range(12) if grad[m].any()} == selected
    assert grads["base_model.model.classifier.modules_to_save.default.weight"].any()


def test_keys_learn_from_the_pull_term_alone():
    images = tiny.images(8)
    _, without = step(tiny.model(pull_constraint_coeff=0), images)
    assert not parameter(without, "key").any()
    model = tiny.model(pull_constraint_coeff=0.7)
    _, with_pull = step(model, images)
    key = model.base_model.layer.l2p_key["default"].detach().clone().requires_grad_()
    cosine = F.cosine_similarity(model.base_model.query(images)[:, None], key[None], dim=-1)
    pull = cosine.gather(1, model.base_model.selected_prompts).sum(1).mean()
    (-0.7 * pull).backward()
    assert torch.allclose(parameter(with_pull, "key"), key.grad, atol=1e-7)
    assert torch.equal(parameter(with_pull, "prompt"), parameter(without, "prompt"))  # and the prompts from the rest


@pytest.mark.parametrize("coeff", [0.0, 0.1, 1.5])
def test_loss_is_cross_entropy_minus_the_pull(coeff):
    model, images = tiny.model(pull_constraint_coeff=coeff), tiny.images(8)
    key = model.base_model.layer.l2p_key["default"]
    cosine = F.cosine_similarity(model.base_model.query(images)[:, None], key[None], dim=-1)
    for items in (None, 8, torch.tensor(20)):
        scaled = {} if items is None else {"num_items_in_batch": items}
        output = model.train()(images, labels=LABELS, **scaled)
        pull = cosine.gather(1, model.base_model.selected_prompts).sum(1)
        assert torch.allclose(output.prompt_similarity, pull, atol=1e-6)
        expected = (F.cross_entropy(output.logits, LABELS, reduction="none") - coeff * pull).sum()
        assert torch.allclose(output.loss, expected / (8 if items is None else items), atol=1e-6)


def test_evaluation_has_neither_pull_nor_similarity():
    """It would be gathered as a prediction; and a loss is comparable between methods only without it."""
    model, images = tiny.model(pull_constraint_coeff=5.0), tiny.images(8)
    output = model(images, labels=LABELS)
    assert list(output) == ["loss", "logits"]
    assert torch.allclose(output.loss, F.cross_entropy(output.logits, LABELS), atol=1e-6)
    trained = model.train()(images)
    assert list(trained) == ["logits", "prompt_similarity"]
    rebuilt = type(trained)(**dict(trained))  # as distributed wrappers rebuild outputs
    assert torch.equal(rebuilt.prompt_similarity, trained.prompt_similarity)
    with model.disable_adapter():
        assert list(model(images)) == ["logits"]


def test_accumulated_batches_are_the_whole_batch():
    model, images = tiny.model(), tiny.images(8)
    _, whole = step(model, images, num_items_in_batch=8)
    whole = {name: grad.clone() for name, grad in whole.items()}
    model.zero_grad()
    for part in torch.arange(8).split(3):
        model(images[part], labels=LABELS[part], num_items_in_batch=8).loss.backward()
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, whole[name], atol=1e-6), name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")  # transformers renames it
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    images = tiny.images(8)
    _, expected = step(tiny.model(), images)
    model = tiny.model()
    calls = []
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.base_model.backbone.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    _, grads = step(model, images)
    assert len(calls) == 3  # query, forward, and once more in the backward pass
    assert grads.keys() == expected.keys() and parameter(grads, "prompt").any()
    assert all(torch.allclose(grads[name], expected[name], atol=1e-6) for name in grads)


def test_bfloat16_autocast():
    model, images = tiny.model(), tiny.images(8)
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = step(model, images)
    assert output.logits.dtype == torch.bfloat16 and output.prompt_similarity.dtype == torch.float32
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert name not in grads or (grads[name].dtype == torch.float32 and grads[name].isfinite().all())
    _, exact = step(model, images)
    cosine = F.cosine_similarity(parameter(grads, "prompt").flatten(), parameter(exact, "prompt").flatten(), dim=0)
    assert cosine > 0.9


@pytest.mark.parametrize("kind", ["classification", "backbone"])
def test_bfloat16_backbone(kind):
    """Prompts and head stay float32, so that small steps are not rounded away."""
    model, images = tiny.model(base=tiny.backbone(kind).bfloat16()), tiny.images(8)
    layer = model.base_model.layer
    assert layer.l2p_prompt["default"].dtype == layer.l2p_key["default"].dtype == torch.float32
    assert layer.position_embeddings.dtype == torch.bfloat16
    output = model.train()(images)
    hidden = output.logits if kind == "classification" else output.last_hidden_state
    assert hidden.dtype == (torch.float32 if kind == "classification" else torch.bfloat16) and hidden.isfinite().all()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    (hidden.float().square().sum() - output.prompt_similarity.sum()).backward()
    assert all(p[a].grad.isfinite().all() and p[a].grad.any() for p in (layer.l2p_prompt, layer.l2p_key) for a in p)


def test_prompts_in_the_backbones_precision_on_request():
    from peft import get_peft_model

    from pgp_hf import L2PConfig

    model = get_peft_model(tiny.backbone().bfloat16(), L2PConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.eval()(tiny.images(2)).logits.isfinite().all()


def test_it_learns():
    """On ten images the loss falls, and keys approach their queries."""
    model, images = tiny.model(), tiny.images(8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, pulls = [], []
    for _ in range(30):
        optimizer.zero_grad()
        output = model.train()(images, labels=LABELS)
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
        pulls.append(float(output.prompt_similarity.mean().detach()))
    assert losses[-1] < 0.2 * losses[0] and pulls[-1] > pulls[0] + 0.5
    assert (model.eval()(images).logits.argmax(-1) == LABELS).all()
