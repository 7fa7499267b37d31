"""DualPrompt: prefixes per head, experts by task in training and by key in prediction, and what is protected."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F

from pgp_hf import ProjectionConfig
from pgp_hf.projection import Basis, SecondMoment

pytestmark = pytest.mark.usefixtures("without_figures")

LAYERS = {"general_layers": [0], "expert_layers": [1], "general_length": 5}


def make(attention="eager", **kwargs):
    return tiny.model("dualprompt", attention=attention, **{**LAYERS, **kwargs})


@pytest.fixture
def images():
    return tiny.images(4)


def plain_forward(base, tuner, images, entries):
    """The prompted ViT, written out with matrices and loops over heads."""
    vit = base.vit
    x = vit.embeddings(images)
    for index, layer in enumerate(vit.layers):
        attention = layer.attention
        h = layer.layernorm_before(x)
        wrapper = tuner.backbone.layers[index].attention
        outputs = []
        for b in range(len(x)):
            heads = []
            for head in range(3):
                columns = slice(8 * head, 8 * head + 8)
                q = (h[b] @ attention.q_proj.weight.T + attention.q_proj.bias)[:, columns]
                k = (h[b] @ attention.k_proj.weight.T + attention.k_proj.bias)[:, columns]
                v = (h[b] @ attention.v_proj.weight.T + attention.v_proj.bias)[:, columns]
                for kind in ("expert", "general"):  # each goes in front of what is there
                    keys = getattr(wrapper, f"dualprompt_{kind}_key", {})
                    if "default" not in keys:
                        continue
                    values = getattr(wrapper, f"dualprompt_{kind}_value")
                    if kind == "general":
                        k, v = torch.cat([keys["default"][head], k]), torch.cat([values["default"][head].T, v])
                    else:
                        k = torch.cat([keys["default"][head, entries[b]], k])
                        v = torch.cat([values["default"][head, entries[b]], v])
                heads.append((q @ k.T / 8**0.5).softmax(-1) @ v)
            outputs.append(torch.cat(heads, -1) @ attention.o_proj.weight.T + attention.o_proj.bias)
        x = x + torch.stack(outputs)
        x = x + layer.mlp(layer.layernorm_after(x))
    return vit.layernorm(x)[:, 0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [([0], [1]), ([0, 1], [0, 1]), ([], [1]), ([1], [])])
def test_prefixes_equal_attention_written_out(images, attention, layers):
    """Keys and values are distinct, so that mixing them up would show."""
    model = make(attention, general_layers=layers[0], expert_layers=layers[1], general_length=2, expert_length=3)
    with torch.no_grad():
        logits = model(images).logits
        entries = model.base_model.selected_prompts[:, 0]
        features = plain_forward(tiny.backbone(), model.base_model, images, entries)
        expected = features @ model.base_model.model.classifier.weight.T + model.base_model.model.classifier.bias
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_prefixes_the_model_is_as_it_was(images, attention):
    base = tiny.backbone(attention=attention)
    expected = base(images, output_hidden_states=True)
    config = copy.deepcopy(base.config.to_dict())
    empty = tiny.model("dualprompt", copy.deepcopy(base), general_length=0, expert_length=0)
    assert torch.equal(empty(images).logits, expected.logits)
    model = tiny.model("dualprompt", base, **LAYERS)
    prompted = model(images, output_hidden_states=True)
    assert not torch.equal(prompted.logits, expected.logits)
    assert [h.shape for h in prompted.hidden_states] == [h.shape for h in expected.hidden_states]
    assert model.config._attn_implementation == attention and model.config.to_dict() == config
    with model.disable_adapter():
        assert torch.equal(model(images).logits, expected.logits)
    unloaded = model.unload()
    assert torch.equal(unloaded(images).logits, expected.logits)
    assert unloaded.vit.layers[0].attention.config is unloaded.config


def test_attention_implementation_can_change_after_injection(images):
    model = make("eager")
    eager = model(images).logits
    model.base_model.model.set_attn_implementation("sdpa")
    assert torch.allclose(model(images).logits, eager, atol=1e-5)


def test_eager_attentions_show_the_prefix(images):
    attentions = make("eager", general_length=2, expert_length=3)(images, output_attentions=True).attentions
    assert [a.shape[-1] for a in attentions] == [17 + 2, 17 + 3]


def test_selection_is_per_image_and_by_the_nearest_key(images):
    model = make()
    with torch.no_grad():
        together = model(images).logits
        entries = model.base_model.selected_prompts[:, 0]
        key = model.base_model.layer.dualprompt_key["default"]
        query = model.base_model.query(images)
        assert torch.equal(entries, F.cosine_similarity(query[:, None], key[None], dim=-1).argmax(1))
        alone = torch.cat([model(image[None]).logits for image in images.flip(0)]).flip(0)
    assert torch.allclose(together, alone, atol=1e-5)


def test_training_uses_the_tasks_entry_and_prediction_those_learned(images):
    model = make()
    tuner = model.base_model
    tuner.begin_task(1)
    model.train()
    output = model(images, labels=torch.arange(4))
    assert (tuner.selected_prompts == 1).all()
    plain = F.cross_entropy(output.logits, torch.arange(4)) - output.prompt_similarity.mean()
    assert torch.allclose(output.loss, plain)
    output.loss.backward()
    layer = tuner.backbone.layers[1].attention
    moved = layer.dualprompt_expert_key["default"].grad.abs().sum((0, 2, 3)) > 0
    assert moved.tolist() == [False, True, False]
    assert (tuner.layer.dualprompt_key["default"].grad.abs().sum(1) > 0).tolist() == [False, True, False]
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all("dualprompt_" in name or "modules_to_save" in name for name in trained)
    model.eval()
    model(images)
    assert tuner.selected_prompts.max() <= 1  # entry 2 belongs to no task yet


def test_a_task_starts_from_the_entry_before_it():
    for copies in (True, False):
        tuner = make(copy_previous=copies).base_model
        prefix = tuner.backbone.layers[1].attention.dualprompt_expert_value["default"]
        key = tuner.layer.dualprompt_key["default"]
        before = key.detach().clone()
        tuner.begin_task(1)
        assert torch.equal(prefix[:, 1], prefix[:, 0]) is copies
        assert torch.equal(key, before)


def test_more_tasks_than_entries(tmp_path):
    with pytest.raises(ValueError, match="3 tasks need as many entries, pool_size=2: set pool_size=3, or grow_pool"):
        tiny.trainer(tmp_path, model=make(pool_size=2))
    trainer = tiny.trainer(tmp_path, model=make(pool_size=2, grow_pool=True), num_train_epochs=1)
    trainer.train()
    loaded = PeftModel.from_pretrained(tiny.backbone(), tmp_path)
    assert loaded.base_model.adapter_config.pool_size == 3
    with pytest.raises(ValueError, match="task 4 has no entry: pool_size=3"):
        trainer.tuner.begin_task(3)


def test_a_step_before_training_starts_is_an_error():
    """What the other tasks' entries are has not been noted yet."""
    tuner = tiny.model("dualprompt").base_model
    tuner.begin_task(0)
    with pytest.raises(RuntimeError, match="training_starts.. come before the first step"):
        tuner.after_step()


def test_growing_keeps_what_is_there():
    tuner = make(pool_size=2).base_model
    old = {
        n: p.detach().clone()
        for n, p in tuner.named_parameters()
        if "expert" in n or n.endswith("dualprompt_key.default")
    }
    tuner.grow(5)
    for name, parameter in tuner.named_parameters():
        if name in old:
            axis = 0 if name.endswith("dualprompt_key.default") else 1
            assert parameter.shape[axis] == 5 and parameter.requires_grad
            assert torch.equal(parameter.narrow(axis, 0, 2), old[name])


@pytest.mark.parametrize(
    "extra",
    [
        {"reinit_optimizer": False, "weight_decay": 0.1},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"weight_decay": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_finished_experts_never_move(tmp_path, extra):
    trainer = tiny.trainer(tmp_path, model=make(), projection=ProjectionConfig(method="none"), **extra)
    trainer.train()
    tasks = [load_file(tmp_path / f"task-{t}" / "adapter_model.safetensors") for t in (1, 2, 3)]
    for name in tasks[0]:
        axis = 1 if "expert" in name else 0 if name.endswith("dualprompt_key") else None
        if axis is None:
            continue
        for done in (0, 1):
            for later in tasks[done + 1 :]:
                assert torch.equal(tasks[done][name].select(axis, done), later[name].select(axis, done))
        assert not torch.equal(tasks[0][name].select(axis, 1), tasks[2][name].select(axis, 1))


def test_movement_of_general_prefixes_lies_outside_the_bases_per_head(tmp_path):
    trainer = tiny.trainer(tmp_path, model=make(), projection=ProjectionConfig(energy=0.9), weight_decay=0.1)
    trainer.train()
    assert "3 expert prefixes of length 5 in layers [1]" in (tmp_path / "README.md").read_text()
    before, after = (load_file(tmp_path / t / "adapter_model.safetensors") for t in ("task-1", "task-2"))
    bases = load_file(tmp_path / "task-1" / "projection.safetensors")
    description = json.loads((tmp_path / "task-1" / "projection.json").read_text())
    stem = "base_model.model.vit.layers.0.attention.dualprompt_general"
    assert set(bases) == {f"{stem}_key", f"{stem}_value"}
    for name, basis in bases.items():
        info = description[name]
        assert info["batch_dims"] == 1 and basis.shape[:2] == (3, info["shape"][-1])
        moved = (after[name] - before[name]).reshape(info["shape"]).to(basis.dtype)
        for head in range(3):
            assert moved[head].norm() > 1e-4
            assert (moved[head] @ basis[head]).norm() < 1e-5 * moved[head].norm()


def test_protected_rows_are_the_old_queries_and_the_weights_they_give(images):
    model = make("sdpa", general_length=2)
    tuner = model.base_model
    rows = {name.rpartition("_")[2]: (role, r) for name, role, r in tuner.protected_rows(images)}
    base = tiny.backbone()
    attention = base.vit.layers[0].attention
    h = base.vit.layers[0].layernorm_before(base.vit.embeddings(images))
    q = attention.q_proj(h).unflatten(-1, (3, 8)).permute(2, 0, 1, 3).flatten(1, 2)
    k = attention.k_proj(h).unflatten(-1, (3, 8)).permute(2, 0, 1, 3)
    assert rows["key"][0] == "prompt" and torch.allclose(rows["key"][1], q, atol=1e-5)
    prefix = tuner.backbone.layers[0].attention.dualprompt_general_key["default"]
    keys = torch.cat([prefix[:, None].expand(-1, 4, -1, -1), k], 2)
    weights = (q.unflatten(1, (4, 17)) @ keys.mT / 8**0.5).softmax(-1)[..., :2].flatten(1, 2)
    assert rows["value"][0] == "value" and torch.allclose(rows["value"][1], weights, atol=1e-5)
    assert set(n for n, _, _ in tuner.protected_rows(images)) == set(tuner.prompt_parameters())


def test_protection_keeps_the_attentions_output(images):
    """The derivation, exactly: where old queries leave room, projected steps of keys and values change nothing."""
    model = make("eager", general_length=4, expert_layers=[])
    tuner = model.base_model
    attention = tuner.backbone.layers[0].attention
    key, value = (getattr(attention, f"dualprompt_general_{kind}")["default"] for kind in ("key", "value"))
    with torch.no_grad():  # queries use 5 of 8 dimensions of a head; two slots get the same weight
        for tensor in (attention.q_proj.weight, attention.q_proj.bias):
            tensor.view(3, 8, *tensor.shape[1:])[:, 5:] = 0
        key[:, 1] = key[:, 0]
    bases = {}
    for name, _, rows in tuner.protected_rows(images):
        moment = SecondMoment(rows.shape[-1], tuple(rows.shape[:-2])).update(rows)
        bases[name] = Basis.empty(rows.shape[-1], moment.batch_shape).extend(moment, energy=1.0)
    assert sorted(basis.rank for basis in bases.values()) == [3, 5]
    outputs = []
    hook = attention.register_forward_hook(lambda module, args, output: outputs.append(output[0].detach()))
    for project in (True, False):
        model(images)
        with torch.no_grad():
            for name, parameter in tuner.prompt_parameters().items():
                step = torch.randn(parameter.shape, dtype=torch.float64)
                parameter += (bases[name].project(step) if project else step).to(parameter.dtype)
        model(images)
    hook.remove()
    assert value.shape == (3, 8, 4)
    outputs = outputs[1::2]  # each prompted pass comes after its query pass
    changes = [(after - before).norm() / before.norm() for before, after in (outputs[:2], outputs[2:])]
    assert changes[0] < 1e-5 and changes[1] > 0.05


@pytest.mark.slow  # for L2P it is in the tests of the trainer
def test_projection_narrows_drift(tmp_path):
    drifts = {}
    for method in ("none", "pgp"):
        trainer = tiny.trainer(
            tmp_path / method, model=make(), projection=ProjectionConfig(method=method, energy=0.99, value_energy=0.99)
        )
        trainer.train()
        drifts[method] = trainer.results.drift[-1]
    assert drifts["pgp"] < 0.8 * drifts["none"]


def test_save_load_predict_and_several_adapters(tmp_path, images):
    model = make("sdpa")
    expected = model(images).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.backbone(), tmp_path).eval()
    assert torch.equal(loaded(images).logits, expected)
    loaded.add_adapter("other", tiny.config("dualprompt", **{**LAYERS, "pool_size": 5, "general_length": 1}))
    loaded.set_adapter("other")
    assert not torch.equal(loaded(images).logits, expected)
    loaded.set_adapter("default")
    assert torch.equal(loaded(images).logits, expected)
    loaded.delete_adapter("other")
    assert torch.equal(loaded(images).logits, expected)


@torch.no_grad()
def test_after_the_active_adapter_is_deleted_all_layers_use_the_same(images):
    """Of the adapters left, PEFT takes the first that has parameters in a layer, and the first of all has none in one."""
    general = {"expert_layers": [], "general_layers": [0, 1]}
    model = make(expert_layers=[])
    expected = model(images).logits
    for name in ("other", "third"):
        model.add_adapter(name, tiny.config("dualprompt", **general))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert torch.equal(model.eval()(images).logits, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(images, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make("sdpa")
        model.base_model.begin_task(1)
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.base_model.model.enable_input_require_grads() if reentrant else None
        model.train()
        model(images, labels=torch.arange(4)).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-6) for n in gradients[0])


def test_bfloat16(images):
    model = make("sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(images).logits).all()
    pure = tiny.model("dualprompt", tiny.backbone().to(torch.bfloat16), **LAYERS)
    assert torch.isfinite(pure(images.to(torch.bfloat16)).logits).all()
    assert pure.base_model.backbone.layers[0].attention.dualprompt_general_key["default"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"general_layers": [2]}, r"layer 2 is beyond the backbone's 2 layers \(0 to 1\)"),
        ({"general_layers": [0, 0]}, r"general_layers=\[0, 0\]"),
        ({"expert_layers": [-1]}, r"expert_layers=\[-1\]"),
        ({"expert_length": -1}, "expert_length=-1"),
        ({"pool_size": 0}, "pool_size=0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.slow  # the contract resumes it too
def test_resumed_is_straight(tmp_path):
    for folder in ("straight", "stopped"):
        trainer = tiny.trainer(tmp_path / folder, model=make(pool_size=2, grow_pool=True))
        if folder == "straight":
            trainer.train()
        else:
            trainer.train_task(0)
            trainer.train_task(1)
    tiny.trainer(tmp_path / "stopped", model=make(pool_size=2, grow_pool=True)).train(resume_from_checkpoint=True)
    a, b = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("straight", "stopped"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
