"""Rehearsal-free continual learning for frozen Hugging Face vision models: prompt pools and gradient projection.

Names are imported on first use, so that `pgp_hf.projection` costs torch alone. The adapters register with PEFT as
soon as both packages are imported, in either order.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .backbones import load_backbone
    from .data.stream import TaskStream
    from .inference.classifier import load_pretrained
    from .models import set_trainable
    from .projection import ProjectionConfig
    from .training.arguments import PGPTrainingArguments
    from .training.callbacks import StreamCallback
    from .training.pgp_trainer import PGPTrainer
    from .training.trainer import StreamTrainer
    from .tuners import ClipPromptConfig, DualPromptConfig, L2PConfig


_HOME = {
    "ClipPromptConfig": "tuners",
    "DualPromptConfig": "tuners",
    "L2PConfig": "tuners",
    "PGPTrainer": "training.pgp_trainer",
    "PGPTrainingArguments": "training.arguments",
    "ProjectionConfig": "projection",
    "StreamCallback": "training.callbacks",
    "StreamTrainer": "training.trainer",
    "TaskStream": "data.stream",
    "load_backbone": "backbones",
    "load_pretrained": "inference",
    "set_trainable": "models",
}
__all__ = [
    "ClipPromptConfig",
    "DualPromptConfig",
    "L2PConfig",
    "PGPTrainer",
    "PGPTrainingArguments",
    "ProjectionConfig",
    "StreamCallback",
    "StreamTrainer",
    "TaskStream",
    "load_backbone",
    "load_pretrained",
    "set_trainable",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register_tuners() -> None:
    importlib.import_module(f"{__name__}.tuners")


def _hand_in_readers() -> None:
    """Give `projection`, which neither opens files nor uses the Hub, the functions behind its `from_pretrained`."""

    def reader(name: str) -> Any:
        # imported when called: reading a revision takes more than torch
        return lambda *args, **kwargs: getattr(importlib.import_module(f"{__name__}.runs.open"), name)(*args, **kwargs)

    projection = importlib.import_module(f"{__name__}.projection")
    projection.set_readers(config=reader("load_projection_config"), projection=reader("load_projection"))


def _hand_in_trainer() -> None:
    """Give the classifier, which predicts without any code for training, the function behind its `trainer`."""

    def make(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module(f"{__name__}.training.pgp_trainer").trainer_of(*args, **kwargs)

    importlib.import_module(f"{__name__}.inference.classifier").set_trainer(make)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Call a function right after a module is imported, whoever imports it.

    Registering with PEFT or `projection` requires that they be imported, but `import pgp_hf` alone must import neither: it
    would take seconds. So registration waits until somebody else imports them.
    """

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module, self.then = module, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                if self in sys.meta_path:  # not in `find_spec`: looking for the module does not import it
                    sys.meta_path.remove(self)
                run(module)
                self.then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one import's loader
        return spec


_THEN = {
    "peft": _register_tuners,
    f"{__name__}.projection": _hand_in_readers,
    f"{__name__}.inference.classifier": _hand_in_trainer,
}
for _module, _then in _THEN.items():
    if _module in sys.modules:
        _then()
    else:
        sys.meta_path.insert(0, _AfterImport(_module, _then))
