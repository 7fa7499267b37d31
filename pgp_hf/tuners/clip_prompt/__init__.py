"""CLIP prompts (CLIP-PGP): a text context per task and one shared image prompt."""

from .config import ClipPromptConfig
from .layer import ClipImagePrompt, ClipTextContext
from .model import ClipPromptModel

__all__ = ["ClipImagePrompt", "ClipPromptConfig", "ClipPromptModel", "ClipTextContext"]
