"""Configurations explain themselves, and know which of their fields are settings."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from peft import PeftConfig

from pgp_hf import ClipPromptConfig, DualPromptConfig, L2PConfig
from pgp_hf.tuners.base import PromptConfig

CONFIGS = (PromptConfig, L2PConfig, DualPromptConfig, ClipPromptConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_help_names_every_field(config):
    section = config.__doc__.split("    Args:\n")[1].split("\n\n")[0]
    named = [name for names in re.findall(r"^ {8}(\w[\w, ]*): ", section, re.MULTILINE) for name in names.split(", ")]
    own = {field.name for field in fields(config)} - {field.name for field in fields(PeftConfig)}
    assert sorted(named) == sorted(own)


@pytest.mark.parametrize(
    ("config", "filled_in"),
    [
        (L2PConfig(grow_pool=2, learned_entries=12, added_entries=2), set()),
        (DualPromptConfig(learned_entries=2), set()),
        (ClipPromptConfig(learned_entries=2, class_tokens=[]), {"class_tokens", "template"}),
    ],
)
def test_settings_leave_out_what_the_stream_fills_in(config, filled_in):
    settings = config.settings()
    own = {field.name for field in fields(config)} - {field.name for field in fields(PeftConfig)}
    assert (
        own - settings.keys()
        == {"id2label", "image_size", "head_input", "learned_entries", "added_entries"} | filled_in
    )
    assert settings["pool_size"] == 10 and settings["head"] == "linear"
