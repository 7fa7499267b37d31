"""The parts that tuners are made of.

- `config`, `card`: settings, and what a model card says of them;
- `registration`: how a tuner becomes known to PEFT;
- `model`: the tuner itself; `vit` for prompts on a ViT that a query selects, `entries` for an entry for each task;
- `layer`, `attention`: the wrapped modules, for prompts as tokens and as prefixes of an attention;
- `pool`, `head`, `outputs`: selection by key, the classification head, the output with what the pull term needs;
- `consistency`: what a projection protects in the first attention.
"""

from .card import AdapterCard
from .config import PoolConfig, PromptConfig
from .entries import TaskEntryTuner
from .layer import PromptLayer
from .model import PromptTuner
from .vit import ViTPromptTuner

__all__ = [
    "AdapterCard",
    "PoolConfig",
    "PromptConfig",
    "PromptLayer",
    "PromptTuner",
    "TaskEntryTuner",
    "ViTPromptTuner",
]
