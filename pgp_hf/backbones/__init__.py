"""Backbones that prompts fit, a file for each family, and how they are loaded with a head for a stream.

A family is added by a file with a `Family` and its place in `FAMILIES`: the refusal of other models, the table in
`examples/guides/backbones.md` and the tests follow from there.
"""

from .family import Family
from .loading import load_backbone
from .registry import FAMILIES, family_of, find, head_width, supported, table

__all__ = [
    "FAMILIES",
    "Family",
    "family_of",
    "find",
    "head_width",
    "load_backbone",
    "supported",
    "table",
]
