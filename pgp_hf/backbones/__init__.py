"""Backbones that prompts fit, a file for each family, and how they are loaded with a head for a stream.

A family is added by a file with a `Family` and its place in `FAMILIES`; the refusal of other models, the tests and
`supported()` follow from there.
"""

from .family import Family
from .loading import classification_class, load_backbone
from .registry import FAMILIES, family_of, find, head_width, supported

__all__ = [
    "FAMILIES",
    "Family",
    "classification_class",
    "family_of",
    "find",
    "head_width",
    "load_backbone",
    "supported",
]
