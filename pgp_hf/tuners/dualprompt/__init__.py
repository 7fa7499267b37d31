"""Add general and expert prompts as prefix keys and values: DualPrompt (Wang et al., ECCV 2022)."""

from .config import DualPromptConfig
from .layer import DualPromptAttention, DualPromptEmbeddings
from .model import DualPromptModel

__all__ = ["DualPromptAttention", "DualPromptConfig", "DualPromptEmbeddings", "DualPromptModel"]
