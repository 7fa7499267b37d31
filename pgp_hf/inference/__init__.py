"""A finished task as a classifier; no training code."""

from .classifier import Prediction, PromptClassifier, load_pretrained, to_image

__all__ = ["Prediction", "PromptClassifier", "load_pretrained", "to_image"]
