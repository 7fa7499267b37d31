"""Prompt tuners as PEFT methods. Importing this module registers them with PEFT."""

from ._shared.registration import register
from .l2p import L2PConfig, L2PModel

register("l2p", L2PConfig, L2PModel)

__all__ = ["L2PConfig", "L2PModel"]
