"""Registers this package's methods with PEFT, which has no plugin interface."""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType, register_peft_method


def extend_peft_type(name: str) -> PeftType:
    """Add `name` to PEFT's enum of methods, which `register_peft_method` insists on; idempotent."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # EnumMeta guards re-assignment only
    return member


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register a tuner under the lower-case `name`.

    Raises:
        RuntimeError: PEFT, or another package, already has a method of that name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(extend_peft_type(name.upper()))
    if registered is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    elif registered is not config_cls:
        raise RuntimeError(
            f"PEFT already has a method {name!r} ({registered.__module__}.{registered.__name__}): "
            f"pgp_hf cannot register {config_cls.__name__}. Use a PEFT version without it, or uninstall the other package."
        )
