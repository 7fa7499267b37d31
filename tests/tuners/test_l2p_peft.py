"""L2P by PEFT's interface: saving, loading, several adapters, heads, copies, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from importlib import metadata

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, BertConfig, BertModel
from transformers.integrations import peft as transformers_peft

from pgp_hf import L2PConfig

OTHER = {"pool_size": 4, "prompt_length": 1, "top_k": 1, "head_type": "token"}


def train(model, images, steps=3):
    """Move everything that learns, so that what is saved is not what a fresh model has."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model.train()(images)
        hidden = output.logits if "logits" in output else output.last_hidden_state
        (hidden.square().mean() - output.prompt_similarity.mean()).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def predict(model, images):
    output = model(images)
    return output.logits if "logits" in output else output.last_hidden_state


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def save(model, folder, **kwargs):
    model.save_pretrained(folder, save_embedding_layers=False, **kwargs)  # the default asks the Hub for the base
    return folder


@pytest.fixture
def saved(tmp_path):
    """A trained adapter with four named classes: (model, folder, predictions)."""
    names = {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
    base = tiny.backbone(num_labels=4, id2label=names, label2id={v: k for k, v in names.items()})
    model = train(tiny.model(base=base), tiny.images())
    return model, save(model, tmp_path / "adapter"), predict(model, tiny.images())


# ---- saving and loading ----------------------------------------------------------------------------------------------


def test_files_are_safetensors_and_json(saved):
    model, folder, _ = saved
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "L2P" and config["task_type"] is None and config["hidden_size"] == 24
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "cat", "3": "dog"}
    tensors = load_file(folder / "adapter_model.safetensors")
    head = "base_model.model.classifier"
    prompts = model.base_model.prompt_parameters()
    assert set(tensors) == {*prompts, f"{head}.weight", f"{head}.bias"}
    assert all(torch.equal(tensors[name], parameter) for name, parameter in prompts.items())
    parameters = {id(p) for p in model.parameters()}
    assert all(id(p) in parameters for p in prompts.values())  # the parameters themselves, for projecting


@pytest.mark.parametrize("num_labels", [4, 7, 2, 0])
@pytest.mark.parametrize("options", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=str)
def test_loads_on_a_fresh_backbone_of_any_head(saved, num_labels, options):
    model, folder, expected = saved
    loaded = PeftModel.from_pretrained(tiny.backbone(num_labels=num_labels), folder, **options).eval()
    assert torch.equal(predict(loaded, tiny.images()), expected)
    assert loaded.get_base_model().config.id2label == {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
    assert loaded.get_base_model().config.label2id["cat"] == 2 and loaded.get_base_model().num_labels == 4
    assert not any(p.is_meta for p in loaded.parameters())
    assert learning(loaded) == (learning(model) if options == {"is_trainable": True} else set())
    if options == {"is_trainable": True}:
        train(loaded, tiny.images())
        assert not torch.equal(predict(loaded, tiny.images()), expected)


def test_loads_as_a_backbone(tmp_path):
    model = train(tiny.model(kind="backbone"), tiny.images())
    assert model.base_model.adapter_config.id2label is None and model.base_model.adapter_config.modules_to_save is None
    assert list(load_file(save(model, tmp_path) / "adapter_model.safetensors")) == [
        "base_model.model.embeddings.l2p_key",
        "base_model.model.embeddings.l2p_prompt",
    ]
    loaded = PeftModel.from_pretrained(tiny.backbone("backbone"), tmp_path)
    assert torch.equal(predict(loaded, tiny.images()), predict(model, tiny.images()))


def test_auto_classes_find_the_base(saved, tmp_path):
    """AutoPeftModel, and transformers' own loader given the adapter's folder, on a base of another head."""
    _, folder, expected = saved
    tiny.backbone(num_labels=9).save_pretrained(tmp_path / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for cls in (AutoPeftModel, AutoModelForImageClassification):
        assert torch.equal(predict(cls.from_pretrained(folder).eval(), tiny.images()), expected)


def _refusal() -> str:
    """Return why this transformers refuses the PEFT that is installed; empty where it does not."""
    wanted, found = transformers_peft.MIN_PEFT_VERSION, metadata.version("peft")
    refused = Version(found) < Version(wanted)
    return f"transformers {transformers.__version__} wants peft {wanted}, {found} is installed" if refused else ""


@pytest.mark.skipif(bool(_refusal()), reason=_refusal())
def test_transformers_adapters_side_by_side(saved, tmp_path):
    """`PreTrainedModel.load_adapter`: two adapters, switched and disabled, without a PeftModel around."""
    _, first, expected = saved
    images = tiny.images()
    second = train(tiny.model(base=tiny.backbone(num_labels=4), **OTHER), images)
    model = tiny.backbone(num_labels=9)
    model.load_adapter(str(first), adapter_name="first")
    assert torch.equal(predict(model.eval(), images), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        model.load_adapter(str(save(second, tmp_path / "second")), adapter_name="second")
    model.set_adapter("second")  # without this, transformers leaves no adapter's head active
    assert torch.equal(predict(model.eval(), images), predict(second, images))
    assert list(model(images)) == ["logits"] and list(model.train()(images)) == ["logits", "prompt_similarity"]
    model.eval().set_adapter("first")
    assert torch.equal(predict(model, images), expected)
    model.disable_adapters()
    assert torch.equal(model.vit(images).last_hidden_state, tiny.backbone().vit(images).last_hidden_state)


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_named_adapters(saved, tmp_path):
    """Pools of different sizes on one backbone: each predicts and learns as it does alone."""
    first, _, expected = saved
    images = tiny.images()
    other = train(tiny.model(base=tiny.backbone(num_labels=4), **OTHER), images)
    first.load_adapter(save(other, tmp_path / "other"), adapter_name="other", is_trainable=True)
    assert torch.equal(predict(first, images), expected)  # not yet active
    first.set_adapter("other")
    assert torch.equal(predict(first, images), predict(other, images))
    assert first.base_model.selected_prompts.shape == (5, 1)
    assert first.base_model.adapter_config.pool_size == 4
    assert learning(first) == {name.replace("default", "other") for name in learning(other)}
    assert first.base_model.prompt_parameters().keys() == other.base_model.prompt_parameters().keys()
    frozen = {n: p.clone() for n, p in first.named_parameters() if "other" not in n}
    train(first, images)
    assert all(torch.equal(p, frozen[n]) for n, p in first.named_parameters() if n in frozen)
    first.set_adapter("default")
    assert torch.equal(predict(first, images), expected)

    folder = save(first, tmp_path / "both")  # adapters of another name go into folders of their own
    assert (folder / "other" / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny.backbone(), folder / "other", adapter_name="other")
    first.set_adapter("other")
    assert torch.equal(predict(loaded, images), predict(first, images))

    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        first.delete_adapter("other")
    assert torch.equal(predict(first, images), expected)
    assert not any("other" in name for name, _ in first.named_parameters())


def test_added_adapters_start_afresh():
    model = tiny.model(base=tiny.backbone(num_labels=4), pool_size=6)
    model.add_adapter("new", L2PConfig(pool_size=8, prompt_length=2, top_k=5))
    assert "new" in model.peft_config and model.base_model.adapter_config.pool_size == 6
    model.set_adapter("new")
    assert predict(model, tiny.images()).shape == (5, 4)
    assert model.base_model.layer.inserted == 10 and model.base_model.selected_prompts.shape == (5, 5)


def test_the_model_has_the_class_names_of_the_active_adapter(saved):
    """Pipelines read them there, and adapters side by side need only have as many classes."""
    model = saved[0]
    config, own = model.get_base_model().config, {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
    other = {0: "elm", 1: "fir", 2: "gum", 3: "hop"}
    model.add_adapter("other", L2PConfig(**OTHER, id2label=other))
    assert config.id2label == own
    model.set_adapter("other")
    assert config.id2label == other and config.label2id == {"elm": 0, "fir": 1, "gum": 2, "hop": 3}
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert config.id2label == own


def test_names_of_a_stream_are_those_of_the_model():
    model, names = tiny.model(), {0: "ant", 1: "bee"}
    model.base_model.prepare_stream([[0, 1]], names)
    expected = {**{label: f"LABEL_{label}" for label in range(tiny.CLASSES)}, **names}
    assert model.get_base_model().config.id2label == expected == model.base_model.class_names


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_the_head_is_saved_by_default_and_left_alone_on_request(tmp_path):
    images = tiny.images()
    assert tiny.model().base_model.adapter_config.modules_to_save == ["classifier"]
    model = train(tiny.model(modules_to_save=[]), images)
    assert not any("classifier" in name for name in learning(model))
    folder = save(model, tmp_path)
    assert not any("classifier" in name for name in load_file(folder / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny.backbone(), folder)
    assert torch.equal(predict(loaded, images), predict(model, images))
    other = tiny.backbone(num_labels=7)  # a head of its own, which the adapter must not replace
    head = other.classifier
    loaded = PeftModel.from_pretrained(other, folder)
    assert loaded.get_base_model().classifier is head and other.config.num_labels == 7
    assert predict(loaded, images).shape == (5, 7)


@pytest.mark.parametrize("adapter", ["l2p", "clip"])
def test_modules_that_are_not_there_are_named(adapter):
    """PEFT would leave a misspelt head frozen, and out of the adapter's file."""
    kind = "CLIPModel" if adapter == "clip" else "ViTForImageClassification"
    with pytest.raises(ValueError, match=rf"\['clasifier'\]: this {kind} has no module 'clasifier'. Leave"):
        tiny.model(adapter, modules_to_save=["clasifier"])
    with pytest.raises(TypeError, match=r"modules_to_save='classifier': expected a list of names, such as \['class"):
        tiny.config(adapter, modules_to_save="classifier")


def test_modules_of_the_backbone_stay_frozen():
    """A backbone that learned would move the queries of old images."""
    with pytest.raises(ValueError, match="'layernorm' is in the backbone, which must stay frozen"):
        tiny.model(modules_to_save=["classifier", "layernorm"])


# ---- taking it off, copying it ---------------------------------------------------------------------------------------


def test_unloaded_model_takes_a_new_adapter():
    images = tiny.images()
    base = train(tiny.model(), images).unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Already found a `peft_config`")
        again = tiny.model(base=base, **OTHER)
    assert list(again.peft_config) == ["default"]
    assert torch.equal(predict(again, images), predict(tiny.model(**OTHER), images))


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(call):
    with pytest.raises(ValueError, match=r"cannot be merged.*unload\(\)"):
        getattr(tiny.model(), call)()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(saved, duplicate):
    """Also after a training step, whose graph must not stay on the model."""
    model, _, expected = saved
    images = tiny.images()
    model.train()(images, labels=torch.tensor([0, 1, 2, 3, 0]))
    twin = duplicate(model.eval())
    assert torch.equal(predict(twin, images), expected)
    train(twin, images)
    assert torch.equal(predict(model, images), expected) and not torch.equal(predict(twin, images), expected)
    assert torch.equal(predict(twin.unload(), images), predict(tiny.backbone(num_labels=4), images))
    assert torch.equal(predict(model, images), expected)


def test_status():
    model = tiny.model(base=tiny.backbone(num_labels=4), pool_size=6, prompt_length=3)
    status = model.get_model_status()
    assert status.peft_types == {"default": "L2P"} and status.adapter_model_type == "L2PModel"
    assert status.trainable_params == 6 * 3 * 24 + 6 * 24 + 4 * 24 + 4 and status.enabled


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_k": 11}, "top_k=11 is above pool_size=10.*Lower top_k"),
        ({"pool_size": 0, "top_k": 0}, "pool_size=0.*at least 1"),
        ({"prompt_length": -1}, "prompt_length=-1.*at least 0"),
        ({"top_k": -2}, "top_k=-2.*at least 0"),
        ({"pull_constraint_coeff": -0.1}, "pull_constraint_coeff=-0.1"),
        ({"pull_constraint_coeff": float("nan")}, "pull_constraint_coeff=nan"),
        ({"head_type": "mean"}, "head_type='mean'.*prompt, token"),
    ],
)
def test_config_refuses(setting, message):
    with pytest.raises(ValueError, match=message):
        L2PConfig(**setting)


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: BertModel(bert())], ids=["linear", "bert"])
def test_refuses_models_without_patches(make):
    with pytest.raises(
        ValueError, match="(Linear|BertModel) cannot take visual prompts: it has no patch embeddings.*Use a ViT"
    ):
        get_peft_model(make(), L2PConfig())


def bert():
    return BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)


def test_refuses_an_adapter_for_another_width(saved):
    with pytest.raises(ValueError, match="hidden size 24, this one has 32"):
        PeftModel.from_pretrained(tiny.backbone(hidden_size=32, num_attention_heads=4), saved[1])


def test_refuses_a_second_adapter_of_other_classes_and_stays_usable(saved, tmp_path):
    model, _, expected = saved
    folder = save(tiny.model(base=tiny.backbone(num_labels=7)), tmp_path / "seven")
    with pytest.raises(ValueError, match="adapter has 7 classes, the model's head 4.*fresh backbone"):
        model.load_adapter(folder, adapter_name="seven")
    assert list(model.peft_config) == ["default"] and torch.equal(predict(model, tiny.images()), expected)


def test_refuses_an_attention_mask_only_with_prompts():
    images, mask = tiny.images(2), torch.ones(2, 17, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask does not fit.*leave it out"):
        tiny.model()(images, attention_mask=mask)
    expected = tiny.backbone()(images, attention_mask=mask).logits
    assert torch.equal(tiny.model(top_k=0)(images, attention_mask=mask).logits, expected)
    model = tiny.model()
    with model.disable_adapter():
        assert torch.equal(model(images, attention_mask=mask).logits, expected)
