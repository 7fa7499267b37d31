"""Prompt tuners as PEFT methods. Importing this module registers them with PEFT."""

from .base.registration import register
from .clip_prompt import ClipPromptConfig, ClipPromptModel
from .dualprompt import DualPromptConfig, DualPromptModel
from .l2p import L2PConfig, L2PModel

register("clip_prompt", ClipPromptConfig, ClipPromptModel)
register("l2p", L2PConfig, L2PModel)
register("dualprompt", DualPromptConfig, DualPromptModel)

__all__ = ["ClipPromptConfig", "ClipPromptModel", "DualPromptConfig", "DualPromptModel", "L2PConfig", "L2PModel"]
