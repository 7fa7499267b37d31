"""What counts as a model that learns streams: every prompt tuner, by its members, and plain models by an adapter."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from pgp_hf import set_trainable
from pgp_hf.models import (
    KeepsClassStatistics,
    PlainModel,
    Protectable,
    SelectsPrompts,
    StreamModel,
    load_weights,
    stream_model,
    weights,
)


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_every_tuner_is_a_stream_model(method):
    tuner = tiny.model(method).base_model
    assert isinstance(tuner, StreamModel)
    assert isinstance(tuner, Protectable)
    assert isinstance(tuner, KeepsClassStatistics)
    assert isinstance(tuner, SelectsPrompts) == (method != "clip")


@pytest.mark.parametrize("method", tiny.ADAPTERS)
def test_the_tuner_is_found_in_what_a_trainer_gets(method):
    model = tiny.model(method)
    assert stream_model(model) is model.base_model
    assert stream_model(model.base_model) is model.base_model


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), get_peft_model(tiny.backbone(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))],
)
def test_other_models_are_refused_by_name(model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__} that cannot learn a stream: .*L2PConfig"):
        stream_model(model)


# ---- plain models ----------------------------------------------------------------------------------------------------

HEAD = {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("what", "name", "count"),
    [("all", "full", 40), ("last:1", "last:1", 20), ("last:2", "last:2", 36), ("head", "head", 2)],
)
def test_what_learns_is_chosen_by_words_and_told_by_name(what, name, count):
    model = set_trainable(tiny.backbone(), what)
    learner = stream_model(model)
    assert isinstance(learner, StreamModel) and isinstance(learner, PlainModel) and learner.name == name
    assert not isinstance(learner, SelectsPrompts | KeepsClassStatistics | Protectable)
    assert len(learner.trainable()) == count and learner.trainable().keys() >= HEAD
    learner.check()
    if what == "last:1":
        rest = {name for name in learner.trainable() if not name.startswith("vit.layers.1.")}
        assert rest == {*HEAD, "vit.layernorm.weight", "vit.layernorm.bias"}
    again = set_trainable(model, "all")
    assert again is model and stream_model(model).name == "full"  # a choice replaces the one before


def test_lora_is_pefts_own_with_the_head():
    model = set_trainable(tiny.backbone(), "lora:3")
    learner = stream_model(model)
    learner.check()
    assert isinstance(model, PeftModel) and learner.name == "lora:3" and learner.settings()["r"] == 3
    assert (
        sum("lora_" in name for name in learner.trainable()) == 8
    )  # two blocks, queries and values, two factors each
    assert sum("classifier" in name for name in learner.trainable()) == 2
    before = learner.digest()
    assert before == stream_model(set_trainable(tiny.backbone(), "lora:3")).digest() and len(before) == 1
    assert before != stream_model(set_trainable(tiny.backbone(seed=8), "lora:3")).digest()


@pytest.mark.parametrize("name", ["full", "lora:2"])
def test_features_are_what_the_classifier_reads(name):
    model, found = tiny.plain(name).eval(), []
    learner = stream_model(model)
    watch = learner.watch_features(found.append)
    with torch.no_grad():
        output = model(pixel_values=tiny.images(3))
        head = learner.base.classifier
        assert found[0].shape == (3, 24) and torch.equal(head(found[0]), learner.class_logits(output))
    watch.remove()


@pytest.mark.parametrize("name", ["full", "head", "lora:2"])
def test_what_a_task_keeps_can_be_taken_over(name):
    model, other = tiny.plain(name), tiny.plain(name, tiny.backbone(), seed=12)
    with torch.no_grad():
        for parameter in stream_model(other).trainable().values():
            parameter.add_(1.0)
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(model).items())
    load_weights(other, weights(model))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("everything", "trainable='everything' is unknown: choose all, last:N, head or lora:R"),
        ("last:0", "trainable='last:0' is unknown"),
        ("lora:x", "trainable='lora:x' is unknown"),
        ("last:3", "trainable='last:3' is more than the 2 blocks of ViTForImageClassification"),
    ],
)
def test_unknown_words_are_refused(what, message):
    with pytest.raises(ValueError, match=message):
        set_trainable(tiny.backbone(), what)


def test_models_without_the_parts_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match="ViTModel has no classifier"):
        set_trainable(tiny.backbone("backbone"), "head")
    with pytest.raises(TypeError, match="ViTModel has no classifier"):
        set_trainable(tiny.backbone("backbone"), "lora:2")
    partly = tiny.backbone()
    partly.vit.layernorm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="39 parameters of the ViTForImageClassification have requires_grad=True"):
        stream_model(partly).check()
    headless = get_peft_model(tiny.backbone(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the head of this LoRA model does not learn.*modules_to_save"):
        stream_model(headless).check()
    odd = tiny.backbone()
    odd.more = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="has 2 lists of blocks"):
        set_trainable(odd, "last:1")
