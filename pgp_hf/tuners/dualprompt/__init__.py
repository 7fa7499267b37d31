"""DualPrompt (Wang et al., ECCV 2022): general and expert prompts as prefix keys and values."""

from .config import DualPromptConfig
from .layer import DualPromptAttention, DualPromptEmbeddings
from .model import DualPromptModel

__all__ = ["DualPromptAttention", "DualPromptConfig", "DualPromptEmbeddings", "DualPromptModel"]
