"""Add CLIP prompts: a text context for each task and one shared image prompt (CLIP-PGP)."""

from .config import ClipPromptConfig
from .layer import ClipImagePrompt, ClipTextContext
from .model import ClipPromptModel

__all__ = ["ClipImagePrompt", "ClipPromptConfig", "ClipPromptModel", "ClipTextContext"]
