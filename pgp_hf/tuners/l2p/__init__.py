"""Insert prompts at the input, selected from a pool by key: L2P (Wang et al., CVPR 2022)."""

from .config import L2PConfig
from .layer import L2PEmbeddings
from .model import L2PModel

__all__ = ["L2PConfig", "L2PEmbeddings", "L2PModel"]
