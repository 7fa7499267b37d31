"""Classify images with a finished task; no training code is imported."""

from .classifier import Prediction, PromptClassifier, load_pretrained
from .images import to_image

__all__ = ["Prediction", "PromptClassifier", "load_pretrained", "to_image"]
