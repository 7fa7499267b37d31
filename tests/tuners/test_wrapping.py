"""PEFT's own use of a deprecated name warns nobody who puts an adapter on a model; anybody else is still warned."""

from __future__ import annotations

import inspect
import warnings

import pytest
import tiny
from peft import LoraConfig, PeftModel, get_peft_model

from pgp_hf import set_trainable


@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("adapter", tiny.ADAPTERS)
def test_adapters_wrap_without_a_warning(strict, adapter):
    model = tiny.model(adapter)
    assert isinstance(model, PeftModel)
    set_trainable(tiny.backbone(), "lora:2")


def test_others_are_warned_as_before(strict):
    base = tiny.backbone()
    tiny.model(base=base)
    with pytest.raises(FutureWarning, match="is_gradient_checkpointing"):
        _ = base.is_gradient_checkpointing  # the user's own code
    with pytest.raises(FutureWarning, match="is_gradient_checkpointing"):
        get_peft_model(tiny.backbone(), LoraConfig(target_modules=["q_proj"]))
    assert list(inspect.signature(PeftModel.__init__).parameters)[:3] == ["self", "model", "peft_config"]
