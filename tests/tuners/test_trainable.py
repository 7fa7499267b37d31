"""The parameters that learn, and the names that they are saved under."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

CLASSIFIER = ("classifier.weight", "classifier.bias")
NAMES = {
    "l2p": ("vit.embeddings.l2p_prompt", "vit.embeddings.l2p_key", *CLASSIFIER),
    "dualprompt": (
        "vit.embeddings.dualprompt_key",
        "vit.layers.0.attention.dualprompt_general_key",
        "vit.layers.0.attention.dualprompt_general_value",
        "vit.layers.1.attention.dualprompt_general_key",
        "vit.layers.1.attention.dualprompt_general_value",
        "vit.layers.1.attention.dualprompt_expert_key",
        "vit.layers.1.attention.dualprompt_expert_value",
        *CLASSIFIER,
    ),
    "clip": ("vision_model.embeddings.clip_prompt_image", "text_model.embeddings.clip_prompt_context"),
}


def make(method, adapter, **settings):
    """A tiny model whose adapter is called `adapter`."""
    return get_peft_model(tiny.backbone(tiny.ADAPTERS[method]), tiny.config(method, **settings), adapter_name=adapter)


def check(tuner, method):
    found = tuner.trainable()
    assert set(found) == {f"base_model.model.{name}" for name in NAMES[method]}
    learning = [p for p in tuner.parameters() if p.requires_grad]
    assert {id(p) for p in found.values()} == {id(p) for p in learning} and len(found) == len(learning)
    assert all(p.is_floating_point() for p in found.values())
    return found


@pytest.mark.parametrize("head", ["linear", "statistics"])
@pytest.mark.parametrize("adapter", ["default", "other"])
@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_they_have_the_names_of_the_file(tmp_path, method, adapter, head):
    model = make(method, adapter, head=head)
    found = check(model.base_model, method)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in found.items())
    assert len({tuple(tensor.flatten().tolist()) for tensor in found.values()}) == len(found)  # so no two are swapped
    others = ("statistics", "clip_prompt_features", "dualprompt_learned_entries")
    assert all(any(other in name for other in others) for name in saved.keys() - found.keys())


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_only_the_active_adapter_learns(method):
    model = tiny.model(method)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    first = check(model.base_model, method)
    model.set_adapter("other")
    second = check(model.base_model, method)
    assert not {id(p) for p in first.values()} & {id(p) for p in second.values()}


@pytest.mark.parametrize("name", ["weight", "classifier"])
def test_an_adapter_may_be_called_as_a_part_of_the_names_is(name):
    check(make("l2p", name).base_model, "l2p")


def test_nothing_learns_in_an_adapter_that_is_loaded_to_predict(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert loaded.base_model.trainable() == {}
