"""Prompt tuners as PEFT methods, which importing this module registers with PEFT.

A tuner of your own takes a configuration (a subclass of `base.PromptConfig`) and a model (a subclass of
`base.PromptTuner`, or of `base.ViTPromptTuner` for prompts on a ViT). After `register(config_cls, model_cls)` it is
trained, saved, loaded, resumed and described like those here.
"""

from .base.registration import register
from .clip_prompt import ClipPromptConfig, ClipPromptModel
from .dualprompt import DualPromptConfig, DualPromptModel
from .l2p import L2PConfig, L2PModel

register(ClipPromptConfig, ClipPromptModel)
register(L2PConfig, L2PModel)
register(DualPromptConfig, DualPromptModel)

__all__ = [
    "ClipPromptConfig",
    "ClipPromptModel",
    "DualPromptConfig",
    "DualPromptModel",
    "L2PConfig",
    "L2PModel",
    "register",
]
