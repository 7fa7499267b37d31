"""Register tuners with PEFT, which has no interface for methods from other packages."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import register_peft_method

from ...backbones.loading import wrapping
from .config import PromptConfig
from .model import PromptTuner
from .peft_type import extend_peft_type


def register(config_cls: type[PromptConfig], model_cls: type[PromptTuner]) -> None:
    """Make a tuner known to PEFT, and with it to everything that trains, saves, loads and describes adapters.

    Its name is the `method_name` of the configuration in lower case; its parameters are distinguished from the
    backbone's by the `prefix` of the model. Registering the same classes again changes nothing.

    Args:
        config_cls: class of the adapter's configuration.
        model_cls: class of the tuner.

    Raises:
        ValueError: a `method_name` that is not in upper case.
        RuntimeError: PEFT, or another package, already has a method of that name.
    """
    method, owner = config_cls.method_name, f"{config_cls.__module__}.{config_cls.__name__}"
    if method != method.upper():
        raise ValueError(f"{owner} has method_name={method!r}: it must be in upper case, as {method.upper()!r} is.")
    name = method.lower()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(extend_peft_type(method))
    if registered is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    elif registered is not config_cls:
        raise RuntimeError(
            f"PEFT already has a method {name!r} ({registered.__module__}.{registered.__name__}), so {owner} cannot be "
            "registered: choose another method_name, or do without the package (or the version of PEFT) that has it."
        )


def _wrap_silently() -> None:
    """Let `PeftModel` wrap a model in an adapter from here without a warning about PEFT's own code."""
    construct = PeftModel.__init__

    @functools.wraps(construct)
    def silently(self: PeftModel, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        with wrapping() if isinstance(peft_config, PromptConfig) else nullcontext():
            construct(self, model, peft_config, *args, **kwargs)

    PeftModel.__init__ = silently  # type: ignore[method-assign]  # PEFT has no hook around it


_wrap_silently()
