"""L2P (Wang et al., CVPR 2022): a pool of prompts, selected by key and inserted at the input."""

from .config import L2PConfig
from .layer import L2PEmbeddings
from .model import L2PModel

__all__ = ["L2PConfig", "L2PEmbeddings", "L2PModel"]
