"""Rehearsal-free continual learning for frozen Hugging Face vision models: prompt pools and gradient projection.

Names are imported on first use, so that `pgp_hf.projection` costs torch alone. The adapters register with PEFT as
soon as both packages are imported, in either order.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .data.stream import TaskStream
    from .inference.classifier import load_pretrained
    from .projection import ProjectionConfig
    from .training.arguments import PGPTrainingArguments
    from .training.trainer import PGPTrainer
    from .tuners import ClipPromptConfig, DualPromptConfig, L2PConfig


_HOME = {
    "ClipPromptConfig": "tuners",
    "DualPromptConfig": "tuners",
    "L2PConfig": "tuners",
    "PGPTrainer": "training.trainer",
    "PGPTrainingArguments": "training.arguments",
    "ProjectionConfig": "projection",
    "TaskStream": "data.stream",
    "load_pretrained": "inference",
}
__all__ = [
    "ClipPromptConfig",
    "DualPromptConfig",
    "L2PConfig",
    "PGPTrainer",
    "PGPTrainingArguments",
    "ProjectionConfig",
    "TaskStream",
    "load_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _RegisterAfterPeft(importlib.abc.MetaPathFinder):
    """Imports `pgp_hf.tuners` right after PEFT, when somebody imports PEFT after us."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                if self in sys.meta_path:  # only now: a mere look for PEFT must not use the finder up
                    sys.meta_path.remove(self)
                run(module)
                importlib.import_module("pgp_hf.tuners")

            spec.loader.exec_module = exec_module
        return spec


if "peft" in sys.modules:
    importlib.import_module("pgp_hf.tuners")
else:
    sys.meta_path.insert(0, _RegisterAfterPeft())
