"""Classify images with a finished task; no training code is imported."""

from ..data.files import image_files
from .classifier import Prediction, PromptClassifier, load_pretrained
from .images import to_image

__all__ = ["Prediction", "PromptClassifier", "image_files", "load_pretrained", "to_image"]
