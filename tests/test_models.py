"""What counts as a model that learns streams: every prompt tuner, by its members; a plain model does not."""

from __future__ import annotations

import pytest
import tiny
from peft import LoraConfig, get_peft_model

from pgp_hf.models import KeepsClassStatistics, Protectable, SelectsPrompts, StreamModel, stream_model


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


def test_other_models_are_refused_by_name():
    with pytest.raises(TypeError, match="model is a ViTForImageClassification without a prompt adapter: .*L2PConfig"):
        stream_model(tiny.backbone())
    lora = get_peft_model(tiny.backbone(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="model is a PeftModel without a prompt adapter"):
        stream_model(lora)
